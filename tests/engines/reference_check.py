"""How far an engine may be from the reference, end to end."""

from __future__ import annotations

from pathlib import Path

import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import Reference
from edm_deploy.runtime.load import load_denoiser
from tests.conftest import tiny_inputs, tiny_model


def check_against_reference(engine: Path, artifact: Artifact, *, slack: float = 1.0, device: str | None = None) -> None:
    """Each sample, at its own timestep, is no further from the reference than the reference is from the float model.

    Codes that differ at rounding ties cascade through the network, so end to end nothing tighter holds; sites are compared one by one elsewhere.
    `slack` is for an engine that rounds between the sites, which the reference does not.
    """
    family, _, model = tiny_model("unet2d")
    inputs = tiny_inputs("unet2d", batch=4)
    expected = Reference(artifact)(inputs)
    found = load_denoiser(engine, device=device)(**inputs).sample.float()
    floats = family.forward(model, inputs)
    for sample in range(4):
        distance = torch.linalg.vector_norm(found[sample] - expected[sample])
        assert distance <= slack * torch.linalg.vector_norm(expected[sample] - floats[sample])
