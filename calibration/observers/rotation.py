"""Choice of the linear layers whose input is rotated in blocks: all that can be, or those in which it lowers the error of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.data.trajectory_pool import Trajectories
from calibration.observers.observers import Observer
from calibration.recipe import Recipe
from calibration.student.fake_quant import fake_quantize
from calibration.student.module_outputs import input_hooks
from calibration.student.quantization_spec import LayerSpec
from calibration.student.teacher import Teacher, share_weights
from edm_deploy.errors import InputError
from edm_deploy.network.fold_rotations import attention_values, fold_rotations
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.restructure import NetworkRewrite, restructure
from edm_deploy.network.rotation import largest_block, rotate, rotate_weight
from edm_deploy.numerics.codes import dequantize_weight, quantize_weight
from edm_deploy.pipelines.guidance import Conditioner
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from edm_deploy.pipelines.source import Source

LEAST_BLOCK = 4  # smaller ones spread nothing
LEAST_FOLDED = 32  # the smallest block for which folding is preferred to a larger block that is rotated while running
STEPS, SAMPLES, POSITIONS = (
    4,
    4,
    256,
)  # of the observation for `auto`: sampling steps, samples, and positions of a layer's input in one batch
WORTH = 0.95  # the error with a rotation, relative to that without, up to which its cost is accepted


@dataclass
class Group:
    """Layers that are rotated together: those that read one tensor, or that read one attention's result.

    Attributes:
        blocks: Size of the blocks by layer.
        folded: Whether the rotation disappears in the layers before.
        errors: Sum of relative squared errors of the outputs, without and with rotation, as measured so far.
    """

    blocks: dict[str, int]
    folded: bool = False
    errors: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def improves(self) -> bool:
        """Whether the rotation lowers the error by more than it costs."""
        return self.errors[1] < self.errors[0] * (1 if self.folded else WORTH)


def rotate_inputs(
    source: Source, recipe: Recipe, structure: NetworkRewrite, conditioner: Conditioner, device: torch.device, folded: Iterable[str]
) -> tuple[Source, NetworkRewrite, str]:
    """Rotate layers' inputs as the recipe is set; rotations are folded into the layers before where that is exact.

    Args:
        source: The float model with `structure`. Its own model is not changed.
        recipe: Its settings `rotate` and `rotate_block` decide; `auto` also reads its bits, scales and ranges.
        structure: How the model was rewritten already.
        conditioner: Draws the conditioning of the samples that `auto` observes.
        device: Where `auto` runs the float model.
        folded: Layers that stay in floating point.

    Returns:
        The rotated source, its structure, and what was done, as a phrase; the phrase is empty where nothing was.

    Raises:
        InputError: No layer can be rotated, or `rotate_block` does not divide the input channels of one.
    """
    if recipe.rotate == "off":
        return source, structure, ""
    groups = rotatable(source, recipe, structure, folded)
    if recipe.rotate == "auto":
        measure(groups, source, recipe, conditioner, device)
    chosen = [group for group in groups if recipe.rotate == "all" or group.improves]
    rotated = {name: block for group in chosen for name, block in group.blocks.items()}
    model = share_weights(source.model, torch.device("cpu"))
    left = fold_rotations(model, rotated)
    restructure(model, NetworkRewrite(rotated=left))
    candidates = sum(len(group.blocks) for group in groups)
    done = f"{len(rotated)} of {candidates}, {len(rotated) - len(left)} of them folded"
    return replace(source, model=model), replace(structure, rotated=left), done


def rotatable(source: Source, recipe: Recipe, structure: NetworkRewrite, folded: Iterable[str]) -> list[Group]:
    """Groups of layers that can be rotated: linear ones of attention and feed-forward networks at the recipe's bits.

    The other linear layers read one row for a sample, or stay at 8 bits. A layer's block is `rotate_block`; where that is 0, the largest power of two up
    to 256 that divides its input channels, or those of a head if the rotation can then be folded and the block has 32 channels or more.

    Raises:
        InputError: As `rotate_inputs`.
    """
    family, without = source.family_object, set(folded)
    layers = {
        name: layer
        for name, layer in family.sites(source.model).items()
        if isinstance(layer, nn.Linear) and family.placement(name) == "quantize" and family.group(name) in ("attention", "feed_forward")
    }
    blocks = {name: recipe.rotate_block or largest_block(layer.in_features) for name, layer in layers.items() if name not in without}
    for name, block in blocks.items():
        if layers[name].in_features % block:
            fitting = min(largest_block(layer.in_features) for layer in layers.values())
            raise InputError(
                f"rotate_block is {block}, which does not divide the {layers[name].in_features} input channels of {name!r}. "
                f"Set rotate_block={fitting}, which divides those of every layer, or 0 for the largest of each layer."
            )
    groups: list[Group] = []
    for values in attention_values(source.model):
        block = recipe.rotate_block or largest_block(values.head)
        if set(values.read_by) <= set(blocks) and values.head % block == 0 and (recipe.rotate_block or block >= LEAST_FOLDED):
            groups.append(Group(dict.fromkeys(values.read_by, block), folded=True))
    apart = {name for group in groups for name in group.blocks}
    shared = model_work(family, source.config, structure).shared_input
    readers: dict[str, Group] = {}
    for name, block in blocks.items():
        if name not in apart and block >= (recipe.rotate_block or LEAST_BLOCK):
            readers.setdefault(shared.get(name, name), Group({})).blocks[name] = block
    groups += readers.values()
    if not groups:
        raise InputError(
            f"rotate is {recipe.rotate!r}, but {source.name} has no linear layer of attention or feed-forward at the recipe's bits whose input channels "
            f"a block of {recipe.rotate_block or LEAST_BLOCK} divides. Set rotate=off."
        )
    return groups


@torch.no_grad()
def measure(groups: list[Group], source: Source, recipe: Recipe, conditioner: Conditioner, device: torch.device) -> None:
    """Measure the error that quantization causes in the output of each layer, with and without rotation, on a few steps of the float model's trajectories.

    Args:
        groups: Receive the errors.
        source: The float model, not rotated.
        recipe: Its bits, weight scales and ranges are used.
        conditioner: Draws the conditioning.
        device: Where the model runs.
    """
    family, teacher = source.family_object, Teacher(source, device)
    timesteps = calibrated_timesteps(source.scheduler, STEPS, family.sigmas(STEPS))
    trajectories = Trajectories(source, timesteps, size=SAMPLES, eta=recipe.eta, seed=recipe.seed, device=device, conditioner=conditioner)
    generator = torch.Generator().manual_seed(recipe.seed)
    hooks = []
    for group in groups:
        for name, block in group.blocks.items():
            trial = _Trial(group, block, recipe, recipe.layer_spec(name, family.placement(name)), generator)
            hooks.append((teacher.model.get_submodule(name), trial))
    with input_hooks(hooks):
        for _, batches in trajectories.traverse_schedule(SAMPLES):
            for batch in batches:
                trajectories.advance(batch, batch.conditioning.combine(teacher(batch.inputs)))


class _Trial:
    """Forward pre-hook that adds a layer's errors, without and with rotation, to those of its group."""

    def __init__(self, group: Group, block: int, recipe: Recipe, spec: LayerSpec, generator: torch.Generator) -> None:
        self.group, self.recipe, self.spec, self.generator = group, recipe, spec, generator
        self.rewrites: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
            (lambda x: x, lambda weight: weight),
            (lambda x: rotate(x, block), lambda weight: rotate_weight(weight, block)),
        ]
        self.scales: list[Tensor] = []

    def __call__(self, layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
        x, weight = args[0].float().flatten(0, -2), layer.weight.float()
        x = x[torch.randint(len(x), (POSITIONS,), generator=self.generator).to(x.device)] if len(x) > POSITIONS else x
        exact = functional.linear(x, weight)
        self.scales = self.scales or [self.recipe.weight_scale(of_weight(weight), self.spec.weight_bits) for _, of_weight in self.rewrites]
        for index, (of_input, of_weight) in enumerate(self.rewrites):
            turned, scale = of_weight(weight), self.scales[index]
            rounded = dequantize_weight(quantize_weight(turned, scale, self.spec.weight_bits), scale)
            error = functional.linear(self._quantized(layer, of_input(x)), rounded) - exact
            self.group.errors[index] += float(error.square().sum() / exact.square().sum().clamp(min=1e-12))

    def _quantized(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if self.spec.act_bits is None:
            return x
        observer = Observer(self.generator)
        observer(layer, (x,))
        found = self.recipe.activation_range(observer.pop(), self.spec)
        ones = torch.ones(len(x), device=x.device)
        return fake_quantize(x, ones * found.scale, ones * found.qmin, self.spec.levels)
