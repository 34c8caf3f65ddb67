from dataclasses import replace

import pytest
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import Reference, reference_with_correction
from edm_deploy.artifact.relaxed_timesteps import quantized_graph, relaxed_graph
from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy.errors import ArtifactError
from edm_deploy.numerics.activation_table import ActivationTable
from tests.conftest import tiny_inputs


def relaxed_until(last, timesteps=1000):
    return mask_from_intervals([(0, last)], timesteps)


def test_the_second_graph_has_the_same_weights_and_no_quantized_input(artifact_w4a4):
    part = relaxed_graph(replace(artifact_w4a4, relaxed=relaxed_until(99)))
    assert part.relaxed is None
    assert all(site.activation is None and site.codes is artifact_w4a4.sites[name].codes for name, site in part.sites.items())


def wide(artifact, bits=8):
    """The artifact with a table of 8 bits for relaxed timesteps at each site of 4."""
    rows = len(artifact.timesteps)
    table = ActivationTable(
        bits=bits,
        scale=torch.full((rows,), 0.03),
        qmin=torch.full((rows,), -128, dtype=torch.int8),
        qmax=torch.full((rows,), 127, dtype=torch.int8),
    )
    return {name: replace(site, relaxed_activation=table if site.activation.bits < 8 else None) for name, site in artifact.sites.items()}


def test_with_tables_the_second_graph_is_integer_and_sites_of_8_bits_keep_theirs(artifact_w4a4, tmp_path):
    artifact = replace(artifact_w4a4, relaxed=relaxed_until(99), sites=wide(artifact_w4a4))
    loaded = Artifact.load(artifact.save(tmp_path / "a"))
    assert loaded.digest == artifact.digest != replace(artifact, sites=artifact_w4a4.sites).digest
    assert (loaded.relaxed_bits, replace(artifact, sites=artifact_w4a4.sites).relaxed_bits, artifact_w4a4.relaxed_bits) == (8, 16, None)
    first, second = quantized_graph(loaded), relaxed_graph(loaded)
    assert first.digest == artifact_w4a4.digest
    assert {site.scheme for site in second.sites.values()} == {"W4A8", "W8A8"}
    for name, site in second.sites.items():
        own = artifact.sites[name]
        assert site.activation.equals(own.activation if own.activation.bits == 8 else own.relaxed_activation)
        assert torch.equal(site.codes, own.codes) and site.relaxed_activation is None
    inputs = tiny_inputs("unet2d", batch=2)  # timesteps 0 and 999
    whole = reference_with_correction(loaded)(inputs)
    torch.testing.assert_close(whole[0], Reference(second)(inputs)[0])
    torch.testing.assert_close(whole[1], Reference(first)(inputs)[1])


def test_the_whole_reference_relaxes_and_corrects_each_sample_by_its_timestep(artifact_w4a4):
    inputs = tiny_inputs("unet2d", batch=3)  # timesteps 0, 500, 999
    rows = torch.tensor([0] * 600 + [1] * 400, dtype=torch.int32)
    correction = Correction(row_of_timestep=rows, scale=torch.tensor([[1.0] * 3, [0.5] * 3]), input_bias=torch.zeros(2, 3))
    whole = reference_with_correction(replace(artifact_w4a4, relaxed=relaxed_until(99), correction=correction))(inputs)
    first, others = ({name: value[part] for name, value in inputs.items()} for part in (slice(1), slice(1, 3)))  # as they are routed
    relaxed, strict = Reference(relaxed_graph(artifact_w4a4))(first), Reference(artifact_w4a4)(others)
    for index, expected in enumerate((relaxed[0], strict[0], 0.5 * strict[1])):
        torch.testing.assert_close(whole[index], expected)
    assert not torch.allclose(Reference(artifact_w4a4)(first), relaxed, rtol=1e-3)


def test_an_artifact_keeps_both_and_its_digest_sees_them(artifact_w4a4, tmp_path):
    correction = Correction(
        row_of_timestep=artifact_w4a4.row_of_timestep, scale=torch.full((5, 3), 1.1), input_bias=torch.full((5, 3), 0.01)
    )
    artifact = replace(artifact_w4a4, relaxed=relaxed_until(199), correction=correction)
    loaded = Artifact.load(artifact.save(tmp_path / "a"))
    assert loaded.digest == artifact.digest
    assert torch.equal(loaded.relaxed, artifact.relaxed)
    assert torch.equal(loaded.correction.scale, correction.scale)
    digests = {replace(artifact, **change).digest for change in ({}, {"relaxed": None}, {"correction": None})} | {artifact_w4a4.digest}
    assert len(digests) == 4


def test_tables_for_relaxed_timesteps_are_all_or_none(artifact_w4a4):
    sites = wide(artifact_w4a4)
    with pytest.raises(ArtifactError, match="has a table for relaxed timesteps, and the artifact has no such timesteps"):
        replace(artifact_w4a4, sites=sites).validate()
    narrow = next(name for name, site in sites.items() if site.relaxed_activation is not None)
    partial = sites | {narrow: artifact_w4a4.sites[narrow]}
    with pytest.raises(ArtifactError, match=f"site '{narrow}' has no table for relaxed timesteps"):
        replace(artifact_w4a4, sites=partial, relaxed=relaxed_until(99)).validate()
    kept = next(name for name, site in sites.items() if site.relaxed_activation is None)
    doubled = sites | {kept: replace(sites[kept], relaxed_activation=sites[narrow].relaxed_activation)}
    with pytest.raises(ArtifactError, match=f"Site '{kept}': has a table of 8 bits for relaxed timesteps, expected none at W8A8"):
        replace(artifact_w4a4, sites=doubled, relaxed=relaxed_until(99)).validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relaxed": mask_from_intervals([(0, 9)], 10)}, "relaxed has 10 numbers up to 1, expected 1000 of 0 and 1"),
        ({"relaxed": torch.zeros(1000, dtype=torch.uint8)}, "relaxed has 1000 numbers up to 0"),
        (
            {
                "correction": Correction(
                    row_of_timestep=torch.zeros(1000, dtype=torch.int32), scale=torch.ones(1, 4), input_bias=torch.zeros(1, 4)
                )
            },
            r"correction: scale has shape \[1, 4\], expected \[1, 3\]",
        ),
    ],
)
def test_an_artifact_refuses_what_no_runtime_could_do(artifact_w4a4, change, message):
    with pytest.raises(ArtifactError, match=message):
        replace(artifact_w4a4, **change).validate()
