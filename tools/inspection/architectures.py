"""Denoisers that people run, as facts: diffusers class, config and scheduler, one file each in assets/architectures. No weights."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.family import meta_model
from edm_deploy.registry import suggestion
from edm_deploy_tools.common.assets import ASSETS

FOLDER = ASSETS / "architectures"
DEPTHS = ("num_layers", "num_single_layers")  # a transformer's config keys that count equal blocks


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A published denoiser without its weights.

    Attributes:
        name: As the file is named.
        title: As people name it.
        class_name: The diffusers class of the denoiser.
        config: Its whole config: what the file says, diffusers' defaults for the rest.
        pipeline_class: The diffusers pipeline that it belongs to.
        scheduler_class, scheduler_config: The scheduler that it is shipped with.
        parameters: As published; a layer that diffusers repeats counts once.
    """

    name: str
    title: str
    class_name: str
    config: Mapping[str, Any]
    pipeline_class: str
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    parameters: int


def names() -> list[str]:
    """Every architecture's name."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def architecture(name: str) -> Architecture:
    """The architecture of this name; UnsupportedError lists the known ones otherwise."""
    if name not in names():
        raise UnsupportedError(f"No architecture {name!r}.{suggestion(name, names())} Known: {', '.join(names())}.")
    content = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    scheduler = dict(content["scheduler"])
    return Architecture(
        name=name,
        title=content["title"],
        class_name=content["class"],
        config=family_named(name_of_family(content["class"])).full_config(content["config"]),
        pipeline_class=content["pipeline"],
        scheduler_class=scheduler.pop("class"),
        scheduler_config=scheduler,
        parameters=content["parameters"],
    )


def with_layers(chosen: Architecture, layers: int) -> Architecture:
    """The same architecture with so many blocks of each kind: real widths where the whole depth would take too long.

    Args:
        chosen: A transformer.
        layers: Blocks of each kind, 1 or more, at most as many as it has.

    Raises:
        InputError: A number that it cannot have, or a UNet, whose levels differ in width.
    """
    depths = {key: int(chosen.config[key]) for key in DEPTHS if chosen.config.get(key)}
    if not depths:
        raise InputError(f"--layers {layers}: {chosen.title} is no stack of equal blocks. Leave it out.")
    if not 1 <= layers <= max(depths.values()):
        raise InputError(
            f"--layers {layers}: {chosen.title} has {' and '.join(map(str, depths.values()))} blocks; expected 1 to that many."
        )
    config = dict(chosen.config) | {key: min(layers, depth) for key, depth in depths.items()}
    if marked := config.get("dual_attention_layers"):
        config["dual_attention_layers"] = [index for index in marked if index < layers]
    shapes = meta_model(family_named(name_of_family(chosen.class_name)), config)
    count = sum(value.numel() for value in shapes.parameters())
    return replace(chosen, title=f"{chosen.title}, {layers} of each kind of block", config=config, parameters=count)
