"""Conversion of a calibrated or trained student to an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from calibration.student.student import Student
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.network.low_rank_branch import BRANCH, half_values
from edm_deploy.network.restructure import PRE_SCALE
from edm_deploy.pipelines.source import Source


def artifact_from_student(student: Student, source: Source, provenance: Mapping[str, Any]) -> Artifact:
    """The student as an artifact: low-rank updates merged, weights rounded, tables with integer bounds, branches in float16 values.

    Raises:
        ArtifactError: A value is not finite after training.
    """
    replaced = {f"{name}.weight" for name in student.layers}
    params = {name: value.detach().float().cpu() for name, value in source.model.state_dict().items() if name not in replaced}
    for name, branch in student.branches.items():
        params |= {f"{name}.{BRANCH}.{leaf}": half_values(value).cpu() for leaf, value in branch.state_dict().items()}
    sites = {}
    for name, layer in student.layers.items():
        codes, scale = layer.codes()
        sites[name] = QuantizedLayer(
            op="conv2d" if isinstance(layer.layer, nn.Conv2d) else "linear",
            codes=codes.cpu().contiguous(),
            weight_scale=scale.cpu(),
            weight_bits=layer.bits,
            channel_bits=None if layer.channel_bits is None else layer.channel_bits.detach().cpu(),
            activation=layer.quantizer.table() if layer.quantizer else None,
            relaxed_activation=layer.quantizer.relaxed.table() if layer.quantizer and layer.quantizer.relaxed else None,
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
        relaxed=student.relaxed,
    )
    artifact.validate()
    return artifact
