from __future__ import annotations

import pytest
import torch

from calibration.run.checkpoint import save_checkpoint
from calibration.run.options import RunOptions
from edm_deploy.artifact.artifact import ARTIFACT
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.storage.output_directory import check_output
from edm_deploy_tools.commands.quantize_model import QuantizeRequest, compute_dtypes, run_options
from edm_deploy_tools.commands.quantize_model import quantize as run_quantize
from edm_deploy_tools.common.recipe_settings import recipe_with


def quantize(model, out, recipe, options, **changes):
    return run_quantize(QuantizeRequest(model=model, out=out, recipe=recipe, options=options, **changes))


def test_the_teacher_s_dtype_stays_the_default_where_none_is_given():
    assert run_options(device="cpu").teacher_dtype == RunOptions().teacher_dtype
    assert run_options(device="cpu", teacher_dtype="fp32").teacher_dtype == "fp32"


def test_an_empty_directory_and_one_of_ours_may_be_replaced(tmp_path, chain):
    check_output(tmp_path, kind=ARTIFACT)
    check_output(chain.artifact, kind=ARTIFACT)
    with pytest.raises(ArtifactError, match="holds other files"):
        check_output(chain.model, kind=ARTIFACT)


def test_a_scheme_is_refused_before_the_model_is_looked_for(tmp_path):
    recipe = recipe_with("mse", flags={"act_bits": 16})
    with pytest.raises(UnsupportedError, match="Nearest"):
        quantize("./nothing", tmp_path / "out", recipe, RunOptions(), backend="trt-rtx")


def test_a_resume_without_a_checkpoint_is_refused_before_any_work(tmp_path):
    options = RunOptions(checkpoint=tmp_path / "none", resume=True)
    with pytest.raises(ArtifactError, match="no checkpoint to resume"):
        quantize("./nothing", tmp_path / "out", recipe_with("efficientdm"), options)


@pytest.mark.parametrize("finished", [False, True])
def test_a_forgotten_resume_is_refused_before_any_work_even_where_only_the_artifact_is_missing(tmp_path, finished):
    description = {"step": 6, "position": "step 6 of 9", "finished": finished, "identity": {"recipe": "qat"}}
    save_checkpoint(tmp_path / "out.checkpoint", description=description, tensors={"a": torch.zeros(1)})
    with pytest.raises(
        InputError, match=r"out\.checkpoint is the checkpoint of an unfinished run: qat, step 6 of 9\. Continue it with --resume"
    ):
        quantize("./nothing", tmp_path / "out", recipe_with("efficientdm"), RunOptions(checkpoint=tmp_path / "out.checkpoint"))
    assert (tmp_path / "out.checkpoint" / "checkpoint.json").is_file()


def test_a_checkpoint_is_gone_once_the_artifact_stands(tmp_path, chain):
    recipe = recipe_with("efficientdm", flags={"rows": 2}, overrides=["steps=1", "batch=2", "calibration_samples=2"])
    quantize(str(chain.model), tmp_path / "a", recipe, RunOptions(checkpoint=tmp_path / "c"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_too_little_memory_is_said_before_the_weights_are_read(tmp_path, chain, monkeypatch):
    from types import SimpleNamespace

    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**8))
    with pytest.raises(InputError, match=r"needs about 1\.\d GB of memory; 0\.1 GB are available\. Use --low-memory"):
        quantize(str(chain.model), tmp_path / "a", recipe_with("mse"), RunOptions())
    with pytest.raises(InputError, match=r"are available\. Free memory, or start anyway with --force"):
        quantize(str(chain.model), tmp_path / "a", recipe_with("mse"), RunOptions(), low_memory=True)


def test_low_memory_gives_the_same_artifact_even_where_memory_is_short(tmp_path, chain):
    recipe = recipe_with("mse", flags={"rows": 2}, overrides=["calibration_samples=2"])
    low = quantize(str(chain.model), tmp_path / "low", recipe, RunOptions(), low_memory=True, force=True)
    assert low.digest == quantize(str(chain.model), tmp_path / "usual", recipe, RunOptions()).digest


def test_mixed_precision_decides_the_arithmetic_of_student_and_teacher():
    assert compute_dtypes(None, "fp32", ["compute=bf16"]) == (None, "fp32")
    assert compute_dtypes("bf16", None, ["steps=2"]) == ("bf16", "bf16-autocast")
    assert compute_dtypes("no", None, []) == ("fp32", "fp32")
    for teacher, overrides, other in (("bf16", [], "--teacher-dtype"), (None, ["compute=fp32"], "--set compute=fp32")):
        with pytest.raises(InputError, match=f"--mixed-precision bf16 and {other} decide the same"):
            compute_dtypes("bf16", teacher, overrides)
