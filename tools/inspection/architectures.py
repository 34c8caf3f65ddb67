"""Published denoisers without weights: diffusers class, config and scheduler, one file each in assets/architectures."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.meta_model import meta_model
from edm_deploy.registry import suggestion
from edm_deploy_tools.common.assets import ASSETS

FOLDER = ASSETS / "architectures"
DEPTHS = ("num_layers", "num_single_layers")  # config keys of a transformer that count equal blocks


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A published denoiser without its weights.

    Attributes:
        name: Name of the file.
        title: Usual name of the model.
        class_name: The diffusers class of the denoiser.
        config: Complete config: the values of the file, and diffusers' defaults for the rest.
        pipeline_class: The diffusers pipeline of the model.
        scheduler_class, scheduler_config: The scheduler that it is published with.
        parameters: Number of parameters as published; a layer that diffusers repeats counts once.
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
    """Names of all architectures."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def architecture(name: str) -> Architecture:
    """The architecture of this name; otherwise UnsupportedError, which lists the known ones."""
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
    """The same architecture with fewer blocks of each kind, to run real widths in a short time.

    Args:
        chosen: Architecture of a transformer.
        layers: Blocks of each kind, from 1 to the number that it has.

    Raises:
        InputError: A number out of range, or a UNet, whose levels differ in width.
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
    return replace(chosen, title=f"{chosen.title}, {layers} blocks of each kind", config=config, parameters=count)
