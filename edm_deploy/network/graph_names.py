"""Names with a fixed meaning in every exported graph: its file, its output, its table row, the input of an embedded guidance scale."""

from __future__ import annotations

GRAPH_NAME = "model.onnx"
OUTPUT = "prediction"  # what a denoiser returns
ROW_NAME = "row"  # the table row of each sample, [B]
SCALE_INPUT = "guidance"  # diffusers' name for the input of an embedded guidance scale
