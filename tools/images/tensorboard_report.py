"""Write the course of a training for TensorBoard: the loss, the rates, and pictures of the student above those of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from edm_deploy.pipelines.decoding import Decoder, decoder_of
from edm_deploy.pipelines.source import Source


class TensorboardReport:
    """A `calibration.run.reports.Report` that writes event files.

    Args:
        folder: For the event files; a resumed run adds to those that are there.
        source: The float model, whose VAE decodes the samples if it has one.
    """

    def __init__(self, folder: Path, source: Source) -> None:
        import tensorboard  # noqa: F401  # torch's writer needs it, and reports its absence in other words
        from torch.utils.tensorboard import SummaryWriter

        self.decoder: Decoder = decoder_of(source)
        self.writer = SummaryWriter(folder)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add values by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, student: Tensor, teacher: Tensor) -> None:
        """Add one picture, the student's samples in the upper row and the teacher's in the lower, and their PSNR."""
        actual, expected = (self.decoder.images(sample.cpu()) for sample in (student, teacher))
        self.writer.add_scalar("psnr_db", self.decoder.psnr(actual, expected), step)
        self.writer.add_image(
            "student above teacher", side_by_side(*(self.decoder.visible(each, expected) for each in (actual, expected))), step
        )
        self.writer.flush()  # type: ignore[no-untyped-call]  # as above

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()  # type: ignore[no-untyped-call]  # as above


def side_by_side(upper: Tensor, lower: Tensor) -> Tensor:
    """Two rows of images as one: uint8 [C, 2 H, N W] of float [N, C, H, W] each, in [-1, 1]."""
    rows = [torch.cat(list(images), dim=2) for images in (upper, lower)]
    return ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
