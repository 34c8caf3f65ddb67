"""Share of an artifact's multiply-accumulates by how a backend executes them: in 4-bit integers, in 8-bit integers, in floating point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.network.layer_costs import site_work
from edm_deploy.network.meta_model import meta_inputs, meta_model
from edm_deploy.runtime.capabilities import BackendCapabilities, Execution, plan_layers

WORDS: dict[Execution, str] = {"int4": "INT4", "int8": "INT8", "weight-only": "weight-only", "float": "float"}


def layer_macs(artifact: Artifact) -> dict[str, int]:
    """Multiply-accumulates of every Conv2d and Linear for one sample, by layer name; attention's two products are not among them."""
    family = artifact.family_object
    model = meta_model(family, artifact.config, artifact.structure)
    macs: dict[str, int] = {}

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            macs[name] = macs.get(name, 0) + site_work(layer, inputs[0], output).macs

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count(name))
    with torch.no_grad():
        family.forward(model, meta_inputs(family, artifact.config))
    return macs


def work_shares(artifact: Artifact, target: BackendCapabilities) -> dict[Execution, float]:
    """Share, 0 to 1, of the multiply-accumulates of all Conv2d and Linear layers by their execution on a backend, the largest first.

    A layer whose codes do not all fit 4 bits, because of one 5-bit channel or one 8-bit row, is INT8 as a whole. Timesteps with other activations than
    the tables' are not considered.
    """
    plan, macs = plan_layers(artifact, target), layer_macs(artifact)
    shares: dict[Execution, float] = {}
    for name, count in macs.items():
        executed = plan[name].executed if name in plan else "float"
        shares[executed] = shares.get(executed, 0.0) + count / sum(macs.values())
    return dict(sorted(shares.items(), key=lambda entry: -entry[1]))


def share_words(shares: dict[Execution, float]) -> str:
    """For example `INT4 81.2 %, INT8 18.8 %`."""
    return ", ".join(f"{WORDS[executed]} {100 * share:.1f} %" for executed, share in shares.items())
