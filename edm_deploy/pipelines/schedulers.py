"""Schedulers by their short names, with the noise schedule of a model."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.model_index import COMPONENTS
from edm_deploy.registry import suggestion
from edm_deploy.storage.directories import INDEX_FILE, SCHEDULER_FILE, other_components, read_pipeline_files

SCHEDULERS: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}


FLOW = "flow-"  # prefix of the names of flow-matching schedulers


def scheduler_named(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of a short name (`ddim`, `euler`, ...), with the noise schedule of `config`.

    Raises:
        UnsupportedError: There is none of this name, or one of model and scheduler is of a flow and the other of a diffusion.
    """
    if name not in SCHEDULERS:
        raise UnsupportedError(f"No scheduler {name!r}.{suggestion(name, SCHEDULERS)} Known: {', '.join(SCHEDULERS)}.")
    fitting = schedulers_for(config)
    if name not in fitting:
        process = "by flow matching" if fitting[0].startswith(FLOW) else "as a diffusion"
        raise UnsupportedError(f"Scheduler {name!r} cannot sample this model, which was trained {process}. Choose {', '.join(fitting)}.")
    clips = "clip_sample" in config or "clip_sample" in _parameters(str(config.get("_class_name")))
    if not clips and "clip_sample" in _parameters(SCHEDULERS[name]):
        # Latents exceed 1. Where the model's scheduler has no clipping, the default of another scheduler must not add it.
        config = {**config, "clip_sample": False}
    return scheduler_from_config(SCHEDULERS[name], config)


def _parameters(class_name: str) -> Mapping[str, Any]:
    scheduler_class = getattr(diffusers, class_name, None)
    return {} if scheduler_class is None else inspect.signature(scheduler_class.__init__).parameters


def schedulers_for(config: Mapping[str, Any]) -> list[str]:
    """Names of the schedulers for models whose scheduler has this config: those of a flow, or those of a diffusion."""
    return [name for name in SCHEDULERS if name.startswith(FLOW) == is_flow_config(config)]


def is_flow_config(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is of a flow (sigmas from 1 to 0) rather than of a diffusion."""
    return str(config.get("_class_name", "")).startswith("FlowMatch") or ("shift" in config and "beta_schedule" not in config)


def default_scheduler(engine: Path) -> str | None:
    """`ddim` for pixel-space diffusion models, whose own scheduler is usually DDPM with a thousand steps; None, the pipeline's own, for others."""
    files = read_pipeline_files(engine)
    index = files.get(INDEX_FILE, {})
    latent = any(other_components(index, component) for component in COMPONENTS if component in index)
    return None if latent or is_flow_config(files.get(SCHEDULER_FILE, {})) else "ddim"


def scheduler_from_config(class_name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of this class name and config.

    Raises:
        UnsupportedError: diffusers has no such class.
    """
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None:
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has no scheduler {class_name!r}. Install the diffusers version that the model was saved with."
        )
    return scheduler_class.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def check_steps(steps: float) -> None:
    """Raises InputError where there is no inference step to take."""
    if not steps >= 1:
        raise InputError(f"{steps} inference steps: expected 1 or more. Pass another num_inference_steps.")


def refuse_no_steps(scheduler: Any) -> None:  # Any: diffusers' schedulers share no useful base class
    """Make `scheduler.set_timesteps` raise InputError for fewer than one step; diffusers divides by 0, and samples in no step for a negative number.

    On the instance, and bound to it, so that its class remains diffusers' own and a copy has its own method.
    """
    own = type(scheduler).set_timesteps

    @functools.wraps(own)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        steps = args[0] if args else kwargs.get("num_inference_steps")
        if isinstance(steps, int | float):
            check_steps(steps)
        own(self, *args, **kwargs)

    scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)
