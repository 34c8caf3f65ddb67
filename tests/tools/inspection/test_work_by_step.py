from dataclasses import replace

from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy.network.layer_costs import model_work
from edm_deploy_tools.inspection.work_by_step import work_by_step
from tests.edm_deploy.artifact.test_relaxed_timesteps import wide


def rows_of(artifact):
    work = model_work(artifact.family_object, artifact.config).sites
    rows = work_by_step(artifact, work)
    kept = sum(work[name].macs for name, site in artifact.sites.items() if site.weight_bits == 8) / sum(site.macs for site in work.values())
    return {(row["timesteps"], row["backend"]): (row["INT4 %"], row["INT8 %"], row["float %"]) for row in rows}, round(100 * kept, 1)


def test_one_graph_has_one_row_for_each_backend(artifact_w4a4):
    found, kept = rows_of(artifact_w4a4)
    assert {timesteps for timesteps, _ in found} == {"0 to 999"}
    assert found["0 to 999", "cuda"] == (round(100 - kept, 1), kept, 0.0)  # every 4-bit site in INT4, the layers kept at 8 bits in INT8
    assert found["0 to 999", "openvino"] == (0.0, 100.0, 0.0)


def test_relaxed_steps_are_int8_with_tables_and_floating_point_without(artifact_w4a4):
    mask = mask_from_intervals([(800, 999)], 1000)
    found, _ = rows_of(replace(artifact_w4a4, relaxed=mask, sites=wide(artifact_w4a4)))
    assert found["0 to 799", "cuda"] == rows_of(artifact_w4a4)[0]["0 to 999", "cuda"]
    assert found["800 to 999", "cuda"] == (0.0, 100.0, 0.0)
    assert rows_of(replace(artifact_w4a4, relaxed=mask))[0]["800 to 999", "cuda"] == (0.0, 0.0, 100.0)
