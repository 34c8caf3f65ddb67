"""Ask a Triton server for pictures over HTTP, with the standard library alone.

Run as `python -m edm_deploy_tools.triton.client http://localhost:8000 denoiser_pipeline --out pictures`. `tritonclient[http]` sends the same request.

Source: github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md: the header's length is in `Inference-Header-Content-Length`.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from edm_deploy.errors import InputError
from edm_deploy_tools.common import console, run_app

TYPES = {np.dtype(np.int64): "INT64", np.dtype(np.int32): "INT32", np.dtype(np.float32): "FP32", np.dtype(np.uint8): "UINT8"}
HEADER = "Inference-Header-Content-Length"
TIMEOUT = 600.0  # seconds
app = run_app.app_with()


def infer(url: str, model: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a model, numpy arrays by name.

    Args:
        url: Of the server, `http://localhost:8000`.
        model: Name of the model.
        inputs: numpy arrays of the types in TYPES, or strings, by name.

    Raises:
        InputError: The server cannot be reached, or refuses the request; with its reason.
    """
    described = [_described(name, value) for name, value in inputs.items()]
    body = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    request = urllib.request.Request(f"{url}/v2/models/{model}/infer", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            content, length = answer.read(), int(answer.headers[HEADER])
    except urllib.error.HTTPError as err:
        raise InputError(f"{url} refused the request: {json.loads(err.read() or b'{}').get('error', err.reason)}") from err
    except OSError as err:
        raise InputError(f"{url} cannot be reached: {err}. Start tritonserver, or check the address.") from err
    outputs, start = {}, length
    for output in json.loads(content[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        dtype = next(dtype for dtype, name in TYPES.items() if name == output["datatype"])
        outputs[output["name"]] = np.frombuffer(content[start : start + size], dtype).reshape(output["shape"])
        start += size
    return outputs


def _described(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]}
    return {"name": name, "shape": list(value.shape), "datatype": TYPES[value.dtype], "data": value.reshape(-1).tolist()}


@app.command()
def ask(
    url: Annotated[str, typer.Argument(help="Address of the server, such as http://localhost:8000.")],
    model: Annotated[str, typer.Argument(help="Name of the pipeline's model.")],
    out: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("pictures"),
    prompt: Annotated[str | None, typer.Option(help="For a model with text.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures, with successive seeds.")] = 1,
) -> None:
    """Ask for pictures and write them as png."""
    inputs: dict[str, Any] = {"seed": np.arange(seed, seed + count), "steps": np.array([steps], np.int32)}
    found = infer(url, model, inputs if prompt is None else inputs | {"prompt": prompt})
    out.mkdir(parents=True, exist_ok=True)
    for each, image in zip(range(seed, seed + count), found["images"], strict=True):
        Image.fromarray(image).save(out / f"{each}.png")
        console.wrote(out / f"{each}.png")


if __name__ == "__main__":
    raise SystemExit(run_app.run(app, "python -m edm_deploy_tools.triton.client"))
