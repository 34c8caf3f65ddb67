"""Refuse a model config that cannot be quantized and sampled, from shapes alone, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edm_deploy.errors import UnsupportedError, first_line
from edm_deploy.network.family import Config, Family
from edm_deploy.network.meta_model import meta_inputs, meta_model


def check_config(family: Family, config: Config) -> None:
    """Check that a model of this config builds, runs at its sample size, and predicts what a scheduler can step.

    Runs one forward pass on the meta device, without memory or arithmetic.

    Raises:
        UnsupportedError: It does not; the message names the key of the config, or gives the reason of diffusers or torch.
    """
    model = meta_model(family, config)
    family.sites(model)
    multiple = family.size_multiple(config)
    if any(side % multiple for side in family.sample_size(config)):
        raise UnsupportedError(
            f"{family.class_name} with sample_size={config['sample_size']!r}: expected height and width that are multiples of {multiple}, "
            "so that every level or patch of the model is whole. Set another sample_size in config.json."
        )
    try:
        with torch.no_grad():
            output = family.forward(model, meta_inputs(family, config))
        predicted = tuple(family.prediction(config, output).shape[1:])
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as err:
        raise UnsupportedError(
            f"{family.class_name} with this config does not run in diffusers: {first_line(err)}. Check config.json."
        ) from err
    if predicted != family.latent_shape(config):
        raise UnsupportedError(
            f"{family.class_name} with this config predicts {list(predicted)} for a sample of {list(family.latent_shape(config))}; "
            "a scheduler needs equal shapes. Check in_channels and out_channels in config.json."
        )


def check_schedule(family: Family, config: Config, scheduler_config: Mapping[str, Any]) -> None:
    """Check that the model has an embedding for every timestep of its scheduler.

    Raises:
        UnsupportedError: The model's table of timestep embeddings is shorter than the training schedule.
    """
    embedded, scheduled = family.embedded_timesteps(config), int(scheduler_config.get("num_train_timesteps") or 1000)
    if embedded is not None and embedded < scheduled:
        raise UnsupportedError(
            f"{family.class_name} has embeddings of {embedded} timesteps, but its scheduler has {scheduled}. "
            "Set num_train_timesteps in scheduler_config.json to what the model was trained with."
        )
