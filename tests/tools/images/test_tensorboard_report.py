import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from edm_deploy_tools.images.tensorboard_report import TensorboardReport, side_by_side
from tests.calibration.tiny import tiny_source


def test_rows_of_images_are_above_each_other():
    upper, lower = torch.full((2, 3, 2, 2), -1.0), torch.full((2, 3, 2, 2), 2.0)
    lower[1] = 0.0
    picture = side_by_side(upper, lower)
    assert (picture.dtype, picture.shape) == (torch.uint8, (3, 4, 4))
    assert picture[0].tolist() == [[0] * 4, [0] * 4, [255, 255, 128, 128], [255, 255, 128, 128]]


def test_tensorboard_reads_the_losses_and_the_pictures(tmp_path):
    report = TensorboardReport(tmp_path, tiny_source("unet2d-condition"))  # latents without a VAE: three channels are shown
    report.scalars(1, {"loss": 0.5})
    report.scalars(2, {"loss": 0.25})
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    report.samples(2, latents + 0.1, latents)
    report.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Scalars("psnr_db")[0].value > 20
    (picture,) = events.Images("student above teacher")
    assert (picture.step, picture.height, picture.width) == (2, 16, 32)
