import torch

from calibration import RunOptions, fit
from calibration.data import preview
from calibration.recipes.efficientdm import EfficientDM
from calibration.run.reports import Reporter
from tests.calibration.tiny import tiny_source

RECIPE = EfficientDM(rows=1, steps=2, batch=2, calibration_samples=2, rank=2)


class Recorded:
    """A report that keeps what it gets."""

    def __init__(self) -> None:
        self.values, self.seen = [], []

    def scalars(self, step, values):
        self.values.append((step, sorted(values)))

    def samples(self, step, student, teacher):
        self.seen.append((step, student.shape, float((student - teacher).abs().mean())))


def test_a_report_does_not_change_the_result(monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 2)
    report = Recorded()
    artifact = fit(tiny_source(), RECIPE, RunOptions(report=report))
    assert artifact.digest == fit(tiny_source(), RECIPE, RunOptions()).digest
    assert report.values == [(1, ["loss", "rate_factor"]), (2, ["loss", "rate_factor"])]
    assert [step for step, _, _ in report.seen] == [1, 2]
    assert all(error > 0 for _, _, error in report.seen)


def test_samples_are_reported_at_every_tenth_and_at_the_end_and_the_teachers_are_drawn_once():
    report, drawn = Recorded(), []

    def sample(network):
        drawn.append(network)
        return torch.ones(1) * len(drawn)

    reporter = Reporter(report, sample, "student", "teacher", 40)
    for step in range(1, 11):
        reporter.after(step, {}, finished=step == 10)
    assert [step for step, _, _ in report.seen] == [4, 8, 10]
    assert drawn == ["teacher", "student", "student", "student"]
