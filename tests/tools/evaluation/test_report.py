from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy_tools.evaluation.report import bits_section, html_table
from edm_deploy_tools.evaluation.results import EvaluationTarget
from tests.edm_deploy.artifact.test_relaxed_timesteps import wide


def test_a_table_escapes_what_it_shows():
    table = html_table([{"": "<a>", "n": 0.123456}], numbers=("n",))
    assert "&lt;a&gt;" in table
    assert '<td class="number">0.1235</td>' in table


def test_what_is_not_known_is_a_dash():
    assert "<td>-</td>" in html_table([{"": "a", "x": None}])


def test_bits_are_drawn_where_they_differ_by_layer_or_by_timestep(artifact_w4a4):
    assert bits_section(target_of(artifact_w4a4)) == ""  # the layers that every W4A4 model keeps at 8 bits are no allocation
    mask = mask_from_intervals([(800, 999)], 1000)
    relaxed = bits_section(target_of(replace(artifact_w4a4, relaxed=mask, sites=wide(artifact_w4a4))))
    name = next(name for name, site in artifact_w4a4.sites.items() if site.activation.bits == 4)
    allocated = artifact_w4a4.sites | {name: replace(artifact_w4a4.sites[name], activation=artifact_w4a4.sites["conv_in"].activation)}
    for section in (relaxed, bits_section(target_of(replace(artifact_w4a4, sites=allocated)))):
        assert "Bits of the inputs: a" in section and "<svg" in section and name in section


def target_of(artifact):
    return EvaluationTarget(label="a", path=Path("a"), artifact=artifact, engine=None)
