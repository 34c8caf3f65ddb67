import json

import pytest

from edm_deploy.errors import EdmDeployError, InputError
from edm_deploy_tools import bench_scale
from edm_deploy_tools.bench_scale import RESULTS, run_steps, sites_of, steps_of, verdicts
from edm_deploy_tools.common import child_process
from edm_deploy_tools.common.child_process import Measured


def steps(backends=("trt-rtx",)):
    return steps_of("sd15", "W4A8", 20, 2, backends, "sm_86", low_memory=False)


def test_one_graph_serves_the_backends_of_one_float_type():
    assert [step.name for step in steps(["trt-rtx", "ort", "openvino"])] == [
        "calibrate",
        "export fp16",
        "build trt-rtx",
        "export fp32",
        "build ort",
        "build openvino",
    ]


def test_cuda_is_built_from_the_artifact_for_the_same_gpu():
    made = {step.name: step.arguments for step in steps(["cuda"])}
    assert list(made) == ["calibrate", "build cuda"]
    assert made["build cuda"][:2] == ("build-engine", "artifact")
    assert made["build cuda"][-2:] == ("--gpu", "sm_86")


def test_cpu_is_built_from_the_artifact_for_no_gpu():
    made = {step.name: step.arguments for step in steps(["cpu"])}
    assert list(made) == ["calibrate", "build cpu"]
    assert made["build cpu"][:2] == ("build-engine", "artifact")
    assert "--gpu" not in made["build cpu"]


def test_bits_that_are_no_scheme_are_refused():
    with pytest.raises(InputError, match=r"--bits '4': expected a scheme such as W4A8"):
        steps_of("sd15", "4", 20, 2, [], "sm_86", low_memory=False)


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that were run; each makes its directory and takes a second and a gigabyte."""
    run = []

    def pretend(command, *, cwd):
        run.append(command[3])
        (cwd / command[command.index("--out") + 1]).mkdir(exist_ok=True)
        return Measured(returncode=0, seconds=1.0, peak_bytes=10**9, last_line="")

    monkeypatch.setattr(child_process, "run_measured", pretend)
    monkeypatch.setattr(bench_scale, "sites_of", lambda engine: {"int8": 3})
    return run


def test_a_step_of_the_same_command_is_kept(commands, tmp_path):
    first = run_steps(steps(), tmp_path)
    assert run_steps(steps(), tmp_path) == first
    assert commands == ["calibrate", "export", "build-engine"]


def test_a_build_counts_how_its_sites_are_computed(commands, tmp_path):
    assert run_steps(steps(), tmp_path)["build trt-rtx"]["sites"] == {"int8": 3}


def test_sites_are_counted_in_the_manifest_of_the_engine(onnx_w4a4, tmp_path):
    from engines import build_engine

    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend="ort")
    assert sum(sites_of(tmp_path / "engine").values()) == len(manifest.sites)


def test_a_changed_command_runs_again_with_all_later_steps(commands, tmp_path):
    run_steps(steps(), tmp_path)
    known = json.loads((tmp_path / RESULTS).read_text())
    known["export fp16"]["arguments"] = []
    (tmp_path / RESULTS).write_text(json.dumps(known))
    run_steps(steps(), tmp_path)
    assert commands == ["calibrate", "export", "build-engine", "export", "build-engine"]


def test_a_failed_step_ends_the_run_with_its_last_line(monkeypatch, tmp_path):
    failed = Measured(returncode=2, seconds=3.0, peak_bytes=1, last_line="Error: no")
    monkeypatch.setattr(child_process, "run_measured", lambda command, *, cwd: failed)
    with pytest.raises(EdmDeployError, match="calibrate failed after 3 s: Error: no"):
        run_steps(steps(), tmp_path)


def test_each_limit_is_compared_with_the_measurement():
    record = {"seconds": 90.0, "peak_bytes": 3e9, "out_bytes": 5e8}
    records = {"calibrate": record | {"peak_bytes": 9e9}, "export fp16": record, "build trt-rtx": record}
    found = {row["limit"]: row["kept"] for row in verdicts("sd15", "W4A8", records, float_bytes=int(1.72e9))}
    assert found == {
        "calibrate + export fp16 + build trt-rtx": "yes",
        "peak memory of the three": "NO",
        "export fp16: peak memory / float16 weights": "NO",
        "artifact / float16 weights": "yes",
    }


@pytest.mark.parametrize(("layers", "limits"), [(None, True), (2, False)])
def test_limits_apply_to_complete_models(layers, limits, commands, monkeypatch, tmp_path, capsys):
    written = []
    monkeypatch.setattr(
        "edm_deploy_tools.inspection.random_model.write_random_model",
        lambda chosen, out, size: (written.append(chosen), out.mkdir(parents=True)),
    )
    monkeypatch.setattr("edm_deploy_tools.inspection.random_model.weight_bytes", lambda model: 10**9)
    bench_scale.main("dit-xl-2-256", "W4A8", 2, 2, 16, layers, "trt-rtx,cuda", "sm_86", False, tmp_path)
    printed = capsys.readouterr().out
    assert ("artifact / float16 weights" in printed) == limits
    assert "3 int8" in printed
    assert written[0].config["num_layers"] == (layers or 28)
    assert (tmp_path / ("dit-xl-2-256-16" + ("-2-layers" if layers else "")) / RESULTS).is_file()
