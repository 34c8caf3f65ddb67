"""A student that starts where an artifact ends: its codes, tables, biases, structure and bits, with the source's float weights behind the codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.student.layers import ActivationQuantizer, StudentLayer
from calibration.student.quantization_spec import LayerSpec
from calibration.student.student import Student
from calibration.student.teacher import Teacher, share_weights
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.errors import InputError
from edm_deploy.network.low_rank_branch import BRANCH, in_branch
from edm_deploy.network.restructure import PRE_SCALE, NetworkRewrite, rotated_weight, weight_to_hold
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import dequantize_weight
from edm_deploy.pipelines.source import Source


def structure_of(artifact: Artifact) -> NetworkRewrite:
    """The rewrite that a student's source needs: that of the artifact without pre-scales, which are set on the student."""
    return replace(artifact.structure, pre_scaled=())


def with_params(source: Source, artifact: Artifact) -> Source:
    """The source with the artifact's biases, norms and other float parameters, without branches.

    The source itself is not changed, and shares all equal tensors with the result.

    Args:
        source: Restructured by `structure_of(artifact)`.
        artifact: Of the same float model.
    """
    model = share_weights(source.model, torch.device("cpu"))
    for name, value in artifact.params.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == PRE_SCALE or in_branch(owner):
            continue  # set on the student
        module = model.get_submodule(owner)
        if leaf not in module._parameters:
            module.register_buffer(leaf, value.clone())
        elif not torch.equal(module.get_parameter(leaf).float(), value):
            setattr(module, leaf, nn.Parameter(value.clone(), requires_grad=False))
    return replace(source, model=model)


@torch.no_grad()
def student_from_artifact(artifact: Artifact, source: Source, device: torch.device, *, teacher: Teacher | None = None) -> Student:
    """The student whose artifact is `artifact`, up to the last bit of its scales: codes and bounds are equal.

    The float weight behind a code, from which training continues, is the source's where it rounds to this code, and the dequantized code elsewhere: what
    AdaRound, GPTQ or a merged update decided stays.

    Args:
        artifact: Of the same float model.
        source: As `with_params` returns it.
        device: Device of the student.
        teacher: As in `Student`; None, because its parameters are not the artifact's.

    Raises:
        InputError: A layer or a table that a student cannot represent; the message names the layer.
    """
    specs = {name: spec_of(name, site) for name, site in artifact.sites.items()}
    if missing := sorted(set(source.family_object.sites(source.model)) - set(specs) - set(artifact.folded)):
        raise InputError(
            f"The artifact keeps {missing[0]!r} in floating point, which no recipe trains further. Start from the float model: leave --from out."
        )

    student = Student(
        source,
        lambda name, placement: specs[name],
        lambda weight, bits: torch.ones(len(weight), device=weight.device),
        artifact.timesteps,
        device,
        teacher=teacher,
        folded=artifact.folded,
        structure=structure_of(artifact),
    )
    student.row_of_timestep = artifact.row_of_timestep
    if artifact.relaxed is not None and artifact.relaxed_bits is not None:
        student.relax(artifact.relaxed, artifact.relaxed_bits)
    for name, branch in student.branches.items():
        branch.load_state_dict({leaf: artifact.params[f"{name}.{BRANCH}.{leaf}"].to(device) for leaf in branch.state_dict()})
    for name, layer in student.layers.items():
        if (own := student.branch_of(name)) is not None:  # the branch has this part of the float weight
            weight = layer.layer.weight
            rest = weight.float() - rotated_weight(layer.layer, own.product().reshape(weight.shape))
            layer.layer.weight = nn.Parameter(rest, requires_grad=False)
    loaded: dict[int, ActivationTable] = {}
    for name, site in artifact.sites.items():
        layer = student.layers[name]
        if layer.quantizer is not None and site.activation is not None:
            table = loaded.setdefault(id(layer.quantizer), site.activation)
            if not table.equals(site.activation):
                raise InputError(
                    f"Site {name!r} quantizes a tensor by another table than the site that it shares it with; a student has one for both. "
                    "Start from the float model: leave --from out."
                )
            load_table(layer.quantizer, site.activation)
            if layer.quantizer.relaxed is not None and site.relaxed_activation is not None:
                load_table(layer.quantizer.relaxed, site.relaxed_activation)
        load_weight(layer, site, artifact.params.get(f"{name}.{PRE_SCALE}"))
    return student


def spec_of(name: str, site: QuantizedLayer) -> LayerSpec:
    """Bits and symmetry of a site; InputError, with its name, where its bounds are neither those of a symmetric nor of an asymmetric range."""
    table = site.activation
    if table is None:
        return LayerSpec(site.weight_bits, None, True)
    for symmetric in (True, False) if table.bits == 8 else (False, True):
        spec = LayerSpec(site.weight_bits, table.bits, symmetric)
        spans = bool((table.qmax.int() - table.qmin.int() == spec.levels).all())
        if spans and (spec.fixed_qmin is None or bool((table.qmin == spec.fixed_qmin).all())):
            return spec
    raise InputError(
        f"Site {name!r} has bounds from {int(table.qmin.min())} to {int(table.qmax.max())}, which are no full range of {table.bits} bits. "
        "Start from the float model: leave --from out."
    )


@torch.no_grad()
def load_table(quantizer: ActivationQuantizer, table: ActivationTable) -> None:
    """Set all rows of a quantizer."""
    quantizer.log_scale.copy_(table.scale.log())
    quantizer.qmin.copy_(table.qmin.float())


@torch.no_grad()
def load_weight(layer: StudentLayer, site: QuantizedLayer, pre_scale: Tensor | None) -> None:
    """Set bits, pre-scale and scales of a layer, and its float weight such that it rounds to the site's codes."""
    if site.channel_bits is not None:
        layer.set_channel_bits(site.channel_bits)
    if pre_scale is not None:
        layer.set_pre_scale(pre_scale)
    layer.set_weight_scale(site.weight_scale.to(layer.log_weight_scale.device))
    codes = site.codes.to(layer.layer.weight.device)
    nearest, scale = layer.codes()
    if torch.equal(nearest, codes):
        return
    decided = weight_to_hold(layer.layer, dequantize_weight(codes, scale))
    weight = torch.where(nearest == codes, layer.layer.weight.float(), decided)
    layer.layer.weight = nn.Parameter(torch.empty_like(layer.layer.weight, dtype=torch.float32).copy_(weight), requires_grad=False)
