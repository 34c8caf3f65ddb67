"""The interface of a model family. All that is specific to one diffusers architecture is in its subclass, one file each in `models/`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.network.low_rank_branch import in_branch
from edm_deploy.network.placement import BRANCHES, LayerGroup, Placement, PlacementRule, group_of, rule_for
from edm_deploy.network.restructure import layer_of

Config = Mapping[str, Any]  # a diffusers config: its values are whatever the JSON holds
InputDtype = Literal["float", "float32", "int64"]


@dataclass(frozen=True)
class ModelInput:
    """One input of a denoiser's graph.

    Attributes:
        name: As in the diffusers forward signature.
        kind: `float` is the graph's floating-point dtype; the others are fixed.
        dims: A number for each fixed dimension, a name for each dynamic one. The first is `batch`, weights of adapters apart.
    """

    name: str
    kind: InputDtype
    dims: tuple[str | int, ...]

    def dtype(self, float_dtype: torch.dtype) -> torch.dtype:
        """The torch dtype of this input in a graph of floating-point type `float_dtype`."""
        return {"float": float_dtype, "float32": torch.float32, "int64": torch.int64}[self.kind]


@dataclass(frozen=True)
class Guidance:
    """How a model is guided towards its conditioning.

    Attributes:
        kind: `classifier-free` evaluates the model with and without conditioning; `embedded` passes the scale as an input.
        scale: The usual guidance scale; 1 is no guidance.
    """

    kind: Literal["none", "classifier-free", "embedded"]
    scale: float = 1.0


SAMPLE = "sample"  # name of the noisy sample among a graph's inputs
TIMESTEP = ModelInput("timestep", "float32", ("batch",))


class Family(ABC):
    """One diffusers architecture.

    Stateless: the config is an argument of every method that needs it. A new family subclasses `edm_deploy.models._diffusers.DiffusersFamily`, which
    implements `build`, `bind` and `output` for any diffusers model, and is assigned to `FAMILY` in `edm_deploy/models/<name>.py`.

    Attributes:
        class_name: Name of the diffusers class, `_class_name` in its config.json.
        component: Name of the denoiser in a pipeline, `unet` or `transformer`.
        rules: Layers that are not quantized to the recipe's bits; the first rule that matches decides.
        text_inputs: Names of the inputs that are computed from a prompt.
        flow: Whether the model was trained by flow matching. Its timesteps then include the schedule's length, at sigma 1.
        lora_layers: Regular expression of the published layers that get an adapter branch where none is named: those that LoRA files usually have.
    """

    class_name: ClassVar[str]
    component: ClassVar[str] = "unet"
    rules: ClassVar[tuple[PlacementRule, ...]] = ()
    text_inputs: ClassVar[tuple[str, ...]] = ()
    flow: ClassVar[bool] = False
    lora_layers: ClassVar[str] = r"(^|\.)(attentions|(single_)?transformer_blocks)\."

    @abstractmethod
    def build(self, config: Config) -> nn.Module:
        """The float model of this config with random weights, on the default device; without memory under `with torch.device("meta")`.

        Raises:
            UnsupportedError: The config has a feature that the family does not support; the message names it.
        """

    @abstractmethod
    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        """The graph's inputs in order: `sample`, `timestep`, then the conditioning."""

    @abstractmethod
    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run `model` on inputs named as in `inputs`; the result, [B, ...], is the graph's output and what a pipeline receives.

        This is the function that is exported: it may differ from the model's own `forward` only in form.
        """

    @abstractmethod
    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the diffusers model's `forward` by name, `return_dict` among them where it is given.

        Raises:
            InputError: More positional arguments than `forward` has parameters, or one parameter twice.
        """

    @abstractmethod
    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Map the arguments of the diffusers model's `forward` to graph inputs by name.

        Raises:
            UnsupportedError: An argument that is not None has no input in the graph, or an input is missing.
            InputError: As `arguments`.
        """

    @abstractmethod
    def output(self, sample: Tensor) -> Any:  # each diffusers model has another output class
        """Wrap the graph's output in the model's diffusers output class."""

    def denoiser_class(self, base: type[nn.Module]) -> type[nn.Module]:
        """`base`, a class of engines' denoisers, as a subclass of what the pipelines of this model accept as a denoiser."""
        return base

    @abstractmethod
    def size_multiple(self, config: Config) -> int:
        """The number of pixels or latents that height and width must be multiples of."""

    def full_config(self, config: Config) -> dict[str, Any]:
        """`config` with the model class's defaults for the keys that it lacks, as JSON holds it."""
        return dict(config)

    def sample_size(self, config: Config) -> tuple[int, int]:
        """Height and width of a sample at the model's sample size, in pixels or latents.

        Raises:
            UnsupportedError: The config has no usable `sample_size`.
        """
        size = config.get("sample_size")
        sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise UnsupportedError(
                f"{self.class_name} with sample_size={size!r}: expected one positive number, or height and width. Write it into config.json."
            )
        return sides[0], sides[1]

    def sample_shape(self, config: Config) -> tuple[int, ...]:
        """Shape of the input `sample` at the model's sample size, without the batch dimension: [channels, height, width] by default."""
        return int(config["in_channels"]), *self.sample_size(config)

    def latent_shape(self, config: Config) -> tuple[int, ...]:
        """Shape of the tensor that a scheduler denoises, without the batch dimension: `sample_shape` less any channels of conditioning."""
        return self.sample_shape(config)

    def sizes(self, config: Config) -> dict[str, int]:
        """The usual size of each dynamic dimension except `batch`."""
        dims = self.inputs(config)[0].dims[1:]
        return {dim: size for dim, size in zip(dims, self.sample_shape(config), strict=True) if isinstance(dim, str)}

    def limits(self, config: Config) -> dict[str, int]:
        """The largest size of each dynamic dimension that the model bounds, by name."""
        return {}

    def prediction(self, config: Config, output: Tensor) -> Tensor:
        """The part of an output that a scheduler consumes: all of it, or the noise of a model that also predicts a variance."""
        return output

    def latents(self, config: Config, sample: Tensor) -> Tensor:
        """A finished sample in the layout that a VAE decodes, [B, C, H, W]."""
        return sample

    def embedded_timesteps(self, config: Config) -> int | None:
        """Number of timesteps in the model's embedding table; None where the embedding is a function of any timestep."""
        return None

    def classes(self, config: Config) -> int | None:
        """Number of class labels, without the one for no class; None where the model does not take a label as an index."""
        return None

    def labels(self, config: Config) -> int | None:
        """Number of values of the input `class_labels`, the one for no class included; None where the model does not take a label as an index."""
        return self.classes(config)

    def sigmas(self, steps: int) -> tuple[float, ...] | None:
        """Noise levels, descending, that the model's pipeline passes to the scheduler for this number of steps; None for the scheduler's default."""
        return None

    def rule(self, site: str) -> PlacementRule:
        """The placement rule of the Conv2d or Linear of this name."""
        return BRANCHES if in_branch(site) else rule_for(layer_of(site), self.rules)

    def placement(self, site: str) -> Placement:
        """Placement of the Conv2d or Linear of this name: `quantize` (the recipe's bits), `w8a8` (symmetric W8A8) or `float`."""
        return self.rule(site).placement

    def group(self, site: str) -> LayerGroup:
        """The part of the model that a site belongs to, for recipes that treat parts differently."""
        return group_of(layer_of(site))

    def time_only(self, config: Config) -> str | None:
        """Regular expression of the layers whose output depends on the timestep alone, so that it can be tabulated; None where there are none."""
        return None

    def other_embedding_inputs(self, config: Config) -> str | None:
        """What is added to the timestep embedding that modulates every block, as a phrase; None where nothing is."""
        return None

    def time_layers(self, model: nn.Module, config: Config) -> tuple[str, ...]:
        """Names of the sites that `time_only` matches, in model order."""
        pattern = self.time_only(config)
        return tuple(name for name in self.sites(model) if pattern and re.search(pattern, layer_of(name)))

    def guidance(self, config: Config) -> Guidance:
        """The guidance that the model is usually sampled with."""
        return Guidance("none")

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random conditioning of `batch` samples, drawn without data: a tensor [B, ...] for each input after sample and timestep."""
        return {}

    def extra_channels(self, config: Config, batch: int, generator: torch.Generator) -> Tensor | None:
        """Random channels of conditioning to concatenate to the latents, [B, C, H, W], drawn without data; None where the model has none."""
        return None

    def unconditional(self, config: Config, generator: torch.Generator) -> dict[str, Tensor]:
        """The null conditioning of classifier-free guidance, [1, ...] by name: replacements of some inputs of `random_conditioning`."""
        return {}

    def encode_prompts(self, config: Config, pipeline: Any, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encode prompts with a pipeline's text encoders.

        Args:
            config: Config of the model.
            pipeline: A diffusers pipeline that holds at least its text encoders and tokenizers.
            prompts: P prompts, one or more.

        Returns:
            `text_inputs` by name, [P, ...]; and those of the empty prompt, [1, ...].

        Raises:
            UnsupportedError: The model takes no prompts.
        """
        raise UnsupportedError(f"{self.class_name} takes no prompts.")

    def published_lora(self, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA's tensors by this model's layer names, where a trainer used those of another implementation; others keep their names."""
        return dict(tensors)

    def attributes(self, config: Config) -> dict[str, Any]:  # whatever a pipeline reads
        """Attributes of the diffusers model that its pipelines read in addition to `config`, `dtype` and `device`, by name."""
        return {}

    def freeze_config(self, config: Config) -> Any:  # diffusers' FrozenDict: attribute access, as pipelines expect
        """`config` as the mapping with attribute access that diffusers pipelines read."""
        return dict(config)

    def sites(self, model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
        """Every layer that is quantized, by its name, in model order: each Conv2d and Linear that no rule places as `float`.

        Raises:
            UnsupportedError: A convolution pads with other values than zeros.
        """
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        for name, layer in layers.items():
            if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
                raise UnsupportedError(f"Site {name!r} pads with {layer.padding_mode!r}; integer convolutions pad with zeros only.")
        return {name: layer for name, layer in layers.items() if self.placement(name) != "float"}


def timestep_tensor(value: Any) -> Tensor:
    """A timestep for all samples, or one for each: float32 [] or [B].

    Args:
        value: As diffusers' models accept it: a number, or a sequence, an array or a tensor of numbers.

    Raises:
        InputError: It is something else.
    """
    expected = "expected a number, or a tensor of one number for each sample. Pass an element of scheduler.timesteps."
    if isinstance(value, Tensor) and not is_dense(value):
        raise InputError(f"timestep is {kind_of(value)}, {expected}")
    try:
        # A number of Python in float64, which holds it whatever torch's default type is.
        timesteps = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    except (TypeError, ValueError, OverflowError, RuntimeError) as err:
        raise InputError(f"timestep is {type(value).__name__}, {expected}") from err
    if timesteps.ndim > 1 or timesteps.is_complex() or timesteps.is_meta or timesteps.dtype == torch.bool:
        raise InputError(f"timestep is {timesteps.dtype} of shape {list(timesteps.shape)} on {timesteps.device}, {expected}")
    return timesteps.to(torch.float32)


def is_dense(value: Tensor) -> bool:
    """Whether a tensor has one element for each index: it is neither sparse, nor nested, nor quantized by torch."""
    return value.layout == torch.strided and not value.is_nested and not value.is_quantized


def kind_of(value: Tensor) -> str:
    """What a tensor that is not dense is, as a phrase."""
    return "a nested tensor" if value.is_nested else f"a tensor of {value.dtype if value.is_quantized else value.layout}"
