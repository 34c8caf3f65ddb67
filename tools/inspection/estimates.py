"""Estimates from a model's config: work by layer group, plans of the backends, sizes of artifacts and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from edm_deploy.artifact.quantized_layer import Op, QuantizedLayer
from edm_deploy.network.family import Family
from edm_deploy.network.layer_costs import ModelWork, SiteWork
from edm_deploy.network.low_rank_branch import BASE, BRANCH
from edm_deploy.network.placement import LAYER_GROUPS, Placement
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS, symmetric_bounds, weight_bounds
from edm_deploy.runtime.capabilities import BackendCapabilities, SitePlan, check_scheme, site_plan
from edm_deploy_tools.common.console import Row

Layers = Mapping[str, nn.Conv2d | nn.Linear]
ROWS = 100  # of the activation tables, the default of most recipes
FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Scheme:
    """Bits of weights and activations.

    Attributes:
        weight_bits, act_bits: Bits of the quantized sites; sites that the family keeps at 8 bits are W8A8.
    """

    weight_bits: int
    act_bits: int

    @property
    def name(self) -> str:
        """For example `W4A8`."""
        return f"W{self.weight_bits}A{self.act_bits}"

    def of(self, placement: Placement) -> Scheme:
        """The scheme in which a site of this placement is stored."""
        if placement != "w8a8":
            return self
        return Scheme(8, 8 if self.act_bits != WEIGHT_ONLY_BITS else self.act_bits)


SCHEMES = (Scheme(4, 4), Scheme(4, 8), Scheme(8, 8))  # that are in use


def stand_in(op: Op, scheme: Scheme) -> QuantizedLayer:
    """A layer of this scheme with only the bounds of its ranges, which determine how a backend computes it."""
    table = None
    if scheme.act_bits != WEIGHT_ONLY_BITS:
        qmin, qmax = symmetric_bounds(scheme.act_bits)
        bounds = {"qmin": torch.tensor([qmin], dtype=torch.int8), "qmax": torch.tensor([qmax], dtype=torch.int8)}
        table = ActivationTable(bits=scheme.act_bits, scale=torch.ones(1), **bounds)
    codes = torch.tensor(weight_bounds(scheme.weight_bits), dtype=torch.int8)
    return QuantizedLayer(op=op, codes=codes, weight_scale=torch.ones(1), weight_bits=scheme.weight_bits, activation=table)


def planned(family: Family, layers: Layers, scheme: Scheme, target: BackendCapabilities) -> dict[str, SitePlan]:
    """Plan of each site on a backend.

    Args:
        family: Determines which sites stay at 8 bits.
        layers: As from `Family.sites`; they may be on the meta device.
        scheme: Bits of the quantized sites.
        target: Capabilities of the backend.

    Raises:
        UnsupportedError: The backend does not support the scheme.
    """
    check_scheme(target, scheme.weight_bits, scheme.act_bits)
    plans = {}
    for name, layer in layers.items():
        op: Op = "conv2d" if isinstance(layer, nn.Conv2d) else "linear"
        plans[name] = site_plan(stand_in(op, scheme.of(family.placement(name))), layer, target)
    return plans


def artifact_bytes(family: Family, work: ModelWork, scheme: Scheme, *, rest_bytes: int = 4, rows: int = ROWS) -> int:
    """Size of the tensors of an artifact in bytes.

    Args:
        family: Determines which sites stay at 8 bits.
        work: Work of the model.
        scheme: Bits of the quantized sites.
        rest_bytes: Bytes of a parameter that is no quantized weight: 2 if it is exact in float16, else 4.
        rows: Rows of the activation tables.
    """
    total = rest_bytes * (work.parameters - sum(site.weights for site in work.sites.values()))
    for name, site in work.sites.items():
        stored = scheme.of(family.placement(name))
        table = 0 if stored.act_bits == WEIGHT_ONLY_BITS else rows * (4 + 1 + 1)  # scale, qmin, qmax
        total += _code_bytes(site.weights, packed=stored.weight_bits <= 4) + 4 * site.outputs + table
    return total


def engine_bytes(family: Family, work: ModelWork, scheme: Scheme, target: BackendCapabilities, plans: Mapping[str, SitePlan]) -> int:
    """Size of the constants of an engine in bytes: codes as the backend reads them, the rest in its first floating-point type."""
    total = FLOAT_BYTES[target.float_dtypes[0]] * (work.parameters - sum(site.weights for site in work.sites.values()))
    for name, site in work.sites.items():
        packed = scheme.of(family.placement(name)).weight_bits <= 4 and (target.int4_storage or plans[name].codes in ("s4", "u4"))
        total += _code_bytes(site.weights, packed=packed) + 4 * site.outputs
    return total


def shares(family: Family, work: ModelWork) -> list[Row]:
    """Layers, weights and multiply-accumulates by layer group, and multiply-accumulates outside the layers."""
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
        rows.append({"group": "matmuls of attention", "sites": 0, "weights %": 0.0, "MACs %": round(100 * work.other_macs / macs, 2)})
    return rows


def by_site(sites: Mapping[str, SiteWork]) -> dict[str, float]:
    """Percentage of each site of the multiply-accumulates of all sites."""
    total = sum(site.macs for site in sites.values())
    return {name: round(100 * site.macs / total, 2) for name, site in sites.items()}


def branch_rows(family: Family, work: ModelWork) -> list[Row]:
    """Float branches: their layer, rank, multiply-accumulates in percent of the layer's, and why they are in floating point."""
    rows: list[Row] = []
    for name, down in work.branches.items():
        layer, _, part = name.rpartition(f".{BRANCH}.")
        if part == "down":
            added, base = down.macs + work.branches[f"{layer}.{BRANCH}.up"].macs, work.sites[f"{layer}.{BASE}"]
            rows.append(
                {
                    "site": f"{layer}.{BASE}",
                    "rank": down.outputs,
                    "MACs % of its layer": round(100 * added / base.macs, 2),
                    "in floating point": family.rule(name).reason,
                }
            )
    return rows


def _code_bytes(codes: int, *, packed: bool) -> int:
    return (codes + 1) // 2 if packed else codes
