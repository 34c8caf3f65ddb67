from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calibration import RunOptions, fit
from calibration.data.observation import Share
from calibration.passes.adp import Adp
from calibration.passes.pcr import Pcr
from calibration.passes.tac import Tac
from calibration.recipe import Recipe
from calibration.recipes.dilate import Dilate
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.mpq_dm import MPQDM
from calibration.recipes.mse import Mse
from calibration.recipes.qdiff import QDiff
from calibration.recipes.quest import Quest
from calibration.recipes.svdquant import SvdQuant
from calibration.recipes.tcaq import Tcaq
from calibration.reconstruction import reconstruct
from calibration.reconstruction.blocks import blocks_of
from calibration.run.checkpoint import TENSORS_NAME
from calibration.run.processes import SINGLE, Processes, check_divides, check_shares
from edm_deploy import Artifact
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_source
from tests.processes import in_processes

# At 4 bits: a code that another order of summation rounds differently changes the gradients least.
TRAINING = EfficientDM(rows=3, steps=3, batch=4, calibration_samples=4, rank=2, compute="fp32", update_rate=1e-4, scale_rate=1e-5)
SMALL = {"rows": 2, "steps": 10, "batch": 4, "calibration_samples": 4, "compute": "fp32"}
CALIBRATION = Mse(rows=2, calibration_samples=3)  # two processes have shares of one and of two samples


def calibrated(processes: Processes = SINGLE, recipe: Recipe = CALIBRATION) -> torch.Tensor:
    """Logarithms of all scales, and all biases, which this calibration corrects, of a tiny model."""
    artifact = fit(tiny_source(), recipe, RunOptions(processes=processes))
    tables = [site.activation.scale.log() for site in artifact.sites.values()]
    return torch.cat(tables + [value for name, value in artifact.params.items() if name.endswith("bias")])


def trained(folder: Path, recipe: Recipe = TRAINING, kind: str = "unet2d", **options) -> torch.Tensor:
    """The average of the gradients of everything that is trained in three steps: Adam's first moment, from the last checkpoint."""
    fit(tiny_source(kind), recipe, RunOptions(teacher_dtype="fp32", checkpoint=folder / "checkpoint", **options))
    saved = load_file(folder / "checkpoint" / TENSORS_NAME)
    return torch.cat([value.flatten() for name, value in sorted(saved.items()) if ".exp_avg." in name])


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative: 2e-6 by summation alone, more where it moves a code; 0.95 where the processes do not average their gradients."""
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> torch.Tensor:
    """What one process trains."""
    return trained(tmp_path_factory.mktemp("alone"))


def collectives(processes: Processes) -> dict:
    """What the methods return in this process."""
    rank = processes.rank
    first, second = torch.full((3,), rank + 1.0), torch.full((2, 2), 10.0 * (rank + 1))
    processes.add([first, second])
    used, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    if rank == 1:  # a parameter that only one process used
        used.grad = torch.tensor([2.0, 4.0])
    processes.average_gradients([used, unused])
    ticks = (tick for tick in ([1, 2, 3] if rank == 0 else [9]))
    return {
        "add": [first.tolist(), second.tolist()],
        "gradients": [used.grad.tolist(), unused.grad],
        "gather": processes.gather(torch.arange(3.0)[processes.members(3)], 3).tolist(),
        "smallest": processes.smallest(torch.tensor([float(rank), -float(rank)])).tolist(),
        "any": [processes.any(rank == 1), processes.any(False)],
        "first": processes.first(f"of {rank}"),
        "each_first": list(processes.each_first(ticks)),
        "map": processes.map(lambda item: (item, rank), "abc"),
    }


def test_two_processes_calibrate_and_train_what_one_does_up_to_summation(alone, tmp_path):
    def work(processes: Processes) -> dict:  # in one start of both processes, which costs as much as all of this
        return {
            "collectives": collectives(processes),
            "calibrated": calibrated(processes),
            "trained": trained(tmp_path, processes=processes),
        }

    found = in_processes(2, work, tmp_path)
    for rank, each in enumerate(found):
        assert each["collectives"] == {
            "add": [[3.0] * 3, [[30.0, 30.0]] * 2],
            "gradients": [[1.0, 2.0], None],
            "gather": [0.0, 1.0, 2.0],
            "smallest": [0.0, -1.0],
            "any": [True, False],
            "first": "of 0",
            "each_first": [1, 2, 3],
            "map": [("a", 0), ("b", 1), ("c", 0)],
        }, rank
    error = (found[0]["calibrated"] - calibrated()).abs()
    assert float((error < 1e-4).float().mean()) > 0.95  # a search may take the neighbouring scale where two are as good
    assert torch.equal(found[0]["trained"], found[1]["trained"])
    assert difference(found[0]["trained"], alone) < 0.2


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("counts", [(2, 1), (1, 1, 3)])
def test_values_of_all_shares_are_those_of_the_whole_batch(halves, counts):
    total = sum(counts)
    whole = torch.arange(1.0, halves * total * 4 + 1).reshape(halves, total, 4)
    positions = torch.randperm(whole.numel(), generator=torch.Generator().manual_seed(0))
    sums, start = torch.zeros(len(positions)), 0
    for count in counts:
        share = Share(start, count, total, halves)
        own = whole[:, start : start + count].reshape(-1)
        assert share.size(len(own)) == whole.numel()
        sums += share.place(own, positions)
        start += count
    assert torch.equal(sums, whole.reshape(-1)[positions])


def test_a_batch_that_the_processes_do_not_divide_is_refused():
    three = Processes()
    three.size = 3
    with pytest.raises(InputError, match=r"batch is 4, which 3 processes do not divide into equal parts\. Set batch to a multiple of 3"):
        check_divides(three, 4, 1)
    with pytest.raises(InputError, match=r"3 processes x 2 accumulation steps .* a multiple of 6"):
        check_divides(three, 9, 2)
    with pytest.raises(InputError, match="calibration_samples leads to a batch of 1 samples, fewer than the 3 processes"):
        check_shares(three, {32, 1}, what="calibration_samples")
    with pytest.raises(InputError, match="4 accumulation steps"):
        fit(tiny_source(), replace(TRAINING, batch=6), RunOptions(accumulation=4))


@pytest.mark.parametrize(("recipe", "reason"), [(CALIBRATION, "does not train"), (QDiff(), "reconstructs one block at a time")])
def test_accumulation_is_refused_where_nothing_accumulates(recipe, reason):
    with pytest.raises(InputError, match=f"--gradient-accumulation-steps: .* {reason}"):
        fit(tiny_source(), recipe, RunOptions(accumulation=2))


def test_accumulated_gradients_are_those_of_the_whole_batch_up_to_summation(alone, tmp_path):
    assert difference(trained(tmp_path, accumulation=4), alone) < 0.2


@pytest.mark.extended
@pytest.mark.parametrize("recipe", [Dilate(**SMALL, samples=8, dilation=False), Tcaq(**SMALL, rounds=1)])
def test_two_processes_reconstruct_the_blocks_that_one_does_up_to_summation(tmp_path, monkeypatch, recipe):
    """By the activation scales, which both recipes train: 2e-6 apart; 0.2 where the gradients of two halves of a batch are not averaged."""
    monkeypatch.setattr(reconstruct, "blocks_of", lambda *arguments: blocks_of(*arguments)[1:3])

    def scales(processes: Processes = SINGLE, recipe: Recipe = recipe) -> torch.Tensor:
        artifact = fit(tiny_source(), recipe, RunOptions(teacher_dtype="fp32", processes=processes))
        return torch.cat([site.activation.scale.log() for site in artifact.sites.values()])

    found, one, before = in_processes(2, scales, tmp_path), scales(), scales(recipe=replace(recipe, steps=1))
    assert torch.equal(found[0], found[1])
    assert float((found[0] - one).norm()) < 0.1 * float((one - before).norm())


@pytest.mark.extended
@pytest.mark.parametrize(
    ("recipe", "passes"),
    [
        (SvdQuant(rows=2, calibration_samples=4, rank=2), ()),
        (replace(TRAINING, rotate="auto"), ()),
        (TRAINING, (Adp(groups=2, candidates=8, probes=2), Tac(samples=4))),
        (TRAINING, (Pcr(),)),
        (Quest(rows=3, steps=2, batch=4, calibration_samples=4), ()),
        (MPQDM(rows=3, steps=2, batch=4, calibration_samples=4, rank=2, residual_share=0.1), ()),
    ],
)
def test_whatever_has_no_share_runs_identically_in_each_process(tmp_path, recipe, passes):
    kind = "unet2d-condition"

    def work(processes: Processes) -> torch.Tensor:  # `fit` raises where the digests of the processes differ
        return codes(fit(tiny_source(kind), recipe, RunOptions(processes=processes), passes=passes))

    found = in_processes(2, work, tmp_path)
    assert torch.equal(found[0], found[1])


def codes(artifact: Artifact) -> torch.Tensor:
    """All weight codes."""
    return torch.cat([site.codes.flatten().float() for site in artifact.sites.values()])
