"""Describe a float model, an artifact, an ONNX directory or an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from edm_deploy.artifact import artifact as artifact_module
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.artifact.timestep_routing import intervals_from_mask
from edm_deploy.errors import ArtifactError
from edm_deploy.models import family_named
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.runtime import manifest as manifest_module
from edm_deploy.runtime.capabilities import CAPABILITIES, plan_layers, summary
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.directories import INDEX_FILE, SOURCE_KEY, other_components, read_json
from edm_deploy_tools.common.console import Row, bytes_of, size_words, time_words
from edm_deploy_tools.inspection import describe_model as model
from edm_deploy_tools.inspection.bits_words import allocation_words, channel_bits_words, relaxed_bits, relaxed_words
from edm_deploy_tools.inspection.estimates import branch_rows, by_site
from edm_deploy_tools.inspection.work_by_step import work_by_step

DESCRIBED = ("guidance", "conditioning", "folded", "allocation")  # entries of a provenance that have a fact in words
PathKind = Literal["model", "artifact", "onnx", "engine"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """The output of `inspect`.

    Attributes:
        kind: Kind of the path.
        facts: Values by name.
        tables: Rows by title.
    """

    kind: PathKind
    facts: Mapping[str, Any]
    tables: Mapping[str, list[Row]] = field(default_factory=dict)


def describe(path_or_id: str) -> Description:
    """Describe a path, a hub id, or an architecture by its name.

    Raises:
        ArtifactError: It is no model, artifact, ONNX directory or engine, or it is damaged.
        UnsupportedError: There is no family for the model.
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


def kind_of(path_or_id: str) -> PathKind:
    """Kind of a path, by its marker file; a path that does not exist is taken as a hub id.

    Raises:
        ArtifactError: A file, or a directory without any marker file.
    """
    path = Path(path_or_id)
    if (path / artifact_module.JSON_NAME).is_file():
        return "artifact"
    if (path / manifest_module.NAME).is_file():
        kind = read_json(path / manifest_module.NAME, what="engine").get("kind")
        if kind in ("onnx", "engine"):
            return kind  # type: ignore[no-any-return]
        raise ArtifactError(f"{path / manifest_module.NAME} is of kind {kind!r}, expected onnx or engine. Write the directory again.")
    if path.is_file():
        raise ArtifactError(f"{path} is a file; expected the directory of a model, an artifact, an ONNX export or an engine.")
    if path.exists() and not (path / INDEX_FILE).is_file():
        raise ArtifactError(
            f"{path} is no model, artifact, ONNX directory or engine: it has none of {INDEX_FILE}, "
            f"{artifact_module.JSON_NAME}, {manifest_module.NAME}. Check the path."
        )
    return "model"


def describe_model(name: str) -> Description:
    """Layers, shapes, multiply-accumulates, plans and expected sizes of a float model; its weights are not read.

    Raises:
        ArtifactError, UnsupportedError: As `describe_model.pipeline_config_of`.
    """
    config = model.pipeline_config_of(name)
    work = model.work_of(config)
    return Description(kind="model", facts=model.facts_of(config, work), tables=model.tables_of(config, work))


def describe_artifact(path: Path) -> Description:
    """Scheme, rows, provenance, sites, and the plan of each backend."""
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
        "allocation": allocation_words(artifact),
        "folded": folded_words(artifact.folded),
        "correction": artifact.correction.summary() if artifact.correction else "none",
        "relaxed": relaxed_words(() if artifact.relaxed is None else intervals_from_mask(artifact.relaxed), artifact.relaxed_bits),
        "guidance": guidance_words(artifact),
        "conditioning": conditioning_words(artifact),
        "size": size_words(bytes_of(path)),
        "digest": artifact.digest,
    } | {name: provenance_words(name, value) for name, value in artifact.provenance.items() if name not in DESCRIBED}
    work = model_work(artifact.family_object, artifact.config, artifact.structure)
    share, branches = by_site(work.sites), branch_rows(artifact.family_object, work)
    rows: list[Row] = [{**site_row(name, site), "MACs %": share.get(name)} for name, site in artifact.sites.items()]
    plans: list[Row] = [{"backend": target.backend, "plan": summary(plan_layers(artifact, target))} for target in CAPABILITIES.values()]
    tables = {"Sites": rows} | ({"Branches": branches} if branches else {})
    tables |= {"Plan": plans, "Work by step": work_by_step(artifact, work.sites)}
    return Description(kind="artifact", facts=facts, tables=tables)


def folded_words(folded: Sequence[str]) -> str:
    """Layers that depend on the timestep alone, which exports replace by a table."""
    if not folded:
        return "none"
    return (
        f"{len(folded)} layers that depend on the timestep alone, in floating point: {', '.join(folded[:3])}{', ...' if folded[3:] else ''}"
    )


def guidance_words(artifact: Artifact) -> str:
    """Guidance of the model during calibration, and its usual guidance."""
    usual = artifact.family_object.guidance(artifact.config)
    if usual.kind == "none":
        return "none: the model is not guided"
    scale = artifact.provenance.get("guidance")
    if not isinstance(scale, int | float):
        return f"{usual.kind}, usually {usual.scale:g}; not recorded for this artifact"
    off = " (off)" if scale == 1 and usual.kind == "classifier-free" else ""
    return f"{usual.kind}, calibrated with {scale:g}{off}, usually {usual.scale:g}"


def conditioning_words(artifact: Artifact) -> str:
    """Conditioning of the samples that the model was calibrated on."""
    inputs = [declared.name for declared in artifact.family_object.inputs(artifact.config)[2:]]
    if not inputs:
        return "none: the model is unconditional"
    return f"{artifact.provenance.get('conditioning', 'not recorded')}, for {', '.join(inputs)}"


def site_row(name: str, site: QuantizedLayer) -> Row:
    """One row of an artifact's site table."""
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
    """Inputs, profile, plan and build of a graph or an engine, from its manifest."""
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
        "relaxed": relaxed_words(manifest.relaxed, relaxed_bits(path, manifest, kind)),
        "guidance": engine_guidance_words(manifest),
        "size": size_words(bytes_of(path)),
        "artifact": manifest.artifact,
    }
    if manifest.adapters:
        facts["lora"] = f"rank {manifest.adapters.rank} in {len(manifest.adapters.layers)} layers"
    if kind == "engine":
        facts["backend"] = manifest.backend
        facts["profile"] = ", ".join(f"{dim} {sizes.min}:{sizes.opt}:{sizes.max}" for dim, sizes in manifest.profile.items())
        facts["plan"] = summary(manifest.plan)
        facts["pipeline"] = pipeline_words(path, manifest)
    facts |= {f"build {name}": value for name, value in _flat(manifest.build).items()}
    rows: list[Row] = [{"site": name, "stored": entry.stored, "executed": entry.executed} for name, entry in manifest.plan.items()]
    return Description(kind=kind, facts=facts, tables={"Sites": rows} if rows else {})


def table_words(manifest: Manifest) -> str:
    """How the layers that depend on the timestep alone were exported."""
    if not manifest.folded:
        return "none"
    form = f"a table, {manifest.folded['table']}" if "table" in manifest.folded else f"computed: {manifest.folded.get('computed')}"
    return f"{len(manifest.folded['layers'])} layers that depend on the timestep alone: {form}"


def engine_guidance_words(manifest: Manifest) -> str:
    """Guidance of the model, and the samples of an engine's batch that an image takes."""
    usual = family_named(manifest.family).guidance(manifest.config)
    doubled = "; each image takes two samples of a batch" if usual.kind == "classifier-free" else ""
    return "none" if usual.kind == "none" else f"{usual.kind}, usually {usual.scale:g}{doubled}"


def pipeline_words(path: Path, manifest: Manifest) -> str:
    """Pipeline of the engine, and whether its other components are in the same directory."""
    if not (path / INDEX_FILE).is_file():
        return "not recorded: put the engine into a pipeline of your own"
    index = read_json(path / INDEX_FILE, what="engine")
    others = other_components(index, family_named(manifest.family).component)
    missing = [name for name in others if not (path / name).is_dir()]
    named = str(index.get("_class_name"))
    if not others:
        return f"{named}: scheduler and engine only"
    if not missing:
        return f"{named}: {', '.join(others)} are in this directory, which is complete"
    return f"{named}: {', '.join(missing)} come from {index.get(SOURCE_KEY, 'the directory named with --source')}; build with --with-pipeline to copy them"


def provenance_words(name: str, value: Any) -> str:
    """One entry of a provenance, with its unit."""
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
    """Title and rows of a printed table: at most `top` sites, those with the most multiply-accumulates or, if unknown, the first, in the model's order."""
    if len(rows) <= top or "site" not in rows[0]:
        return title, list(rows)
    if "MACs %" not in rows[0]:
        return f"{title}: the first {top} of {len(rows)}; --json has all", list(rows[:top])
    kept = sorted(range(len(rows)), key=lambda index: -(rows[index]["MACs %"] or 0))[:top]
    return f"{title}: the {top} with the most multiply-accumulates of {len(rows)}; --json has all", [rows[index] for index in sorted(kept)]
