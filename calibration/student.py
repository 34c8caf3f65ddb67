"""Teacher and student: the float model that leads, the quantized copy that learns, and the artifact that the copy becomes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calibration.layers import ActivationQuantizer, StudentLayer
from calibration.recipe import Recipe, SiteSpec
from calibration.threads import each_in_a_thread
from edm_deploy.activations import nearest_rows, rows_of
from edm_deploy.artifact import Artifact
from edm_deploy.family import SAMPLE, skeleton
from edm_deploy.pipelines import Source
from edm_deploy.site import Site
from edm_deploy.structure import PRE_SCALE, PUBLISHED, Structure, restructure
from edm_deploy.weights import cast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Teacher(nn.Module):
    """The float model: graph inputs by name in, float32 prediction out, without gradients.

    Args:
        source: Its model is not changed; its tensors are shared where they lie on `device` already.
        device: Where the teacher lives.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        super().__init__()
        self.family, self.config = source.family_object, source.config
        self.model = _sharing(source.model, device)
        self.dtype = torch.float32

    def lead_in(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from now on; in float32 the weights stay those of the source."""
        self.dtype = dtype
        if dtype != torch.float32:
            cast(self.model, dtype)

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Prediction, float32 [B, ...]; `timestep` stays float32, which holds what bfloat16 would round."""
        return self.family.prediction(self.config, self.family.forward(self.model, _cast(inputs, self.dtype))).float()


class Student(nn.Module):
    """The quantized copy: graph inputs by name in, prediction out; rows follow each sample's timestep.

    Args:
        source: Its model is not changed.
        recipe: Says what becomes of each site.
        timesteps: int32 [R] ascending, one a table row.
        device: Where the student lives.
        folded: Sites that stay in floating point, because exporters make a table of what they compute.
        segments: Layers of the source's model that are cut already, as `Structure` has them.
        teacher: Its float weights on `device` are the student's too; None shares those of the source.

    Attributes:
        layers: Every quantized layer by site name.
        quantizers: Every activation quantizer by the name of the first site that it serves.
        leaders: For each site the first one that is fed the very same tensor.
        relaxed_rows: bool [R], rows at which activations stay in floating point; None where there are none.
        shared_row: int32 [R], for each row the one that stands for it; None where each stands for itself.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        timesteps: Tensor,
        device: torch.device,
        *,
        teacher: Teacher | None = None,
        folded: tuple[str, ...] = (),
        segments: Mapping[str, tuple[int, ...]] = PUBLISHED.segments,
    ) -> None:
        super().__init__()
        self.family, self.config = source.family_object, source.config
        self.model = _sharing(teacher.model if teacher else source.model, device)
        self.timesteps = timesteps
        self.row_of_timestep = nearest_rows(timesteps, source.num_train_timesteps)
        self.compute_dtype = torch.float32
        self.folded = folded
        self.relaxed_rows: Tensor | None = None
        self.shared_row: nn.Parameter | None = None  # a parameter, so that checkpoints hold it
        self.segments = segments
        sites = {name: layer for name, layer in self.family.sites(self.model).items() if name not in folded}
        # On the meta device: who is fed what follows from the graph, and nothing is computed.
        outline = skeleton(self.family, source.config, Structure(segments))
        inputs = example_inputs(source, torch.device("meta"))
        self.leaders = leaders = sites_by_input(outline, self.family.forward, inputs, self.family.sites(outline))
        specs = {name: recipe.specs(name, self.family.placement(name)) for name in sites}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.layers: dict[str, StudentLayer] = {}
        for name, layer in sites.items():
            quantizer = self._quantizer(leaders[name], specs[name], specs[leaders[name]], name).to(device) if specs[name].act_bits else None
            self.layers[name] = StudentLayer(layer, specs[name], quantizer).to(device)
            _replace(self.model, name, self.layers[name])
        scales = each_in_a_thread(lambda name: recipe.weight_scale(self.layers[name].layer.weight, specs[name].weight_bits), sites)
        for name, scale in zip(sites, scales, strict=True):
            self.layers[name].set_weight_scale(scale)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Prediction, [B, ...] in the compute dtype."""
        with self.at_rows(rows_of(self.row_of_timestep, inputs["timestep"]), inputs[SAMPLE].device):
            return self.family.prediction(self.config, self.family.forward(self.model, inputs))

    @contextmanager
    def at_rows(self, rows: Tensor, device: torch.device) -> Iterator[None]:
        """Within it the layers quantize by these table rows, int64 [B], and compute in the student's dtype: for whoever runs a part of the model."""
        relaxed = None if self.relaxed_rows is None else self.relaxed_rows.to(rows.device)[rows]
        shared = rows if self.shared_row is None else self.shared_row.to(rows.device)[rows].long()
        for quantizer in self.quantizers.values():
            quantizer.current, quantizer.relaxed = shared, relaxed if relaxed is not None and bool(relaxed.any()) else None
        try:
            with torch.autocast(device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
                yield
        finally:
            for quantizer in self.quantizers.values():
                quantizer.forget()

    def siblings(self, name: str) -> tuple[str, ...]:
        """The layers that are fed the very same tensor as `name`, itself among them, in the model's order."""
        return tuple(other for other in self.layers if self.leaders[other] == self.leaders[name])

    def set_pre_scale(self, name: str, scale: Tensor | None) -> None:
        """Scale the input of `name`, and of its siblings, channel by channel: float32 [Cin], each > 0; None takes an earlier one away.

        The function stays what it was: weights are divided by what inputs are multiplied by. Weight scales and tables are the caller's to set anew.
        """
        for sibling in self.siblings(name):
            self.layers[sibling].set_pre_scale(scale)

    def make_room(self, names: Iterable[str]) -> None:
        """Give layers the pre-scales and channel bits that a state of these parameter names holds, for it to be loaded."""
        held = set(names)
        for name, layer in self.layers.items():
            if f"model.{name}.layer.{PRE_SCALE}" in held and layer.pre_scale is None:
                layer.set_pre_scale(torch.ones(layer.layer.weight.shape[1]))
            if f"model.{name}.channel_bits" in held and layer.channel_bits is None:
                layer.set_channel_bits(torch.full_like(layer.log_weight_scale, layer.bits))

    @property
    def structure(self) -> Structure:
        """What the student's network computes otherwise than the published one."""
        scaled = tuple(name for name, layer in self.layers.items() if layer.pre_scale is not None)
        return Structure(self.segments, scaled)

    def learnable(self) -> dict[str, nn.Parameter]:
        """Every parameter that calibration or training sets, by name, each once."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def learnable_or_fixed(self) -> dict[str, nn.Parameter]:
        """What `learnable` gives before a rate of 0 fixes some of it: all that a checkpoint must hold."""
        kept = {id(layer.layer.weight) for layer in self.layers.values()}
        own = {id(parameter) for layer in self.layers.values() for parameter in layer.parameters()} - kept | {id(self.shared_row)}
        return {name: value for name, value in self.named_parameters() if id(value) in own}

    def _quantizer(self, leader: str, spec: SiteSpec, leading_spec: SiteSpec, name: str) -> ActivationQuantizer:
        key = leader if (spec.act_bits, spec.symmetric) == (leading_spec.act_bits, leading_spec.symmetric) else name
        if key not in self.quantizers:
            self.quantizers[key] = ActivationQuantizer(spec, len(self.timesteps))
        return self.quantizers[key]


def restructured(source: Source, structure: Structure) -> Source:
    """The source with its layers cut into segments; its own model is left as it is, and shares every other tensor."""
    if not structure:
        return source
    model = _sharing(source.model, torch.device("cpu"))
    restructure(model, structure)
    return replace(source, model=model)


def sites_by_input(model: nn.Module, forward: Any, inputs: Mapping[str, Tensor], sites: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each site the first site that is fed the very same tensor (itself, for most), so that an exporter can share one quantization.

    Args:
        model: The float model.
        forward: The family's forward.
        inputs: Graph inputs by name; one forward is run on them.
        sites: Layers by name.
    """
    seen: list[tuple[Tensor, str]] = []  # holds the tensors, so that no address is used twice
    leaders = {name: name for name in sites}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            leaders[name] = next((leader for x, leader in seen if x is args[0]), name)
            seen.append((args[0], leaders[name]))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in sites.items()]
    try:
        with torch.no_grad():
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return leaders


def example_inputs(source: Source, device: torch.device) -> dict[str, Tensor]:
    """Graph inputs of one sample, by name: noise in the middle of the schedule."""
    generator = torch.Generator().manual_seed(0)
    family = source.family_object
    sample = torch.randn(1, *family.sample_shape(source.config), generator=generator)
    inputs = {SAMPLE: sample, "timestep": torch.tensor([float(source.num_train_timesteps // 2)])}
    inputs |= family.random_conditioning(source.config, 1, generator)
    return {name: value.to(device) for name, value in inputs.items()}


def artifact_from_student(student: Student, source: Source, provenance: Mapping[str, Any]) -> Artifact:
    """The student as an artifact: updates merged, weights rounded, tables as integers.

    Raises:
        ArtifactError: Training left a value that is not finite.
    """
    replaced = {f"{name}.weight" for name in student.layers}
    params = {name: value.detach().float().cpu() for name, value in source.model.state_dict().items() if name not in replaced}
    sites = {}
    for name, layer in student.layers.items():
        codes, scale = layer.codes()
        sites[name] = Site(
            op="conv2d" if isinstance(layer.layer, nn.Conv2d) else "linear",
            codes=codes.cpu().contiguous(),
            weight_scale=scale.cpu(),
            weight_bits=layer.bits,
            channel_bits=None if layer.channel_bits is None else layer.channel_bits.detach().cpu(),
            activation=layer.quantizer.table() if layer.quantizer else None,
        )
        for leaf in ("bias", PRE_SCALE):
            if (value := getattr(layer.layer, leaf, None)) is not None:
                params[f"{name}.{leaf}"] = value.detach().float().cpu()
    artifact = Artifact(
        family=source.family,
        config=source.config,
        timesteps=student.timesteps,
        row_of_timestep=student.row_of_timestep,
        sites=sites,
        params=params,
        provenance=dict(provenance),
        pipeline=source.pipeline,
        structure=student.structure,
        folded=student.folded,
    )
    artifact.validate()
    return artifact


def _sharing(model: nn.Module, device: torch.device) -> nn.Module:
    """Another tree of modules on the same tensors, so that replacing a layer or a parameter in one leaves the other as it is."""
    memo: dict[int, Any] = {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in model.parameters()}
    memo |= {id(value): value for value in model.buffers()}
    shared: nn.Module = copy.deepcopy(model, memo).to(device).eval()
    # channels_last: the layout that bfloat16 convolutions are fast in, on CPUs and GPUs alike. No copy where the weights have it already.
    for parameter in shared.parameters():
        if parameter.ndim == 4 and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return shared


def _cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() and name != "timestep" else value for name, value in inputs.items()}


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
