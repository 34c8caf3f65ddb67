"""The tiny models of conftest as sources, and as the context that recipes work on."""

import torch
from diffusers import DDIMScheduler

from calibration.data.trajectory_pool import Trajectories
from calibration.recipe import Recipe, TrainingContext
from calibration.run.options import Run, RunOptions
from calibration.student.teacher import Teacher
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from edm_deploy.pipelines.source import Source
from tests.conftest import PIPELINE, TINY, tiny_model

CPU = torch.device("cpu")


def tiny_source(kind: str = "unet2d") -> Source:
    """A tiny random model with a DDIM schedule of 1000 timesteps."""
    _, config, model = tiny_model(kind)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=True)
    return Source(name=kind, family=TINY[kind][0], config=config, model=model, scheduler=scheduler, pipeline=PIPELINE)


def tiny_context(recipe: Recipe, kind: str = "unet2d", *, samples: int = 2, on_progress=lambda progress: None) -> TrainingContext:
    """Student, teacher and a new pool of a tiny model, in float32 and without checkpoints."""
    source = tiny_source(kind)
    timesteps = calibrated_timesteps(source.scheduler, recipe.rows)
    teacher = Teacher(source, CPU)
    student = recipe.student(source, timesteps, CPU, teacher=teacher)
    trajectories = Trajectories(source, timesteps, size=samples, eta=0.0, seed=0, device=CPU)
    run = Run(options=RunOptions(teacher_dtype="fp32"), identity={}, on_progress=on_progress)
    return TrainingContext(student, teacher, trajectories, run)
