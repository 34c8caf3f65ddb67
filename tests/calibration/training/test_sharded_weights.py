import pytest
import torch

from calibration import RunOptions, fit
from calibration.run.processes import Processes
from edm_deploy.errors import InputError
from tests.calibration.run.test_processes import TRAINING, difference, trained
from tests.calibration.tiny import tiny_source
from tests.processes import in_processes


def test_one_process_has_nothing_to_share():
    with pytest.raises(InputError, match="--shard-weights divides frozen weights among processes, and this run has one"):
        fit(tiny_source(), TRAINING, RunOptions(sharding=True))


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["unet2d", "dit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_weights_train_what_whole_ones_train(tmp_path, kind, checkpointing):
    """On gloo, as the GPUs' NCCL would: gathering of frozen weights; nothing is reduced, because nothing sharded is trained."""
    (tmp_path / "alone").mkdir()
    alone = trained(tmp_path / "alone", kind=kind)

    def work(processes: Processes) -> torch.Tensor:
        return trained(tmp_path, kind=kind, processes=processes, sharding=True, checkpointing=checkpointing)

    first, second = in_processes(2, work, tmp_path)
    assert torch.equal(first, second)
    assert difference(first, alone) < 0.2
