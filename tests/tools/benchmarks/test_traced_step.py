from edm_deploy_tools.benchmarks.traced_step import TracedModel, code_formats, step_rows
from engines.performance.gpus import gpu_named
from tests.conftest import tiny_model
from tests.engines.rewritten import program_of


def test_a_traced_model_gives_a_row_for_each_way_to_run_it():
    family, config, _ = tiny_model("unet2d")
    rows = step_rows(TracedModel(family=family, config=config, program=program_of("unet2d")), gpu_named("rtx3090"), 2)
    assert [row["graph"] for row in rows][:3] == ["float16, compiled", "ours", "ours, rest compiled"]
    assert all(row["step ms"] > 0 for row in rows)
    assert rows[2]["kernels"] < rows[1]["kernels"]
    assert rows[1]["norms ms"] == 0, "every group norm is fused"
    assert rows[3]["kernels"] == rows[1]["kernels"] + 4 * 2, "in front of each attention of ours, two kernels for the keys"


def test_without_int4_tensor_cores_all_sites_are_eight_bits():
    family, config, _ = tiny_model("unet2d")
    assert set(code_formats(family, config, four_bits=False).values()) == {"s8"}
    assert set(code_formats(family, config).values()) == {"s4", "s8"}


def test_branches_in_the_kernels_are_fewer_kernels_and_less_time_than_products_of_torch():
    family, config, _ = tiny_model("dit")
    model = TracedModel(family=family, config=config, program=program_of("dit"))
    rows = step_rows(model, gpu_named("rtx3090"), 2, model.with_branches(4))
    fused, by_torch = rows[-2:]
    assert [row["graph"] for row in (fused, by_torch)] == ["ours, branches of rank 4 in the kernels", "ours, branches of rank 4 by torch"]
    assert fused["kernels"] < by_torch["kernels"]
    assert fused["step ms"] < by_torch["step ms"]
