"""Names with a fixed meaning in every exported graph: its file, output and table row, and the nodes that an engine looks for at a site."""

from __future__ import annotations

from typing import Literal, get_args

GRAPH_NAME = "model.onnx"
OUTPUT = "prediction"  # the denoiser's output
ROW_NAME = "row"  # the table row of each sample, [B]
SCALE_INPUT = "guidance"  # diffusers' name for the input of an embedded guidance scale

TableColumn = Literal["scale", "inv_scale", "qmin", "qmax"]
TABLE_COLUMNS: tuple[TableColumn, ...] = get_args(TableColumn)


def layer_node(site: str) -> str:
    """The Conv or MatMul on a site's codes."""
    return f"{site}/sum"


def rescaled(site: str) -> str:
    """The Mul of a site's sums by its activation scale."""
    return f"{site}/rescaled"


def biased(site: str) -> str:
    """The Add of a site's bias, after `rescaled`."""
    return f"{site}/biased"


def lookup(site: str, column: TableColumn) -> str:
    """The Gather of one column of a site's activation table by `row`; absent where the column is the same in all rows."""
    return f"{site}/{column}"


def branch_start(site: str) -> str:
    """The first Conv or MatMul of a site's adapter branch, which reads the site's input; absent where the site has none."""
    return f"{site}/lora_down"


def adapted(site: str) -> str:
    """The Add of a site's adapter branch to its output; absent where the site has none."""
    return f"{site}/lora"
