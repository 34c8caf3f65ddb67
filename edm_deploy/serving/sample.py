"""One image while it is computed: its scheduler, its random numbers and its latents, from one call of the denoiser to the next."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edm_deploy.network.family import SAMPLE, TIMESTEP
from edm_deploy.pipelines.sampling import is_flow, set_steps
from edm_deploy.serving.steps import StepTable, table_of, take

Row = Mapping[str, Tensor]  # conditioning of one row of a call, [1, ...] by graph input
CLEAN = "pred_original_sample"


class Schedule:
    """A scheduler whose steps are set, and where in them sampling starts. Samples take copies: a scheduler holds the state of one sequence of samples.

    Args:
        scheduler: A diffusers scheduler, which is not modified.
        steps: Inference steps of the whole schedule.
        sigmas: As `edm_deploy.pipelines.sampling.set_steps`.
        strength: Share of the steps that are computed, above 0 to 1.

    Raises:
        InputError: The scheduler has no such number of steps.
    """

    def __init__(self, scheduler: Any, steps: int, sigmas: Sequence[float] | None = None, *, strength: float = 1.0) -> None:
        self._template = _copied(scheduler)
        set_steps(self._template, steps, sigmas)
        order = int(getattr(scheduler, "order", 1))  # timesteps of one inference step
        begin = (steps - min(max(1, int(steps * strength)), steps)) * order
        if begin and hasattr(self._template, "set_begin_index"):  # others, such as DDIM, read the position from the timestep
            self._template.set_begin_index(begin)
        self.timesteps = self._template.timesteps[begin:]
        self.values = [float(timestep) for timestep in self.timesteps.to(torch.float32)]
        self.table = table_of(self._template, begin)
        self.init_sigma = float(getattr(self._template, "init_noise_sigma", 1.0))  # flow matching starts from the noise itself

    def __len__(self) -> int:
        """Calls of the denoiser that an image takes."""
        return len(self.values)

    def scheduler(self) -> Any:
        """A scheduler at the start of the schedule, for one image."""
        return _copied(self._template)

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The sample at the first timestep, float32 [1, ...], of a finished one."""
        scheduler = self.scheduler()
        first = self.timesteps[:1]
        noised: Tensor = scheduler.scale_noise(clean, first, noise) if is_flow(scheduler) else scheduler.add_noise(clean, noise, first)
        return noised


class Sample:
    """One image while it is computed. Its arithmetic does not depend on what else is computed.

    Args:
        schedule: Its schedule.
        latents: float32 [1, ...], the sample at the first timestep.
        generator: Source of a stochastic scheduler's noise.
        rows: The conditioning of its rows: one, or the unconditional and the conditional one of classifier-free guidance.
        guidance: Scale of classifier-free guidance; not used with one row.
    """

    def __init__(self, schedule: Schedule, latents: Tensor, generator: torch.Generator, rows: Sequence[Row], guidance: float = 1.0) -> None:
        self.schedule = schedule
        self.latents = latents
        self.rows = tuple(rows)
        self.position = 0
        self.clean: Tensor | None = None  # of a step table
        self._scheduler = schedule.scheduler()
        self._guidance = guidance
        accepted = inspect.signature(self._scheduler.step).parameters
        self._extra = {"generator": generator} if "generator" in accepted else {}
        self._scaled = self._scale()
        self._latest: tuple[Tensor, Tensor, float] | None = None  # input, prediction and timestep of the latest step

    @property
    def timestep(self) -> float:
        """Timestep of the next call."""
        return self.schedule.values[self.position]

    @property
    def done(self) -> bool:
        """Whether the latents are those of the finished image."""
        return self.position == len(self.schedule)

    def inputs(self) -> list[dict[str, Tensor]]:
        """Graph inputs of each of its rows in the next call, [1, ...] by name."""
        timestep = torch.tensor([self.timestep], dtype=torch.float32)
        return [{SAMPLE: self._scaled, TIMESTEP.name: timestep, **row} for row in self.rows]

    def guided(self, prediction: Tensor) -> Tensor:
        """The prediction [1, ...] of the denoiser's output for each row of `inputs`, [R, ...], and remember it for `estimate`."""
        if len(self.rows) == 2:
            unconditional, conditional = prediction[:1], prediction[1:]
            prediction = unconditional + self._guidance * (conditional - unconditional)
        else:
            prediction = prediction.clone()  # a part of the engine's output
        self._latest = self._scaled, prediction, self.timestep
        return prediction

    def step(self, prediction: Tensor) -> None:
        """Take a step of the diffusers scheduler, with a prediction that `guided` returned."""
        timestep = self.schedule.timesteps[self.position]
        self.latents = self._scheduler.step(prediction, timestep, self.latents, return_dict=False, **self._extra)[0]
        self.position += 1
        if not self.done:
            self._scaled = self._scale()

    def stepped(self, latents: Tensor, scaled: Tensor | None, clean: Tensor | None) -> None:
        """Record a step that a table took, [1, ...] each; the input is the sample itself where it is None."""
        self.latents, self.clean = latents, clean
        self._scaled = latents if scaled is None else scaled
        self.position += 1

    def estimate(self) -> Tensor:
        """The finished sample as the latest prediction estimates it, float32 [1, ...]; the sample itself before the first step.

        The input of a diffusion's denoiser is sqrt(alpha) clean + sqrt(1 - alpha) noise at its timestep, whatever units the scheduler computes in.
        """
        if self._latest is None or self.done:
            return self.latents
        scaled, prediction, timestep = self._latest
        if is_flow(self._scheduler):
            sigma: float = timestep / int(self._scheduler.config.num_train_timesteps)
            return scaled - sigma * prediction
        alphas = self._scheduler.alphas_cumprod
        alpha = float(alphas[min(max(round(timestep), 0), len(alphas) - 1)])
        a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
        match self._scheduler.config.get("prediction_type", "epsilon"):
            case "v_prediction":
                clean = a * scaled - b * prediction
            case "sample":
                clean = prediction
            case _:
                clean = (scaled - b * prediction) / a
        return clean

    def _scale(self) -> Tensor:
        if not hasattr(self._scheduler, "scale_model_input"):
            return self.latents
        scaled: Tensor = self._scheduler.scale_model_input(self.latents, self.schedule.timesteps[self.position])
        return scaled


def advance(samples: Sequence[Sample], predictions: Sequence[Tensor]) -> None:
    """Take a step of each sample: those of one formula together, the others with their schedulers.

    Args:
        samples: Samples that are not done.
        predictions: float32 [R, ...], the denoiser's output for the rows of each.
    """
    groups: dict[Hashable, list[tuple[Sample, Tensor]]] = {}
    for sample, output in zip(samples, predictions, strict=True):
        prediction = sample.guided(output)
        table = sample.schedule.table
        if table is None:
            sample.step(prediction)
        else:
            groups.setdefault((table.kind, table.clip, sample.latents.shape), []).append((sample, prediction))
    for members in groups.values():
        _step_together([sample for sample, _ in members], torch.cat([prediction for _, prediction in members]))


def _step_together(samples: Sequence[Sample], prediction: Tensor) -> None:
    tables = [sample.schedule.table for sample in samples if sample.schedule.table is not None]
    first: StepTable = tables[0]
    rows = torch.stack([table.coefficients[sample.position] for table, sample in zip(tables, samples, strict=True)])
    clean = torch.cat([sample.latents if sample.clean is None else sample.clean for sample in samples]) if first.kind == "dpm" else None
    taken = take(first, rows, torch.cat([sample.latents for sample in samples]), prediction, clean)
    for at, sample in enumerate(samples):
        # Cloned: a part of a tensor keeps all of it in memory, however long this sample waits for its next call.
        scaled, clean = (None if value is None else value[at : at + 1].clone() for value in (taken.scaled, taken.clean))
        sample.stepped(taken.latents[at : at + 1].clone(), scaled, clean)


def _copied(scheduler: Any) -> Any:
    """A copy of a scheduler with its own state. Its config and tensors are shared: schedulers replace tensors, and write into none."""
    shared = {id(value): value for value in (scheduler.config, *vars(scheduler).values()) if isinstance(value, Tensor | Mapping)}
    return copy.deepcopy(scheduler, shared)
