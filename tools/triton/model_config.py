"""The config.pbtxt of a served model: protobuf text of Triton's `inference.ModelConfig`.

Source: github.com/triton-inference-server/common, protobuf/model_config.proto; docs/user_guide/model_configuration.md of the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edm_deploy.models import family_named
from edm_deploy.network.family import SAMPLE, ModelInput
from edm_deploy.network.graph_names import OUTPUT
from edm_deploy.runtime.manifest import Manifest

TYPES = {torch.float32: "TYPE_FP32", torch.float16: "TYPE_FP16", torch.int64: "TYPE_INT64"}
QUEUE_DELAY = 2000  # microseconds that a request waits for others to share its call; a call takes tens of milliseconds


@dataclass(frozen=True)
class Name:
    """A value that is written without quotes: a number, or a name of an enumeration."""

    text: str


Value = Name | str | bool | int | Sequence[Any] | Mapping[str, Any]  # Any: again such values


def denoiser_config(name: str, manifest: Manifest, backend: str) -> str:
    """The config of the denoiser, whose batches may mix timesteps: requests at different steps share one call.

    Args:
        name: Of the model.
        manifest: Of the engine.
        backend: Triton's name of what executes it: `onnxruntime`, `openvino` or `tensorrt`.
    """
    sample = next(declared for declared in manifest.inputs if declared.name == SAMPLE)
    content: dict[str, Value] = {
        "name": name,
        "backend": backend,
        "max_batch_size": manifest.profile["batch"].max,
        "input": [_tensor(declared.name, declared, manifest) for declared in manifest.inputs],
        "output": [_tensor(OUTPUT, _output(sample, manifest), manifest)],
        "dynamic_batching": {"max_queue_delay_microseconds": QUEUE_DELAY},
    }
    provider = provider_of(manifest)
    if backend == "tensorrt" or provider != "cpu":
        content["instance_group"] = [{"kind": Name("KIND_GPU")}]
    if provider == "tensorrt":
        content["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [_accelerator(manifest)]}}
    return text_of(content)


def provider_of(manifest: Manifest) -> str:
    """What ONNX Runtime runs an `ort` engine on, from its build: `cpu`, `cuda` or `tensorrt`. `cpu` for other engines, and where none was chosen."""
    return str(manifest.build.get("options", {}).get("provider") or "cpu")


def _accelerator(manifest: Manifest) -> Mapping[str, Value]:
    """ONNX Runtime's TensorRT provider in the precision of the engine. Source: Triton's documentation, "ONNX Runtime with TensorRT Optimization"."""
    half = manifest.build["options"].get("precision") == "fp16"
    return {"name": "tensorrt", "parameters": [{"key": "precision_mode", "value": "FP16" if half else "FP32"}]}


def pipeline_config(name: str, manifest: Manifest, *, kind: str) -> str:
    """The config of the Python model that runs the whole pipeline: one request is one picture, or as many as it has seeds.

    Args:
        name: Of the model.
        manifest: Of the engine that it opens.
        kind: `KIND_CPU` or `KIND_GPU`.
    """
    inputs: list[Mapping[str, Value]] = [_optional("seed", "TYPE_INT64", -1), _optional("steps", "TYPE_INT32", 1)]
    inputs.append(_optional("guidance", "TYPE_FP32", 1))
    if any(declared.name.startswith("encoder_hidden_states") for declared in manifest.inputs):
        inputs += [_optional("prompt", "TYPE_STRING", 1), _optional("negative_prompt", "TYPE_STRING", 1)]
    inputs.append(_optional("class_label", "TYPE_INT64", 1))
    return text_of(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": 0,
            "input": inputs,
            "output": [{"name": "images", "data_type": Name("TYPE_UINT8"), "dims": [-1, -1, -1, 3]}],
            "instance_group": [{"kind": Name(kind)}],
        }
    )


def text_of(content: Mapping[str, Value]) -> str:
    """Protobuf text of a message."""
    return "".join(f"{line}\n" for name, value in content.items() for line in _lines(name, value))


def _lines(name: str, value: Value) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{name} {{", *(f"  {line}" for key, inner in value.items() for line in _lines(key, inner)), "}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and isinstance(value[0], Mapping):
            return [line for each in value for line in _lines(name, each)]
        return [f"{name}: [ {', '.join(str(each) for each in value)} ]"]
    if isinstance(value, Name):
        return [f"{name}: {value.text}"]
    return [f"{name}: {json.dumps(value)}"]  # quotes and escapes are those of C


def _tensor(name: str, declared: ModelInput, manifest: Manifest) -> Mapping[str, Value]:
    """A tensor of the denoiser without its batch dimension. Triton needs at least one: a value for each sample is [1] to clients, and [] to the graph."""
    dims = [dim if isinstance(dim, int) else -1 for dim in declared.dims[1:]]
    described: dict[str, Value] = {"name": name, "data_type": Name(TYPES[declared.dtype(manifest.torch_dtype)]), "dims": dims or [1]}
    return described if dims else described | {"reshape": {"shape": []}}


def _output(sample: ModelInput, manifest: Manifest) -> ModelInput:
    """The prediction: as the sample, with as many channels as the latents have; an inpainting model's sample has more."""
    latent = family_named(manifest.family).latent_shape(manifest.config)
    dims = (sample.dims[0], *(dim if isinstance(dim, str) else size for dim, size in zip(sample.dims[1:], latent, strict=True)))
    return ModelInput(OUTPUT, "float", dims)


def _optional(name: str, kind: str, size: int) -> Mapping[str, Value]:
    return {"name": name, "data_type": Name(kind), "dims": [size], "optional": Name("true")}
