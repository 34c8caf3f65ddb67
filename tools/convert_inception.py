"""Convert the published Inception weights of the FID, a pickle of torch, to safetensors; refuses every other file."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.evaluation.inception import PUBLISHED, weights_sha256

app = run_app.app_with()


@app.command()
def convert(
    published: Annotated[Path, typer.Argument(metavar="FILE.pth", help=f"pt_inception-2015-12-05-{PUBLISHED}.pth, downloaded by you.")],
    out: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="What edm-deploy evaluate --inception takes.")],
) -> None:
    """Convert the Inception network of the FID for edm-deploy evaluate --inception."""
    convert_inception(published, out)
    console.wrote(out, "for edm-deploy evaluate --inception")


def convert_inception(published: Path, out: Path) -> None:
    """Write the weights of `published` to `out`, with the hash of the file and of the tensors.

    Raises:
        ArtifactError: The file is missing, or its sha256 is not that of the published one.
    """
    try:
        content = published.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{published} cannot be read ({err}). Check the path.") from err
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(PUBLISHED):
        raise ArtifactError(
            f"{published} has the sha256 {found[:8]}..., that of the published weights begins with {PUBLISHED}. Download "
            f"pt_inception-2015-12-05-{PUBLISHED}.pth again."
        )
    state = torch.load(published, map_location="cpu", weights_only=True)
    weights = {name: value.contiguous() for name, value in state.items()}
    save_file(weights, out, metadata={"published_sha256": found, "weights_sha256": weights_sha256(weights)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_app.run(app, "convert_inception", arguments)


if __name__ == "__main__":
    sys.exit(main())
