"""What a path is: a float model, an artifact, an ONNX directory or an engine, and what is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edm_deploy.artifact import artifact as artifact_module
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.artifact.timestep_routing import Intervals, describe_intervals, intervals_from_mask
from edm_deploy.errors import ArtifactError
from edm_deploy.models import family_named
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.pipelines.model_index import INDEX
from edm_deploy.runtime import manifest as manifest_module
from edm_deploy.runtime.capabilities import CAPABILITIES, plan_layers, summary
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.directories import SOURCE_KEY, other_components, read_json
from edm_deploy_tools.common.console import Row, bytes_of, size_words, time_words
from edm_deploy_tools.inspection import describe_model as model
from edm_deploy_tools.inspection.estimates import by_site

TOLD = ("guidance", "conditioning", "folded")  # entries of a provenance that are said in words
Kind = Literal["model", "artifact", "onnx", "engine"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `inspect` prints.

    Attributes:
        kind: What the path is.
        facts: Name and value.
        tables: Rows by title.
    """

    kind: Kind
    facts: Mapping[str, Any]
    tables: Mapping[str, list[Row]] = field(default_factory=dict)


def describe(path_or_id: str) -> Description:
    """What stands at a path, behind a hub id, or under the name of an architecture.

    Raises:
        ArtifactError: It is none of the four, or damaged.
        UnsupportedError: A model that no family answers for.
    """
    path = Path(path_or_id)
    match kind_of(path_or_id):
        case "artifact":
            return describe_artifact(path)
        case "onnx":
            return describe_manifest(path, "onnx")
        case "engine":
            return describe_manifest(path, "engine")
        case _:
            return describe_model(path_or_id)


def kind_of(path_or_id: str) -> Kind:
    """Which of the four kinds a path is, by the file that marks it; what does not exist is taken for a hub id.

    Raises:
        ArtifactError: A file, or a directory without any of the marks.
    """
    path = Path(path_or_id)
    if (path / artifact_module.JSON_NAME).is_file():
        return "artifact"
    if (path / manifest_module.NAME).is_file():
        kind = read_json(path / manifest_module.NAME, what="engine").get("kind")
        if kind in ("onnx", "engine"):
            return kind  # type: ignore[no-any-return]
        raise ArtifactError(f"{path / manifest_module.NAME} is of kind {kind!r}, expected onnx or engine. Make the directory again.")
    if path.is_file():
        raise ArtifactError(f"{path} is a file; expected the directory of a model, an artifact, an ONNX export or an engine.")
    if path.exists() and not (path / "model_index.json").is_file():
        raise ArtifactError(
            f"{path} is no model, artifact, ONNX directory or engine: it has none of model_index.json, "
            f"{artifact_module.JSON_NAME}, {manifest_module.NAME}. Check the path."
        )
    return "model"


def describe_model(name: str) -> Description:
    """Layers, shapes, work, plans and expected sizes of a float model; its weights are not read.

    Raises:
        ArtifactError, UnsupportedError: As `describe_model.outline_of`.
    """
    outline = model.outline_of(name)
    work = model.work_of(outline)
    return Description(kind="model", facts=model.facts_of(outline, work), tables=model.tables_of(outline, work))


def describe_artifact(path: Path) -> Description:
    """Scheme, rows, provenance, the site table, and what each backend makes of it."""
    artifact = Artifact.load(path)
    timesteps = artifact.timesteps
    facts = {
        "kind": "artifact",
        "scheme": artifact.scheme,
        "family": artifact.family,
        "rows": f"{len(timesteps)}, timesteps {int(timesteps[0])} to {int(timesteps[-1])} of {artifact.num_train_timesteps}",
        "sites": len(artifact.sites),
        "structure": artifact.structure.summary(),
        "bits by channel": channel_bits_words(list(artifact.sites.values())),
        "folded": folded_words(artifact.folded),
        "correction": artifact.correction.summary() if artifact.correction else "none",
        "relaxed": relaxed_words(() if artifact.relaxed is None else intervals_from_mask(artifact.relaxed)),
        "guidance": guidance_words(artifact),
        "conditioning": conditioning_words(artifact),
        "size": size_words(bytes_of(path)),
        "digest": artifact.digest,
    } | {name: provenance_words(name, value) for name, value in artifact.provenance.items() if name not in TOLD}
    share = by_site(model_work(artifact.family_object, artifact.config, artifact.structure).sites)
    rows = [{**site_row(name, site), "MACs %": share.get(name)} for name, site in artifact.sites.items()]
    plans = [{"backend": target.backend, "plan": summary(plan_layers(artifact, target))} for target in CAPABILITIES.values()]
    return Description(kind="artifact", facts=facts, tables={"Sites": rows, "Plan": plans})


def channel_bits_words(sites: Sequence[QuantizedLayer]) -> str:
    """How many output channels have which bits, of the sites where they differ."""
    mixed = [site.channel_bits for site in sites if site.channel_bits is not None]
    if not mixed:
        return "none"
    bits = torch.cat(mixed)
    found, counts = bits.unique(return_counts=True)
    histogram = ", ".join(f"{count} of {width}" for width, count in zip(found.tolist(), counts.tolist(), strict=True))
    return f"{len(mixed)} sites; channels: {histogram} bits, {float(bits.float().mean()):.2f} on average"


def folded_words(folded: Sequence[str]) -> str:
    """Which layers become a table."""
    if not folded:
        return "none"
    return f"{len(folded)} layers that see the timestep alone, in floating point: {', '.join(folded[:3])}{', ...' if folded[3:] else ''}"


def relaxed_words(spans: Intervals) -> str:
    """At which timesteps activations stay in floating point."""
    return f"{describe_intervals(spans)}: activations in floating point, in a second graph of the same weights" if spans else "none"


def guidance_words(artifact: Artifact) -> str:
    """How the model was guided while it was calibrated, and how it usually is."""
    usual = artifact.family_object.guidance(artifact.config)
    if usual.kind == "none":
        return "none: the model is not guided"
    scale = artifact.provenance.get("guidance")
    if not isinstance(scale, int | float):
        return f"{usual.kind}, usually {usual.scale:g}; not recorded for this artifact"
    off = " (off)" if scale == 1 and usual.kind == "classifier-free" else ""
    return f"{usual.kind}, calibrated with {scale:g}{off}, usually {usual.scale:g}"


def conditioning_words(artifact: Artifact) -> str:
    """What the samples were told that the model was calibrated on."""
    inputs = [declared.name for declared in artifact.family_object.inputs(artifact.config)[2:]]
    if not inputs:
        return "none: the model is told nothing"
    return f"{artifact.provenance.get('conditioning', 'not recorded')}, for {', '.join(inputs)}"


def site_row(name: str, site: QuantizedLayer) -> Row:
    """One line of an artifact's site table."""
    table = site.activation
    return {
        "site": name,
        "op": site.op,
        "scheme": site.scheme,
        "weight": "x".join(map(str, site.codes.shape)),
        "weight scale": f"{float(site.weight_scale.min()):.2e} to {float(site.weight_scale.max()):.2e}",
        "input scale": f"{float(table.scale.min()):.2e} to {float(table.scale.max()):.2e}" if table else "-",
        "qmin": _span(table.qmin) if table else "-",
        "qmax": _span(table.qmax) if table else "-",
    }


def describe_manifest(path: Path, kind: Literal["onnx", "engine"]) -> Description:
    """Manifest of a graph or an engine: inputs, profile, plan, build and audit."""
    manifest = Manifest.read(path, kind=kind)
    facts: dict[str, Any] = {
        "kind": "ONNX directory" if kind == "onnx" else "engine",
        "scheme": manifest.scheme,
        "family": manifest.family,
        "dtype": manifest.dtype,
        "weight storage": manifest.weight_storage,
        "inputs": ", ".join(f"{entry.name} [{', '.join(map(str, entry.dims))}]" for entry in manifest.inputs),
        "sites": len(manifest.sites),
        "structure": NetworkRewrite.from_json(manifest.structure).summary(),
        "folded": table_words(manifest),
        "correction": Correction.from_json(manifest.correction).summary() if manifest.correction else "none",
        "relaxed": relaxed_words(manifest.relaxed),
        "guidance": families_guidance(manifest),
        "size": size_words(bytes_of(path)),
        "artifact": manifest.artifact,
    }
    if kind == "engine":
        facts["backend"] = manifest.backend
        facts["profile"] = ", ".join(f"{dim} {sizes.min}:{sizes.opt}:{sizes.max}" for dim, sizes in manifest.profile.items())
        facts["plan"] = summary(manifest.plan)
        facts["pipeline"] = pipeline_words(path, manifest)
    facts |= {f"build {name}": value for name, value in _flat(manifest.build).items()}
    rows = [{"site": name, "stored": entry.stored, "executed": entry.executed} for name, entry in manifest.plan.items()]
    return Description(kind=kind, facts=facts, tables={"Sites": rows} if rows else {})


def table_words(manifest: Manifest) -> str:
    """What became of the layers that see the timestep alone."""
    if not manifest.folded:
        return "none"
    became = f"a table, {manifest.folded['table']}" if "table" in manifest.folded else f"computed: {manifest.folded.get('computed')}"
    return f"{len(manifest.folded['layers'])} layers that see the timestep alone: {became}"


def families_guidance(manifest: Manifest) -> str:
    """How the model is guided, and what that asks of an engine's batch."""
    usual = family_named(manifest.family).guidance(manifest.config)
    doubled = "; each image takes two samples of a batch" if usual.kind == "classifier-free" else ""
    return "none" if usual.kind == "none" else f"{usual.kind}, usually {usual.scale:g}{doubled}"


def pipeline_words(path: Path, manifest: Manifest) -> str:
    """Which pipeline the engine belongs to, and whether the rest of it lies in its folder."""
    if not (path / INDEX).is_file():
        return "not recorded: put the engine into one of your own"
    index = read_json(path / INDEX, what="engine")
    others = other_components(index, family_named(manifest.family).component)
    missing = [name for name in others if not (path / name).is_dir()]
    named = str(index.get("_class_name"))
    if not others:
        return f"{named}: nothing but scheduler and engine"
    if not missing:
        return f"{named}: {', '.join(others)} lie in this folder, which deploys alone"
    return (
        f"{named}: {', '.join(missing)} come from {index.get(SOURCE_KEY, 'where --source says')}; build with --with-pipeline to copy them"
    )


def provenance_words(name: str, value: Any) -> str:
    """One entry of a provenance with its unit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "bytes" in name or "memory" in name:
            return size_words(int(value))
        if "seconds" in name:
            return time_words(float(value))
    return ", ".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, Mapping) else str(value)


def _span(column: Tensor) -> str:
    low, high = int(column.min()), int(column.max())
    return str(low) if low == high else f"{low} to {high}"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def longest(title: str, rows: Sequence[Row], top: int) -> tuple[str, list[Row]]:
    """Title and rows of a table as it is printed: of many sites those with the most work, or where that is not known the first, in the model's order."""
    if len(rows) <= top or "site" not in rows[0]:
        return title, list(rows)
    if "MACs %" not in rows[0]:
        return f"{title}: the first {top} of {len(rows)}; --json has all", list(rows[:top])
    kept = sorted(range(len(rows)), key=lambda index: -(rows[index]["MACs %"] or 0))[:top]
    return f"{title}: the {top} with the most work of {len(rows)}; --json has all", [rows[index] for index in sorted(kept)]
