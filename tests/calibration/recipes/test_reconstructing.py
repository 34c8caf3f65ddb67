import pytest
import torch

from calibration.data.trajectory_pool import Trajectories
from calibration.recipes._reconstructing import ReconstructionRecipe, sample_trajectories
from calibration.recipes.mse import Mse
from calibration.reconstruction.block_cache import CACHE_BYTES
from calibration.student.teacher import Teacher
from edm_deploy.errors import InputError
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from tests.calibration.tiny import tiny_source


def test_samples_are_drawn_evenly_over_the_timesteps():
    source = tiny_source()
    timesteps = calibrated_timesteps(source.scheduler, 4)
    pool = Trajectories(source, timesteps, size=8, eta=0.0, seed=0, device=torch.device("cpu"))
    teacher = Teacher(source, torch.device("cpu"))
    for _, batches in pool.traverse_schedule(8):  # staggers the pool
        for batch in batches:
            pool.advance(batch, teacher(batch.inputs))
    inputs = sample_trajectories(pool, teacher, 16)
    found, counts = inputs.values["timestep"].unique(return_counts=True)
    assert found.tolist() == timesteps.tolist()
    assert counts.tolist() == [4, 4, 4, 4]
    assert len({sample.sum().item() for sample in inputs.values["sample"]}) == 16


def test_samples_are_every_trajectory_at_every_row():
    assert ReconstructionRecipe(rows=20, calibration_samples=256).samples == 5120


def test_the_cache_is_part_of_the_memory_estimate():
    assert ReconstructionRecipe().cached_bytes == CACHE_BYTES
    assert Mse().cached_bytes == 0


@pytest.mark.parametrize(
    "setting",
    [{"steps": 0}, {"batch": 0}, {"rounding_rate": -1.0}, {"rounding_weight": -1.0}, {"partition": "all"}, {"compute": "fp8"}],
    ids=str,
)
def test_a_setting_outside_its_range_is_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        ReconstructionRecipe(**setting)


def test_the_published_constants_are_the_defaults():
    recipe = ReconstructionRecipe()
    assert (recipe.steps, recipe.batch, recipe.rounding_rate, recipe.rounding_weight) == (20000, 32, 1e-3, 0.01)
