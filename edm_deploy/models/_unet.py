"""What the UNet families share: building from a config, the 8-bit layers, and the forward signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from edm_deploy.errors import UnsupportedError
from edm_deploy.family import Config

KEEP8 = ("time_embedding.", "class_embedding.", "add_embedding.", "time_embed_act")


def fixed_bounds_site(site: str) -> bool:
    """True for the layers that EfficientDM keeps at W8A8: first and last convolution and the time (or label) embedding.

    Source: arXiv 2310.03270, section 5.1.
    """
    return site in ("conv_in", "conv_out") or site.startswith(KEEP8)


def build_from_config(model_class: Any, config: Config) -> nn.Module:
    """`from_config` of a diffusers model class (diffusers ships no types, so Any) without the keys that diffusers adds for itself.

    Raises:
        UnsupportedError: diffusers refuses the config.
    """
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        model: nn.Module = model_class.from_config(arguments)
    except (TypeError, ValueError, KeyError) as err:
        raise UnsupportedError(f"diffusers cannot build {model_class.__name__} from this config: {err}") from err
    return model


def scale_of_levels(config: Config) -> int:
    """Pixels per sample side must be a multiple of this: every block but the last halves the map once."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def bind_arguments(signature: tuple[str, ...], carried: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional and named arguments as a dictionary, without the ones that are None.

    Raises:
        UnsupportedError: An argument is given that the graph has no input for, or one that it needs is missing.
    """
    given = dict(zip(signature, args, strict=False)) | dict(kwargs)
    given = {name: value for name, value in given.items() if value is not None and name != "return_dict"}
    if unknown := sorted(set(given) - set(carried)):
        raise UnsupportedError(f"The engine has no input {unknown[0]!r}; it takes {', '.join(carried)}.")
    if missing := [name for name in carried if name not in given]:
        raise UnsupportedError(f"The engine needs {missing[0]!r}; pass it as the diffusers model would take it.")
    return given
