"""The tiny models of conftest as sources, with their first settings."""

from diffusers import DDIMScheduler

from edm_deploy.pipelines.source import Source
from tests.conftest import PIPELINE, TINY, tiny_model


def tiny_source(kind: str = "unet2d") -> Source:
    """A tiny random model with a DDIM schedule of 1000 timesteps."""
    _, config, model = tiny_model(kind)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=True)
    return Source(name=kind, family=TINY[kind][0], config=config, model=model, scheduler=scheduler, pipeline=PIPELINE)
