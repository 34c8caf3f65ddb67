"""Which models there is a family for, as a page: docs/families.md is what this prints.

python -m edm_deploy_tools.families docs/families.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from edm_deploy import models, registry
from edm_deploy.models import family_named
from edm_deploy.network.family import LAYER_GROUPS, Config, Family, PlacementRule, meta_model
from edm_deploy.pipelines.model_index import INDEX, read_pipeline_config
from edm_deploy_tools.common.assets import REFERENCE_MODEL
from edm_deploy_tools.inspection import architectures

COMMAND = "python -m edm_deploy_tools.families docs/families.md"
HEAD = f"""# Model families

Written by `{COMMAND}` from the families themselves and from the published configs in `tools/assets/architectures/`;
a test keeps it so. What has run with each is in the [README](../README.md#use-it-on-your-model); how to add one, in [CONTRIBUTING](../CONTRIBUTING.md).
`edm-deploy inspect NAME` says more of any architecture named here: every layer, its work, and what each backend makes of it."""
LAYERS = (nn.Conv2d, nn.Linear)
PLACED = {"w8a8": "W8A8", "float": "float"}


def page() -> str:
    """The whole page, as markdown."""
    families = {name: family_named(name) for name in registry.names(models)}
    known = [*(architectures.architecture(name) for name in architectures.names()), shipped()]
    published = {name: [found for found in known if found.class_name == family.class_name] for name, family in families.items()}
    overview = table(
        ["diffusers class", "published architectures", "guidance"],
        [
            [f"[`{family.class_name}`](#{family.class_name.lower()})", names_of(published[name]), guidance_of(family, published[name])]
            for name, family in families.items()
        ],
    )
    return "\n\n".join([HEAD, overview, *(section(name, family, published[name]) for name, family in families.items())]) + "\n"


def section(name: str, family: Family, published: Sequence[architectures.Architecture]) -> str:
    """One family: its inputs, its layers that are not quantized like the rest, its groups, its published models."""
    parts = [f"## {family.class_name}", f"`edm_deploy/models/{name.replace('-', '_')}.py`. {first_paragraph(family)}"]
    skeletons = [meta_model(family, described.config) for described in published]
    return "\n\n".join(
        [*parts, published_table(family, published, skeletons), inputs_table(family, published), rules_table(family, skeletons)]
    )


def published_table(family: Family, published: Sequence[architectures.Architecture], skeletons: Sequence[nn.Module]) -> str:
    """Parameters as published, sites by placement and group, layers that see the timestep alone."""
    rows = []
    for described, model in zip(published, skeletons, strict=True):
        sites = family.sites(model)
        placed = [family.placement(site) for site in sites]
        groups = [family.group(site) for site in sites]
        rows.append(
            [
                f"`{described.name}`: {described.title}",
                f"{described.parameters / 1e6:,.1f} M",
                f"{placed.count('quantize')} + {placed.count('w8a8')} at W8A8",
                ", ".join(f"{group} {groups.count(group)}" for group in LAYER_GROUPS if group in groups),
                str(len(family.time_layers(model, described.config)) or "-"),
                f"multiples of {family.size_multiple(described.config)}{limits_of(family, described.config)}",
            ]
        )
    return table(["architecture", "parameters", "sites", "groups", "see the timestep alone", "height, width"], rows)


def inputs_table(family: Family, published: Sequence[architectures.Architecture]) -> str:
    """The graph's inputs, by the architectures that have them."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for described in published:
        for declared in family.inputs(described.config):
            found.setdefault((declared.name, declared.kind, ", ".join(map(str, declared.dims))), []).append(described.name)
    order = list(dict.fromkeys(name for name, _, _ in found))
    rows = [
        [f"`{name}`", kind, f"[{dims}]", "all" if len(which) == len(published) else ", ".join(which)]
        for (name, kind, dims), which in sorted(found.items(), key=lambda entry: order.index(entry[0][0]))
    ]
    return table(["input", "type", "shape", "of"], rows)


def rules_table(family: Family, skeletons: Sequence[nn.Module]) -> str:
    """The layers that do not get the recipe's bits, and why; their number in each published model."""
    names = [[name for name, layer in model.named_modules() if isinstance(layer, LAYERS)] for model in skeletons]

    def counts(rule: PlacementRule) -> str:
        return ", ".join(str(sum(family.rule(name) is rule for name in model)) for model in names) or "-"

    rows = [[f"`{escaped(rule.pattern)}`", PLACED[rule.placement], counts(rule), rule.reason] for rule in family.rules]
    return table(["layers whose name holds", "are", "number, in each", "because"], rows)


def first_paragraph(family: Family) -> str:
    """Of the family's documentation."""
    return " ".join((type(family).__doc__ or "").split("\n\n")[0].split())


def shipped() -> architectures.Architecture:
    """The reference model, which lies in assets with its weights."""
    outline = read_pipeline_config(REFERENCE_MODEL)
    model = meta_model(outline.family_object, outline.config)
    return architectures.Architecture(
        name=f"tools/assets/{REFERENCE_MODEL.name}",
        title="the reference model that is shipped here",
        class_name=outline.family_object.class_name,
        config=outline.config,
        pipeline_class=str(outline.pipeline[INDEX]["_class_name"]),
        scheduler_class=outline.scheduler_class,
        scheduler_config=outline.scheduler_config,
        parameters=sum(value.numel() for value in model.parameters()),
    )


def names_of(published: Sequence[architectures.Architecture]) -> str:
    """Titles, with commas."""
    return ", ".join(described.title for described in published) or "-"


def guidance_of(family: Family, published: Sequence[architectures.Architecture]) -> str:
    """How its published models are guided, and the scales that are usual: `classifier-free, usually 7.5 or 5`."""
    found = [family.guidance(described.config) for described in published]
    kinds = dict.fromkeys(guidance.kind for guidance in found if guidance.kind != "none")
    scales = dict.fromkeys(f"{guidance.scale:g}" for guidance in found if guidance.kind != "none")
    return f"{', '.join(kinds)}, usually {' or '.join(scales)}" if kinds else "none"


def limits_of(family: Family, config: Config) -> str:
    """The largest size, where the model bounds it."""
    largest = {size for dim, size in family.limits(config).items() if dim in ("height", "width")}
    return f", up to {max(largest)}" if largest else ""


def escaped(pattern: str) -> str:
    """A pattern in a cell, whose bars are not the table's."""
    return pattern.replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="where to write; default: stdout")
    chosen = parser.parse_args(arguments)
    if chosen.file is None:
        sys.stdout.write(page())
    else:
        chosen.file.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
