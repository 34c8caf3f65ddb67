"""Read the tensors of a LoRA file or folder, with the configuration that its trainer wrote next to them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.storage.directories import read_json
from edm_deploy.storage.json_schema import check_bounded
from edm_deploy.storage.tensor_file import load_tensors

CONFIG_NAME = "adapter_config.json"  # of PEFT
METADATA_KEY = "lora_adapter_metadata"  # of diffusers, in the header of the file
WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and PEFT
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class LoraScaling:
    """The factor of an update as PEFT configures it: alpha / r, or alpha / sqrt(r).

    Attributes:
        alpha: Of layers that no pattern matches; None where no configuration states it, and the factor is 1.
        rank: r of the configuration, for updates whose factors do not show it.
        patterns: alpha by regular expression of layer names, anchored at the end.
        sqrt: Whether alpha is divided by sqrt(r). Source: Kalajdzievski, rsLoRA, arXiv 2312.03732.
    """

    alpha: float | None = None
    rank: int | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    sqrt: bool = False

    def factor(self, layer: str, rank: int | None, alpha: float | None = None) -> float:
        """The factor of a layer's update.

        Args:
            layer: Its published name.
            rank: r of its tensors; None where they do not show it.
            alpha: From the tensors themselves, which goes before the configuration.
        """
        if alpha is None:
            matches = (value for pattern, value in self.patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
            alpha = next(matches, self.alpha)
            rank = self.rank if rank is None else rank
        if alpha is None or rank is None:
            return 1.0
        return float(alpha / rank**0.5) if self.sqrt else float(alpha / rank)


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file.

    Attributes:
        name: Its name, for messages.
        tensors: By the names that its trainer gave.
        scaling: By the prefix of the component that it configures, `unet.` or none.
    """

    name: str
    tensors: Mapping[str, Tensor]
    scaling: Mapping[str, LoraScaling] = field(default_factory=dict)


def read_lora_file(path: Path | str) -> LoraFile:
    """Read a safetensors file, or a folder with one.

    Raises:
        ArtifactError: There is none, or it is damaged.
        InputError: It is a pickle, or a DoRA.
    """
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    if file.suffix in PICKLES:
        raise InputError(f"{file} is a pickle, which may hold code; expected safetensors. Convert it, or choose the .safetensors file.")
    if not file.is_file():
        raise ArtifactError(f"{path} does not exist; expected a LoRA: a .safetensors file, or a folder with one. Check the path.")
    tensors = load_tensors(file)
    configs = _configs(file)
    return LoraFile(
        file.name if path == file else path.name, tensors, {prefix: scaling_of(config, file.name) for prefix, config in configs.items()}
    )


def scaling_of(config: Mapping[str, Any], name: str) -> LoraScaling:
    """The scaling of a PEFT configuration of a LoRA, LoHa or LoKr.

    Raises:
        InputError: It configures a method other than these.
    """
    kind = str(config.get("peft_type", "LORA")).upper()
    if config.get("use_dora"):
        raise dora_refusal(name)
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise InputError(f"{name} is an adapter of type {kind}; expected LORA, LOHA or LOKR. Choose another file.")
    alpha, rank = config.get("lora_alpha", config.get("alpha")), config.get("r")
    numbers = {key: value for key, value in dict(config.get("alpha_pattern") or {}).items() if isinstance(value, int | float)}
    return LoraScaling(
        alpha=float(alpha) if isinstance(alpha, int | float) else None,
        rank=rank if isinstance(rank, int) and rank > 0 else None,
        patterns=numbers,
        sqrt=bool(config.get("use_rslora")),
    )


def dora_refusal(name: str) -> InputError:
    """The error for a DoRA. Source: Liu et al., DoRA, arXiv 2402.09353, equation 5: its norm needs the float weight."""
    return InputError(
        f"{name} is a DoRA, which normalizes the float weight by column; an engine holds rounded weights only. Choose a LoRA, or fuse it before quantizing."
    )


def _file_in(folder: Path) -> Path:
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    found = named or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        have = ", ".join(file.name for file in found[:3]) or "none"
        raise ArtifactError(f"{folder} holds {len(found)} LoRA files ({have}), expected one .safetensors file. Name the file itself.")
    return found[0]


def _configs(file: Path) -> dict[str, Mapping[str, Any]]:
    """PEFT's configurations by the prefix of their component: the file next to the weights, or the header that diffusers writes."""
    beside = file.with_name(CONFIG_NAME)
    if file.name == WEIGHTS[1] and beside.is_file():
        return {"": read_json(beside, what="LoRA", home=file.parent)}
    with safetensors.safe_open(file, framework="pt") as stream:
        text = (stream.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return {}
    try:
        flat = json.loads(text)
        check_bounded(flat, path=METADATA_KEY)
    except (ValueError, RecursionError) as err:
        raise ArtifactError(f"{file} has a header {METADATA_KEY} that is no JSON. The file is damaged; copy it again.") from err
    if not isinstance(flat, dict):
        raise ArtifactError(f"{file} has a header {METADATA_KEY} that is no object. The file is damaged; copy it again.")
    return by_component(flat)


def by_component(flat: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Diffusers' metadata, `unet.lora_alpha`, as one configuration for each prefix `unet.`."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, dot, name = key.rpartition(".") if "." in key else ("", "", key)
        configs.setdefault(component + dot, {})[name] = value
    return dict(configs)
