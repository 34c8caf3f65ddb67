"""What a model would become, before anything is run: groups of its layers, plans, and sizes of artifact and engines. Estimates, and called so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from edm_deploy.artifact.quantized_layer import Op, QuantizedLayer
from edm_deploy.network.family import LAYER_GROUPS, Family, Placement
from edm_deploy.network.layer_costs import ModelWork, SiteWork
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS, symmetric_bounds, weight_bounds
from edm_deploy.runtime.capabilities import BackendCapabilities, SitePlan, check_scheme, site_plan
from edm_deploy_tools.common.console import Row

Layers = Mapping[str, nn.Conv2d | nn.Linear]
ROWS = 100  # of a table, as recipes have by default
FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Scheme:
    """Bits of a model's sites.

    Attributes:
        weight_bits, act_bits: Of the sites that are quantized; those that the family keeps are W8A8.
    """

    weight_bits: int
    act_bits: int

    @property
    def name(self) -> str:
        """`W4A8`."""
        return f"W{self.weight_bits}A{self.act_bits}"

    def of(self, placement: Placement) -> Scheme:
        """What a site of this placement is stored as."""
        if placement != "w8a8":
            return self
        return Scheme(8, 8 if self.act_bits != WEIGHT_ONLY_BITS else self.act_bits)


SCHEMES = (Scheme(4, 4), Scheme(4, 8), Scheme(8, 8))  # what people ask for


def stand_in(op: Op, scheme: Scheme) -> QuantizedLayer:
    """A site of this scheme with nothing in it but the ends of its ranges: what decides how a target computes it."""
    table = None
    if scheme.act_bits != WEIGHT_ONLY_BITS:
        qmin, qmax = symmetric_bounds(scheme.act_bits)
        bounds = {"qmin": torch.tensor([qmin], dtype=torch.int8), "qmax": torch.tensor([qmax], dtype=torch.int8)}
        table = ActivationTable(bits=scheme.act_bits, scale=torch.ones(1), **bounds)
    codes = torch.tensor(weight_bounds(scheme.weight_bits), dtype=torch.int8)
    return QuantizedLayer(op=op, codes=codes, weight_scale=torch.ones(1), weight_bits=scheme.weight_bits, activation=table)


def planned(family: Family, layers: Layers, scheme: Scheme, target: BackendCapabilities) -> dict[str, SitePlan]:
    """What each site would become on a target.

    Args:
        family: Says which sites keep 8 bits.
        layers: Of `Family.sites`; the meta device will do.
        scheme: Bits.
        target: Where.

    Raises:
        UnsupportedError: The target cannot carry the scheme.
    """
    check_scheme(target, scheme.weight_bits, scheme.act_bits)
    plans = {}
    for name, layer in layers.items():
        op: Op = "conv2d" if isinstance(layer, nn.Conv2d) else "linear"
        plans[name] = site_plan(stand_in(op, scheme.of(family.placement(name))), layer, target)
    return plans


def artifact_bytes(family: Family, work: ModelWork, scheme: Scheme, *, rest_bytes: int = 4, rows: int = ROWS) -> int:
    """Size of the tensors of an artifact.

    Args:
        family: Says which sites keep 8 bits.
        work: Of the model.
        scheme: Bits.
        rest_bytes: Of a parameter that is no quantized weight: 2 where float16 loses nothing of it, else 4.
        rows: Of the activation tables.
    """
    total = rest_bytes * (work.parameters - sum(site.weights for site in work.sites.values()))
    for name, site in work.sites.items():
        stored = scheme.of(family.placement(name))
        table = 0 if stored.act_bits == WEIGHT_ONLY_BITS else rows * (4 + 1 + 1)  # scale, qmin, qmax
        total += _code_bytes(site.weights, packed=stored.weight_bits <= 4) + 4 * site.outputs + table
    return total


def engine_bytes(family: Family, work: ModelWork, scheme: Scheme, target: BackendCapabilities, plans: Mapping[str, SitePlan]) -> int:
    """Size of the constants of an engine: codes as the target reads them, the rest in its first floating-point type."""
    total = FLOAT_BYTES[target.float_dtypes[0]] * (work.parameters - sum(site.weights for site in work.sites.values()))
    for name, site in work.sites.items():
        packed = scheme.of(family.placement(name)).weight_bits <= 4 and (target.int4_storage or plans[name].executed == "int4")
        total += _code_bytes(site.weights, packed=packed) + 4 * site.outputs
    return total


def shares(family: Family, work: ModelWork) -> list[Row]:
    """Layers, weights and multiply-accumulates by group, and what is computed outside the layers."""
    weights, macs = sum(site.weights for site in work.sites.values()), work.macs
    rows: list[Row] = []
    for group in LAYER_GROUPS:
        members = [site for name, site in work.sites.items() if family.group(name) == group]
        if members:
            rows.append(
                {
                    "group": group,
                    "sites": len(members),
                    "weights %": round(100 * sum(site.weights for site in members) / weights, 2),
                    "MACs %": round(100 * sum(site.macs for site in members) / macs, 2),
                }
            )
    if work.other_macs:
        rows.append({"group": "attention's own matmuls", "sites": 0, "weights %": 0.0, "MACs %": round(100 * work.other_macs / macs, 2)})
    return rows


def by_site(sites: Mapping[str, SiteWork]) -> dict[str, float]:
    """Share of each site in the multiply-accumulates of all sites, in percent."""
    total = sum(site.macs for site in sites.values())
    return {name: round(100 * site.macs / total, 2) for name, site in sites.items()}


def _code_bytes(codes: int, *, packed: bool) -> int:
    return (codes + 1) // 2 if packed else codes
