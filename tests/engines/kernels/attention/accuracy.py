"""Error of attention with 8-bit queries and keys against float64, for each way to choose scales; on normal values, and on what the shipped model attends to.

`python -m tests.engines.kernels.attention.accuracy` prints the table of docs/kernels.md.
"""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional

from edm_deploy.pipelines.source import load_source
from edm_deploy_tools.common.assets import REFERENCE_MODEL
from engines.kernels.attention import cpu
from engines.kernels.attention.operands import AttentionOperands

Heads = tuple[Tensor, Tensor, Tensor]


def rounded(x: Tensor, group: int | None) -> Tensor:
    """x [B, H, L, D] in 8 bits with a scale for every `group` tokens; None: for all of a head."""
    group = group or x.shape[2]
    filled = functional.pad(x, (0, 0, 0, -x.shape[2] % group)).unflatten(2, (-1, group))
    scale = filled.abs().amax((3, 4), keepdim=True).clamp(min=1e-30) / 127
    return ((filled / scale).round() * scale).flatten(2, 3)[:, :, : x.shape[2]]


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query.double(), key.double(), value.double())


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one scale for each head": lambda q, k, v: attended(rounded(q.double(), None), rounded(k.double(), None), v),
    "for 128 queries, 64 keys; keys smoothed": lambda q, k, v: attended(
        rounded(q.double(), 128), rounded(k.double() - k.double().mean(2, keepdim=True), 64), v
    ),
    "for each token": lambda q, k, v: attended(rounded(q.double(), 1), rounded(k.double(), 1), v),
    "for each token, keys smoothed: ours": lambda q, k, v: cpu.attention(AttentionOperands(q, k, v, None)).double(),
}


def errors(heads: Heads, way: str) -> tuple[float, float]:
    """Relative error in the Euclidean norm, and 1 - cosine."""
    exact, found = attended(*heads), WAYS[way](*heads)
    cosine = functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    return float((found - exact).norm() / exact.norm()), float(1 - cosine)


def normal(width: int, mean: float = 0.0) -> Heads:
    """Normal values of variance 1; keys with a mean of its own in each channel, of variance `mean` squared."""
    g = torch.Generator().manual_seed(width)
    query, key, value = (torch.randn(1, 4, 1024, width, generator=g) for _ in range(3))
    return query.half(), (key + mean * torch.randn(1, 4, 1, width, generator=g)).half(), value.half()


def of_the_model(samples: int, steps: int) -> list[Heads]:
    """What each attention of the shipped model reads while it samples with DDIM: queries, keys and values of all samples and steps."""
    seen: list[list[Heads]] = []
    model = load_source(str(REFERENCE_MODEL)).model.eval()
    scheduler = DDIMScheduler.from_pretrained(REFERENCE_MODEL, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    real, x = functional.scaled_dot_product_attention, torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def recording(query: Tensor, key: Tensor, value: Tensor, **options):
        seen[-1].append((query.half(), key.half(), value.half()))
        return real(query, key, value, **options)

    functional.scaled_dot_product_attention = recording
    try:
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                seen.append([])
                x = scheduler.step(model(x, timestep).sample, timestep, x).prev_sample
    finally:
        functional.scaled_dot_product_attention = real
    return [tuple(torch.cat(parts) for parts in zip(*site, strict=True)) for site in zip(*seen, strict=True)]


def table() -> str:
    """A column for each kind of values, a row for each way, in markdown."""
    model = of_the_model(8, 10)
    columns = {f"normal, {width}": [normal(width)] for width in (40, 64, 128, 160)}
    columns |= {"normal, 64, means of 3": [normal(64, mean=3.0)], f"shipped model, {len(model)} layers": model}
    lines = ["| scales | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for way in WAYS:
        cells = []
        for heads in columns.values():
            found = [errors(one, way) for one in heads]
            relative, cosine = ([part[i] for part in found] for i in (0, 1))
            span = f"{min(relative):.1e}" if len(found) == 1 else f"{min(relative):.1e} to {max(relative):.1e}"
            cells.append(f"{span} ({max(cosine):.0e})")
        lines.append("| " + " | ".join([way, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
