"""How far an engine may be from the reference, end to end."""

from __future__ import annotations

from pathlib import Path

import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import Reference
from edm_deploy.numerics.activation_table import table_rows
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_denoiser
from tests.conftest import check_no_further, tiny_inputs, tiny_model


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


def check_own_rows(denoiser: EngineDenoiser, artifact: Artifact) -> None:
    """Samples of a batch at mixed timesteps, each with its own row of the tables, are no further from the float model than each alone."""
    inputs = tiny_inputs("unet2d", 4)
    assert len(set(table_rows(artifact.row_of_timestep, inputs["timestep"]).tolist())) > 1
    together = denoiser(**inputs).sample
    family, _, model = tiny_model("unet2d")
    exact = family.forward(model, inputs)
    for index in range(4):
        alone = denoiser(**{name: value[index : index + 1] for name, value in inputs.items()}).sample
        # torch's own kernels may sum a batch in another order; rows are compared site by site in tests/contracts
        check_no_further(together[index : index + 1], alone, exact[index : index + 1])
