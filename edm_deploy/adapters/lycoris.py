"""LoHa and LoKr: compute the update of a layer's weight, and approximate it by a LoRA of bounded rank.

Source: Hyeon-Woo et al., FedPara, arXiv 2108.06098 (Hadamard product of two low-rank matrices); Edalati et al., KronA, arXiv 2212.10650 (Kronecker product);
Yeh et al., LyCORIS, arXiv 2309.14859, section 3 and appendix, for the names and the factor alpha / r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edm_deploy.adapters.lora import LayerUpdate
from edm_deploy.errors import InputError

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
OVERSAMPLED = 8  # singular vectors more than the rank in the randomized decomposition, and power iterations
EXACT_BELOW = 512  # size of the smaller side up to which the decomposition is exact


def weight_update(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, int | None]:
    """The update of a weight from its LoHa or LoKr factors, without the factor alpha / r.

    Args:
        parts: float32 factors by the names of LOHA or LOKR.
        shape: [Cout, Cin] or [Cout, Cin, kh, kw].

    Returns:
        float32 in `shape`; and the rank r that alpha is divided by, None where the factors are whole matrices and alpha has no effect.

    Raises:
        InputError: Factors are missing, or do not give this shape.
    """
    try:
        whole, rank = _loha(parts) if any(name in parts for name in LOHA) else _lokr(parts)
        return whole.reshape(shape), rank
    except (KeyError, RuntimeError) as err:
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(parts.items()))
        raise InputError(
            f"The factors {found} do not give an update of a weight {list(shape)}. The LoRA is for another base model."
        ) from err


def low_rank(delta: Tensor, rank: int) -> tuple[LayerUpdate, float]:
    """The nearest LoRA of at most `rank`, by singular value decomposition, and its error as a share of the update's norm.

    Source: Eckart and Young, 1936.

    Args:
        delta: float32 [Cout, Cin] or [Cout, Cin, kh, kw].
        rank: Of the result, unless the update has fewer.
    """
    matrix = delta.flatten(1)
    if min(matrix.shape) <= EXACT_BELOW:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLED, *matrix.shape), niter=4)
        vh = v.mT
    kept = max(1, min(rank, int((s > s.max() * 1e-6).sum())))
    root = s[:kept].sqrt()  # on both sides, so that neither leaves the range of float16
    up, down = u[:, :kept] * root, root[:, None] * vh[:kept]
    norm = float(matrix.norm())
    error = float((matrix - up @ down).norm()) / norm if norm > 0 else 0.0
    return LayerUpdate(down.reshape(kept, *delta.shape[1:]).contiguous(), up.contiguous()), error


def _loha(parts: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    factors = (_product(parts, "hada_w1_a", "hada_w1_b", "hada_t1"), _product(parts, "hada_w2_a", "hada_w2_b", "hada_t2"))
    return factors[0] * factors[1], len(parts["hada_w1_b"])


def _lokr(parts: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    second = parts["lokr_w2"] if "lokr_w2" in parts else _product(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    rank = next((len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts), None)
    if second.ndim == 4:  # otherwise [out, in * kh * kw], whose taps stay innermost in the product
        first = first[:, :, None, None]
    return torch.kron(first.contiguous(), second.contiguous()), rank


def _product(parts: Mapping[str, Tensor], a: str, b: str, core: str) -> Tensor:
    """`a @ b`, or with a Tucker core [r, r, kh, kw] their product over both of its first axes, [Cout, Cin, kh, kw]."""
    if core not in parts:
        return parts[a] @ parts[b]
    return torch.einsum("ijkl,ip,jr->prkl", parts[core], parts[a], parts[b])
