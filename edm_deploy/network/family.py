"""What a model family must tell us, so that nothing else in the project knows a model's name: one subclass a file in `models/`."""

from __future__ import annotations

import contextlib
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite, layer_of, restructure

Placement = Literal["quantize", "w8a8", "float"]
Config = Mapping[str, Any]  # a diffusers config: its values are whatever the JSON holds
InputDtype = Literal["float", "float32", "int64"]
LayerGroup = Literal["time_embedding", "skip", "feed_forward", "attention", "convolution", "other"]
LAYER_GROUPS: tuple[LayerGroup, ...] = get_args(LayerGroup)
# What diffusers calls the layers of each part, in every family; the first that is found in a site's name decides. The linears of an adaptive
# norm take the timestep's embedding alone.
GROUP_PATTERNS: tuple[tuple[LayerGroup, str], ...] = (
    ("time_embedding", r"time_emb|timestep_embedder|time_text_embed|add_embedding|class_embedding|adaln|norm\w*\.linear"),
    ("skip", r"conv_shortcut"),
    ("feed_forward", r"\bff(_context)?\.|proj_mlp|single_transformer_blocks\.\d+\.proj_out"),
    ("attention", r"\battn\d*\.|\battentions\."),
    ("convolution", r"conv|proj$"),
)


@dataclass(frozen=True)
class ModelInput:
    """One input of a denoiser's graph.

    Attributes:
        name: As in the diffusers forward signature.
        kind: `float` follows the graph's dtype; the others are fixed.
        dims: A number where the size is fixed, a name where it is dynamic; `batch` comes first, always.
    """

    name: str
    kind: InputDtype
    dims: tuple[str | int, ...]

    def dtype(self, float_dtype: torch.dtype) -> torch.dtype:
        """The torch dtype of this input in a graph whose floating-point type is `float_dtype`."""
        return {"float": float_dtype, "float32": torch.float32, "int64": torch.int64}[self.kind]


@dataclass(frozen=True)
class PlacementRule:
    """Sites of one fate.

    Attributes:
        pattern: Regular expression that is searched in a site's name.
        placement: What becomes of the sites that match.
        reason: Why, as a phrase.
    """

    pattern: str
    placement: Placement
    reason: str


@dataclass(frozen=True)
class Guidance:
    """How a model is steered towards its conditioning.

    Attributes:
        kind: `classifier-free` runs it with and without the conditioning; `embedded` feeds it the scale.
        scale: The one that its samples are usually drawn with; 1 is off.
    """

    kind: Literal["none", "classifier-free", "embedded"]
    scale: float = 1.0


SAMPLE = "sample"
TIMESTEP = ModelInput("timestep", "float32", ("batch",))
QUANTIZED = PlacementRule("", "quantize", "the recipe's bits")


class Family(ABC):
    """One architecture of diffusers. Stateless: the config comes with each call.

    Attributes:
        class_name: The diffusers class, as `_class_name` in its config.json.
        component: The denoiser's name in a pipeline, `unet` or `transformer`.
        rules: Which sites are not simply quantized, and why; the first that matches decides.
        text_inputs: Inputs that come from a prompt.
        flow: Whether it was trained by flow matching: its timesteps reach the schedule's length itself, sigma 1.
    """

    class_name: ClassVar[str]
    component: ClassVar[str] = "unet"
    rules: ClassVar[tuple[PlacementRule, ...]] = ()
    text_inputs: ClassVar[tuple[str, ...]] = ()
    flow: ClassVar[bool] = False

    @abstractmethod
    def build(self, config: Config) -> nn.Module:
        """The float model of this config with random weights, on the default device (`with torch.device("meta")` costs nothing).

        Raises:
            UnsupportedError: This config asks for something that the family cannot quantize; the message says what.
        """

    @abstractmethod
    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        """The graph's inputs in order; the first is `sample`, the second `timestep`."""

    @abstractmethod
    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output of `model`, [B, ...], for inputs named as in `inputs`: what the graph gives, and what a pipeline gets."""

    @abstractmethod
    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the diffusers model's own `forward`, as graph inputs by name.

        Raises:
            UnsupportedError: An argument that the graph does not carry is not None.
        """

    @abstractmethod
    def output(self, sample: Tensor) -> Any:  # each diffusers model has an output class of its own
        """The diffusers output object around the graph's output."""

    @abstractmethod
    def size_multiple(self, config: Config) -> int:
        """Height and width must be multiples of this many pixels."""

    def full_config(self, config: Config) -> dict[str, Any]:
        """`config` with the model class's defaults for the keys that it lacks, as JSON holds it."""
        return dict(config)

    def sample_size(self, config: Config) -> tuple[int, int]:
        """Height and width of a sample at the model's own size, in pixels or latents.

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
        """Shape of the input `sample` at the model's own size, without the batch dimension: [channels, height, width] by default."""
        return int(config["in_channels"]), *self.sample_size(config)

    def latent_shape(self, config: Config) -> tuple[int, ...]:
        """Shape of what a scheduler walks from noise, without its batch: `sample_shape`, unless conditioning stands in further channels."""
        return self.sample_shape(config)

    def sizes(self, config: Config) -> dict[str, int]:
        """The usual size of each dynamic dimension but `batch`."""
        dims = self.inputs(config)[0].dims[1:]
        return {dim: size for dim, size in zip(dims, self.sample_shape(config), strict=True) if isinstance(dim, str)}

    def limits(self, config: Config) -> dict[str, int]:
        """The largest size of each dynamic dimension that the model itself bounds."""
        return {}

    def prediction(self, config: Config, output: Tensor) -> Tensor:
        """What a scheduler consumes of an output: all of it, unless the model has learned a variance beside."""
        return output

    def latents(self, config: Config, sample: Tensor) -> Tensor:
        """A finished sample as [B, C, H, W], which is what a VAE decodes."""
        return sample

    def embedded_timesteps(self, config: Config) -> int | None:
        """Number of timesteps in the model's embedding table; None where the embedding is a function of any timestep."""
        return None

    def classes(self, config: Config) -> int | None:
        """Number of labels that the model takes as an index, the one for none not counted; None where it takes no index."""
        return None

    def sigmas(self, steps: int) -> tuple[float, ...] | None:
        """The noise levels, descending, that its pipeline gives the scheduler for so many steps of a flow; None leaves them to the scheduler."""
        return None

    def rule(self, site: str) -> PlacementRule:
        """What becomes of the Conv2d or Linear of this name, and why."""
        return next((rule for rule in self.rules if re.search(rule.pattern, layer_of(site))), QUANTIZED)

    def placement(self, site: str) -> Placement:
        """What becomes of the Conv2d or Linear of this name: `quantize`, `w8a8` (W8A8 symmetric) or `float`."""
        return self.rule(site).placement

    def group(self, site: str) -> LayerGroup:
        """Which part of the model a site belongs to, for recipes that treat parts differently."""
        return next((group for group, pattern in GROUP_PATTERNS if re.search(pattern, layer_of(site))), "other")

    def time_only(self, config: Config) -> str | None:
        """Regular expression of the layers that see nothing but the timestep, so that what they compute can be a table; None where there are none."""
        return None

    def other_embedding_inputs(self, config: Config) -> str | None:
        """What else enters the embedding that shapes every block, as a phrase; None where it is the timestep alone."""
        return None

    def time_layers(self, model: nn.Module, config: Config) -> tuple[str, ...]:
        """Names of the sites that `time_only` matches, in the model's order."""
        pattern = self.time_only(config)
        return tuple(name for name in self.sites(model) if pattern and re.search(pattern, layer_of(name)))

    def guidance(self, config: Config) -> Guidance:
        """How its samples are usually drawn."""
        return Guidance("none")

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Conditioning of `batch` samples drawn without data, one tensor for each input beyond sample and timestep."""
        return {}

    def extra_channels(self, config: Config, batch: int, generator: torch.Generator) -> Tensor | None:
        """The further channels of the input `sample`, [B, ...], drawn without data; None where there are none."""
        return None

    def unconditional(self, config: Config, generator: torch.Generator) -> dict[str, Tensor]:
        """What stands for no conditioning, [1, ...] by name: of `random_conditioning` the inputs that classifier-free guidance takes away."""
        return {}

    def encode_prompts(self, config: Config, pipeline: Any, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What prompts become by a pipeline's own text encoders.

        Args:
            config: Of the model.
            pipeline: A diffusers pipeline that holds its text encoders and tokenizers, and perhaps nothing else.
            prompts: One or more.

        Returns:
            `text_inputs` by name, [P, ...]; and what stands for no prompt, [1, ...].
        """
        raise UnsupportedError(f"{self.class_name} takes no prompts.")

    def attributes(self, config: Config) -> dict[str, Any]:  # whatever a pipeline reads
        """Further attributes of the diffusers model that its pipelines read, by name."""
        return {}

    def freeze_config(self, config: Config) -> Any:  # diffusers' FrozenDict: attribute access, as pipelines expect
        """`config` as the mapping with attributes that diffusers pipelines read."""
        return dict(config)

    def sites(self, model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
        """Every layer that gets quantized, by its name in the model; the order is the model's own."""
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        for name, layer in layers.items():
            if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
                raise UnsupportedError(f"Site {name!r} pads with {layer.padding_mode!r}; integer convolutions pad with zeros only.")
        return {name: layer for name, layer in layers.items() if self.placement(name) != "float"}


MAX_PARAMETERS = 6000  # parameter tensors of a model; SDXL has 1680, FLUX.1 780


def meta_model(family: Family, config: Config, structure: NetworkRewrite = PUBLISHED) -> nn.Module:
    """The float model on the meta device: names and shapes, no memory.

    Raises:
        UnsupportedError: The family cannot carry the config.
        ArtifactError: The structure names what the model has not, or the model has more than MAX_PARAMETERS parameter tensors.
    """
    with torch.device("meta"), _limited_parameters(family.class_name):
        model = family.build(config).eval().requires_grad_(False)
        restructure(model, structure)
    return model


@contextlib.contextmanager
def _limited_parameters(class_name: str) -> Iterator[None]:
    """Stop the construction of a model that has too many layers before it takes minutes. Other threads' models are not counted."""
    thread, count = threading.get_ident(), 0

    def limit(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > MAX_PARAMETERS:
            raise ArtifactError(
                f"This config describes a {class_name} of more than {MAX_PARAMETERS} parameter tensors, more than any published model has. "
                "Check the numbers of layers in the config."
            )

    handle = register_module_parameter_registration_hook(limit)
    try:
        yield
    finally:
        handle.remove()
