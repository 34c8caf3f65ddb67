"""The artifact: a quantized denoiser on disk and in memory, and the reference executor that computes it exactly."""

from edm_deploy.artifact.artifact import Artifact

__all__ = ["Artifact"]
