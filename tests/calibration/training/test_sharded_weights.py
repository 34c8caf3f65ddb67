from dataclasses import replace

import pytest
import torch

from calibration import RunOptions, fit
from calibration.run.processes import Processes
from calibration.training.sharded_weights import sharded
from edm_deploy.errors import InputError
from tests.calibration.run.test_processes import TRAINING, difference, trained
from tests.calibration.tiny import CPU, tiny_context, tiny_source
from tests.processes import in_processes


def test_one_process_has_nothing_to_share():
    with pytest.raises(InputError, match="--shard-weights divides frozen weights among processes, and this run has one"):
        fit(tiny_source(), TRAINING, RunOptions(sharding=True))


@pytest.mark.extended
def test_each_process_holds_half_of_each_frozen_weight_meanwhile(tmp_path):
    def work(processes: Processes) -> dict:
        context = tiny_context(replace(TRAINING, rows=1))
        layer = context.student.layers["conv_in"]
        whole = layer.layer.weight.clone()
        with sharded(context.student, context.teacher, [layer.log_weight_scale], processes, CPU):
            held = layer.layer.weight.to_local().shape[0], len(whole)
            blocks = [type(value).__name__ for name, value in context.teacher.model.named_parameters() if "resnets" in name]
        return {"held": held, "same": torch.equal(layer.layer.weight, whole), "teacher": sorted(set(blocks))}

    for found in in_processes(2, work, tmp_path):
        assert found == {"held": (4, 8), "same": True, "teacher": ["DTensor"]}


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
