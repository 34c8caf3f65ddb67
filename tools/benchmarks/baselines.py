"""The float model, and NNCF's INT8 of it, as baselines that engines are timed against."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edm_deploy.models import family_named
from edm_deploy.network.family import SAMPLE, Family
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.leftovers import scratch_directory
from edm_deploy.storage.weight_loading import cast
from edm_deploy_tools.benchmarks.float_engine import build_float_engine, float_graph
from engines.common.vendor_package import vendor
from engines.openvino import compile_graph, write_graph
from engines.openvino_graph.core import core

NNCF = "nncf-int8"
BASELINES = ("torch", "torch-bf16", "torch-fp16", "openvino-fp32", "openvino-bf16", NNCF, "ort-fp32")
HALVES: Mapping[str, torch.dtype] = {"torch-bf16": torch.bfloat16, "torch-fp16": torch.float16}
Call = Callable[[], object]


def random_model(family: Family, config: Mapping[str, Any]) -> nn.Module:
    """The float model with random weights; torch's random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family.build(config).eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Baselines of one architecture, with random weights, which do not change the time.

    Attributes:
        manifest: Manifest of an engine of the architecture.
        config: The model's config, at the size that is measured.
        inputs: Inputs of one call, on the device of torch's baselines.
        threads: CPU threads of OpenVINO and ONNX Runtime; None is their default.
        scratch: Holds the directories of graphs and engines.
    """

    manifest: Manifest
    config: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    threads: int | None
    scratch: ExitStack

    def calls(self, names: tuple[str, ...]) -> dict[str, Call]:
        """One call of each baseline. Vendors' are made first, from one exported graph, and the float model freed before torch's are.

        Raises:
            UnsupportedError: The package of a baseline is not installed.
        """
        by_vendors = [name for name in names if not name.startswith("torch")]
        made: dict[str, Call] = {}
        if by_vendors:
            directory = self.scratch.enter_context(scratch_directory("float"))
            float_graph(self.manifest, self.config, random_model(self._family, self.config), directory / "onnx")
            gc.collect()
            for name in by_vendors:
                made[name] = self._nncf(directory) if name == NNCF else self._engine(directory, name)
        for name in (name for name in names if name.startswith("torch")):
            made[name] = self._torch(name)
        return {name: made[name] for name in names}

    @property
    def _family(self) -> Family:
        return family_named(self.manifest.family)

    def _torch(self, name: str) -> Call:
        family, inputs = self._family, self.inputs
        model = random_model(family, self.config).to(inputs[SAMPLE].device)
        if name in HALVES:
            model = cast(model, HALVES[name])
            inputs = {
                key: value.to(HALVES[name]) if value.is_floating_point() and key != "timestep" else value for key, value in inputs.items()
            }
        return torch.no_grad()(lambda: family.forward(model, inputs))

    def _engine(self, directory: Path, name: str) -> Call:
        backend, _, precision = name.partition("-")
        build_float_engine(
            directory / "onnx",
            directory / name,
            backend=backend,
            precision=precision,
            threads=self.threads,
            batch=len(self.inputs[SAMPLE]),
        )
        denoiser = load_denoiser(directory / name)
        placed = {name: value.to(denoiser.device) for name, value in self.inputs.items()}
        return lambda: denoiser(**placed)

    def _nncf(self, directory: Path) -> Call:
        """Post-training quantization by NNCF, calibrated on the inputs of the measurement, with the graph preparation and bfloat16 of our engines."""
        nncf = vendor("nncf", remedy="Install it with pip install nncf, or leave nncf-int8 out of --against.")
        ov = vendor("openvino", remedy='Install it with pip install "edm-deploy[openvino]".')
        values = {
            declared.name: self.inputs[declared.name].to(declared.dtype(torch.float32)).numpy()
            for declared in Manifest.read(directory / "onnx", kind="onnx").inputs
        }
        model = core(ov).read_model(directory / "onnx" / GRAPH_NAME)
        model.reshape({name: value.shape for name, value in values.items()})
        quantized = nncf.quantize(
            model,
            nncf.Dataset([values]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=1,
            # Neither changes the number of operations: smoothed scales become part of the weights, corrected biases replace biases.
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True, smooth_quant_alpha=-1),
        )
        options = {"precision": "bf16", "threads": self.threads}
        write_graph(ov, quantized, directory / f"{NNCF}.xml", options["precision"])
        del model, quantized
        gc.collect()
        request = compile_graph(ov, directory / f"{NNCF}.xml", options).create_infer_request()
        return lambda: request.infer(values, share_inputs=True)
