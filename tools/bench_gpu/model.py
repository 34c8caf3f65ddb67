"""Stages of `bench_gpu` that need a model, and so diffusers: a whole published architecture with random weights, and a step of fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from edm_deploy.pipelines.source import load_source
from edm_deploy_tools.bench_gpu.stage import StageResult, StageRun
from edm_deploy_tools.benchmarks.finetune_step import step_cost
from edm_deploy_tools.benchmarks.traced_step import TracedModel, code_formats
from edm_deploy_tools.common.assets import REFERENCE_MODEL
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.common.recipe_settings import recipe_with
from engines.performance.step_time import step_time
from engines.torch_graph.cuda_graph_session import CudaSession

CALLS = 20


def whole_model(run: StageRun, traced: TracedModel, batch: int) -> StageResult:
    """One step of a traced model with random weights: our session, the same with attention in INT8, torch eager, torch compiled."""
    inputs = [_random(value, run.device) for value in traced.inputs(batch)]
    formats = code_formats(traced.family, traced.config, four_bits=run.gpu is None or run.gpu.has_int4)
    integers, attending, floats = traced.graph(formats), traced.graph(formats, int8_attention=True), traced.graph({})
    names = [declared.name for declared in traced.family.inputs(traced.config)]
    rows: list[Row] = []
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: _session(integers, names, inputs, run.device),
        "ours, attention in INT8": lambda: _session(attending, names, inputs, run.device),
        "torch eager": lambda: _module(floats, inputs, run.device, compiled=False),
        "torch compiled": lambda: _module(floats, inputs, run.device, compiled=True),
    }
    problems = []
    for name, prepare in ways.items():
        if name == "torch compiled" and run.device.type != "cuda":
            continue  # a dry run shows nothing about a compiler for GPUs
        try:
            row = _measured(name, prepare, run)
        except Exception as err:  # a compiler that fails must not take the other rows with it
            problems.append(f"{name}: {type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}")
            continue
        if run.gpu is not None:
            graph = {"ours": integers, "ours, attention in INT8": attending}.get(name, floats)
            options = {"compiled": name == "torch compiled", "graph": name != "torch eager"}
            seconds = step_time(graph, traced.inputs(batch), run.gpu, **options).seconds
            row["expected ms"] = round(1e3 * seconds, 2)
            row["of expected"] = round(float(row["ms"]) / (1e3 * seconds), 2)
        rows.append(row)
    return StageResult(tables={f"One step, batch {batch}": rows}, problems=problems)


def training(run: StageRun) -> StageResult:
    """A fine-tuning step of the shipped model beside a step of float distillation."""
    batch = 2 if run.small else 32
    cost = step_cost(
        load_source(str(REFERENCE_MODEL)),
        recipe_with("efficientdm"),
        batch=batch,
        repeats=1 if run.small else 7,
        memory=False,
        device=str(run.device),
    )
    row = {
        "batch": batch,
        "float step ms": 1e3 * cost.float_seconds,
        "fine-tuning step ms": 1e3 * cost.step_seconds,
        "ratio": round(cost.ratio, 2),
    }
    return StageResult(tables={"Fine-tuning": [{name: round(value, 2) for name, value in row.items()}]})


def _measured(name: str, prepare: Callable[[], Any], run: StageRun) -> Row:
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call = prepare()
    _wait(cuda)
    ready, calls = time.perf_counter() - start, CALLS if cuda else 1
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(cuda)
    row: Row = {"way": name, "ms": round(1e3 * (time.perf_counter() - start) / calls, 3), "ready after s": round(ready, 1)}
    if cuda:
        row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _session(module: fx.GraphModule, names: list[str], inputs: list[Tensor], device: torch.device) -> Callable[[], Any]:
    session = CudaSession(_filled(module, device), names, ["sample"], device)
    given = dict(zip(names, inputs, strict=True))
    session.run(given)
    return lambda: session.run(given)


@torch.no_grad()
def _module(module: fx.GraphModule, inputs: list[Tensor], device: torch.device, *, compiled: bool) -> Callable[[], Any]:
    filled: Callable[..., Any] = _filled(module, device)
    call = torch.compile(filled, mode="reduce-overhead") if compiled else filled

    def run() -> Any:
        with torch.no_grad():
            return call(*inputs)

    for _ in range(3):
        run()
    return run


def _filled(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The graph with random tensors of the shapes and types that it has on the meta device."""
    tensors = {name: torch.nn.Parameter(_random(value, device), requires_grad=False) for name, value in module.named_parameters()}
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:  # such as the frequencies of the timestep's embedding
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    return fx.GraphModule(tensors, graph)


def _random(value: Tensor, device: torch.device) -> Tensor:
    """Weights keep the variance of a product's input, codes and table rows are any, scales are small."""
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, value.shape, dtype=torch.uint8, device=device)
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    width = value.shape[1:].numel() if value.ndim > 1 else 10_000
    filled = (torch.randn(value.shape, device=device) / width**0.5).to(value.dtype)
    return filled.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else filled
