"""A model of Triton's Python backend that runs the whole pipeline of an engine: this file is `1/model.py`, the engine is next to it.

Inputs, all optional: `seed` int64 [N], one picture for each; `steps` int32 [1]; `guidance` float32 [1]; `prompt` and `negative_prompt`, strings [1];
`class_label` int64 [1]. Output: `images` uint8 [N, height, width, 3].
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Triton's interpreter is isolated: it ignores PYTHONPATH, and any virtual environment.
sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from edm_deploy import load_pipeline  # noqa: E402

NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "prompt": "prompt", "negative_prompt": "negative_prompt"}
TEXT = ("prompt", "negative_prompt")
INPUTS = ("seed", "class_label", *NAMES)


def arguments(pipeline: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline's call.

    Args:
        pipeline: A diffusers pipeline, or one of `edm_deploy.pipelines.custom`.
        inputs: numpy arrays by name; those that a request has.

    Raises:
        ValueError: The pipeline does not take one of them.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    seeds = [int(seed) for seed in inputs.get("seed", (0,))]
    count = len(seeds)
    found: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], "output_type": "np"}
    for name, value in inputs.items():
        if name in NAMES:
            item = value.reshape(-1)[0]
            found[NAMES[name]] = item.decode() if isinstance(item, bytes) else item.item() if hasattr(item, "item") else item
    if "class_label" in inputs:
        found["class_labels"] = torch.full((count,), int(inputs["class_label"].reshape(-1)[0]))
    if "batch_size" in accepted:
        found["batch_size"] = count
    elif "num_images_per_prompt" in accepted:
        found["num_images_per_prompt"] = count
    if unknown := [name for name in found if name not in accepted]:
        raise ValueError(f"This model takes no {unknown[0]}; expected some of {', '.join(sorted(accepted))}.")
    return found


def pixels(images: Any) -> Any:
    """uint8 [N, H, W, 3] of float [N, H, W, 3] in [0, 1]."""
    return np.ascontiguousarray((np.clip(images, 0, 1) * 255).round().astype(np.uint8))


class TritonPythonModel:
    """What Triton loads; its methods are those that the Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine in this version's directory."""
        version = Path(args["model_repository"]) / args["model_version"]
        self.pipeline = load_pipeline(version / "engine")
        self.pipeline.set_progress_bar_config(disable=True)

    def execute(self, requests: Any) -> list[Any]:
        """Answer requests one after the other; an error is the answer to its own request alone."""
        import triton_python_backend_utils as triton

        answers = []
        for request in requests:
            try:
                found = {name: tensor for name in INPUTS if (tensor := triton.get_input_tensor_by_name(request, name)) is not None}
                given = arguments(self.pipeline, {name: _values(name, tensor) for name, tensor in found.items()})
                # DLPack, not numpy: the backend of Triton 2.51, which nvidia-pytriton 0.7 has, takes a numpy 2 array for one of 0 bytes.
                images = triton.Tensor.from_dlpack("images", torch.from_numpy(pixels(self.pipeline(**given).images)))
                answers.append(triton.InferenceResponse(output_tensors=[images]))
            except Exception as err:  # whatever a request leads to, the server goes on
                answers.append(triton.InferenceResponse(error=triton.TritonError(" ".join(str(err).split()))))
        return answers


def _values(name: str, tensor: Any) -> Any:
    """A numpy array of an input; numbers by DLPack, as above."""
    return tensor.as_numpy() if name in TEXT else torch.from_dlpack(tensor.to_dlpack()).numpy()
