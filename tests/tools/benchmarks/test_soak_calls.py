import pytest
import torch

from edm_deploy.errors import EdmDeployError
from edm_deploy_tools.benchmarks.soak_calls import CALLS, SHAPES, resized, soaked_engine


@pytest.fixture
def engine(chain):
    return soaked_engine(chain.engine, seed=0)


def check_refused(engine):
    for call in engine.malformed.values():
        with pytest.raises(EdmDeployError):
            call()


def test_a_dimension_is_cut_or_repeated():
    assert resized(torch.tensor([[1, 2, 3], [4, 5, 6]]), [3, 2]).tolist() == [[1, 2], [4, 5], [1, 2]]


def test_the_calls_have_the_smallest_the_largest_and_other_batches_at_mixed_timesteps(engine):
    batches = [len(call.inputs["sample"]) for call in engine.calls]
    of_each_shape = batches[:: CALLS // SHAPES]
    assert of_each_shape[:2] == [1, 8]
    assert len(set(of_each_shape)) > 2
    assert all(call.inputs["timestep"].unique().numel() > 1 for call in engine.calls if len(call.inputs["sample"]) > 4)
    assert len(batches) == CALLS


def test_every_malformed_call_is_refused(engine):
    assert len(engine.malformed) > 10
    check_refused(engine)


@pytest.mark.extended  # exports a pipeline; the engine of unet2d has the other malformed calls
def test_malformed_calls_of_conditioning_are_refused_too(prompted):
    engine = soaked_engine(prompted.engine, seed=0)
    assert {tuple(call.inputs["sample"].shape[2:]) for call in engine.calls} > {(8, 8), (16, 16)}
    assert "no encoder_hidden_states" in engine.malformed
    check_refused(engine)
