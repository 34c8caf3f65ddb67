import torch

from calibration.observers.calibrate import calibrate
from calibration.observers.stagger import stagger
from calibration.recipes.minmax import MinMax
from tests.calibration.tiny import tiny_context


def test_the_pool_is_left_as_calibration_leaves_it():
    recipe, seen = MinMax(rows=3), []
    staggered, calibrated = tiny_context(recipe, samples=4, on_progress=seen.append), tiny_context(recipe, samples=4)
    tables = [quantizer.log_scale.clone() for quantizer in staggered.student.quantizers.values()]
    stagger(staggered)
    calibrate(calibrated, recipe)
    assert torch.equal(staggered.trajectories.sample, calibrated.trajectories.sample)
    assert torch.equal(staggered.trajectories.position, calibrated.trajectories.position)
    assert [progress.step for progress in seen] == [1, 2, 3]
    assert all(
        torch.equal(quantizer.log_scale, table) for quantizer, table in zip(staggered.student.quantizers.values(), tables, strict=True)
    )
