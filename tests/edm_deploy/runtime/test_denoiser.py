import copy
import pickle
from dataclasses import replace

import pytest
import torch

from edm_deploy import EngineDenoiser, load_denoiser, load_pipeline
from edm_deploy.artifact.reference import Reference, reference_with_correction
from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.pipelines.schedulers import schedulers_for
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from engines import build_engine
from tests.conftest import SCHEDULER, artifact_by_hand, check_no_further, tiny_inputs, tiny_model

pytest.importorskip("onnxruntime")
SAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def engine(onnx_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "ort"
    build_engine(onnx_w4a4, path, backend="ort", options=BuildOptions(profile={"batch": ShapeRange(1, 2, 4)}))
    return path


@pytest.fixture(scope="module")
def denoiser(engine):
    return load_denoiser(engine)


def test_the_drop_in_computes_what_the_reference_computes(denoiser, artifact_w4a4):
    inputs = tiny_inputs("unet2d", batch=4)  # four samples at four timesteps
    expected = Reference(artifact_w4a4)(inputs)
    family, _, model = tiny_model("unet2d")
    check_no_further(denoiser(inputs["sample"], inputs["timestep"]).sample, expected, family.forward(model, inputs))


def test_it_looks_like_the_model_that_it_replaces(denoiser):
    assert denoiser.config.sample_size == 8
    assert denoiser.config["in_channels"] == 3
    assert denoiser.dtype == torch.float32
    assert denoiser.device.type == "cpu"
    sample = torch.zeros(1, 3, 8, 8)
    assert torch.equal(denoiser(sample, 5, return_dict=False)[0], denoiser(sample, torch.tensor(5), class_labels=None).sample)


@pytest.mark.parametrize("scheduler", schedulers_for(SCHEDULER))
@pytest.mark.parametrize("steps", [2, 7])
def test_any_scheduler_and_any_number_of_steps_samples(engine, scheduler, steps):
    pipeline = load_pipeline(engine, scheduler=scheduler)
    images = pipeline(batch_size=2, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert abs(images[0] - images[1]).max() > 0


def test_it_drops_into_a_pipeline_of_diffusers(denoiser, save_tiny_pipeline, tmp_path):
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(save_tiny_pipeline(tmp_path / "p"))
    pipeline.unet = denoiser
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].size == (8, 8)


def test_a_pipeline_of_diffusers_is_loaded_with_it(denoiser, save_tiny_pipeline, tmp_path):
    from diffusers import DDIMPipeline, DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(save_tiny_pipeline(tmp_path / "p"), unet=denoiser)
    assigned = DDIMPipeline.from_pretrained(tmp_path / "p")
    assigned.unet = denoiser
    images = []
    for pipeline in (loaded, assigned):
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.unet is denoiser
        images.append(pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images)
    assert (images[0] == images[1]).all()
    assert isinstance(denoiser, EngineDenoiser) and type(denoiser).__name__ == "EngineDenoiser"


def test_a_pipeline_cannot_be_saved_with_it(denoiser, save_tiny_pipeline, tmp_path):
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(save_tiny_pipeline(tmp_path / "p"))
    pipeline.unet = denoiser
    with pytest.raises(
        UnsupportedError, match=r"cannot be saved with its pipeline\. Copy the directory that build-engine wrote, .*load_pipeline"
    ):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model_index.json").exists()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_copies_and_pickles_are_refused(denoiser, make):
    with pytest.raises(
        UnsupportedError, match=r"cannot be copied or pickled: .*Open its directory again with load_denoiser, in each process"
    ):
        make(denoiser)


def test_return_dict_may_be_passed_by_position(denoiser):
    prediction = denoiser(SAMPLE, 5, None, False)
    assert isinstance(prediction, tuple)
    assert torch.equal(prediction[0], denoiser(SAMPLE, 5, None, True).sample)


def test_an_argument_too_many_or_twice_is_refused(denoiser):
    with pytest.raises(
        InputError, match=r"5 positional arguments; UNet2DModel takes 4: sample, timestep, class_labels, return_dict\. Remove"
    ):
        denoiser(SAMPLE, 5, None, True, None)
    with pytest.raises(InputError, match="'timestep' is passed twice, by position and by name; expected once"):
        denoiser(SAMPLE, 5, timestep=5)


def test_half_precision_samples_come_back_in_half_precision(denoiser):
    assert denoiser(torch.zeros(1, 3, 8, 8, dtype=torch.float16), 5).sample.dtype == torch.float16


MISUSE = {
    "batch over the profile": ((torch.zeros(5, 3, 8, 8), 1), "batch 5 is outside the engine's profile 1:2:4.*--batch 1:2:5"),
    "another size": ((torch.zeros(1, 3, 16, 8), 1), "height 16 is outside the engine's profile 8:8:8"),
    "integer sample": ((SAMPLE.long(), 1), "sample is torch.int64, expected a floating-point tensor"),
    "no tensor": (([[0.0]], 1), "sample is list, expected a floating-point tensor"),
    "channels": ((torch.zeros(1, 4, 8, 8), 1), r"sample has shape \[1, 4, 8, 8\], expected \['batch', 3"),
    "dimensions": ((torch.zeros(3, 8, 8), 1), "expected 4 dimensions"),
    "timestep over the schedule": ((SAMPLE, 1000), "timestep 1000 is outside the schedule; expected 0 to 999"),
    "timestep below": ((SAMPLE, -1), "timestep -1 is outside the schedule"),
    "timestep NaN": ((SAMPLE, float("nan")), "timestep nan is outside"),
    "timesteps for another batch": ((SAMPLE, torch.tensor([1, 2, 3])), "3 timesteps for a batch of 1"),
}


@pytest.mark.parametrize("misuse", MISUSE, ids=lambda name: name.replace(" ", "-"))
def test_misuse_at_run_time_is_one_clear_error(denoiser, misuse):
    arguments, message = MISUSE[misuse]
    with pytest.raises(InputError, match=message):
        denoiser(*arguments)


def test_another_device_is_refused(denoiser):
    with pytest.raises(InputError, match="sample is on meta, the engine on cpu"):
        denoiser(torch.zeros(1, 3, 8, 8, device="meta"), 1)
    with pytest.raises(InputError, match="runs on cpu; it cannot move to cuda"):
        denoiser.to("cuda")
    for index in (None, 1, torch.device("cuda")):
        with pytest.raises(InputError, match="runs on cpu; it cannot move to cuda"):
            denoiser.cuda(index)
    assert denoiser.to(torch.float16) is denoiser.cpu() is denoiser


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    """An artifact with a correction and relaxed timesteps, and its engine, which takes no fewer than two samples.

    8-bit weights and 4-bit activations: at relaxed timesteps it is near the float model, so that neither the wrong engine nor a missing correction is.
    """
    artifact = artifact_by_hand(weight_bits=8, act_bits=4)
    generator = torch.Generator().manual_seed(0)
    correction = Correction(
        row_of_timestep=artifact.row_of_timestep,
        scale=0.9 + 0.2 * torch.rand(5, 3, generator=generator),
        input_bias=0.1 * torch.randn(5, 3, generator=generator),
    )
    artifact = replace(artifact, correction=correction, relaxed=mask_from_intervals([(0, 499)], 1000))
    path = tmp_path_factory.mktemp("corrected")
    onnx_from_artifact(artifact, path / "onnx")
    build_engine(path / "onnx", path / "engine", backend="ort", options=BuildOptions(profile={"batch": ShapeRange(2, 2, 4)}))
    return artifact, path / "engine"


def test_a_mixed_batch_is_routed_to_both_engines_and_corrected(corrected):
    artifact, path = corrected
    family, _, model = tiny_model("unet2d")
    inputs = tiny_inputs("unet2d", batch=4)  # timesteps 0, 333, 666, 999; of three and one the engine would refuse the one
    for timestep in (inputs["timestep"], torch.tensor([0.0, 999.0, 999.0, 999.0])):
        inputs = inputs | {"timestep": timestep}
        expected = reference_with_correction(artifact)(inputs)
        exact = artifact.correction.around(lambda given: family.forward(model, given))(inputs)
        check_no_further(load_denoiser(path)(inputs["sample"], timestep).sample, expected, exact)


def test_closing_the_drop_in_closes_both_engines(corrected):
    inputs = tiny_inputs("unet2d", batch=2)
    with load_denoiser(corrected[1]) as denoiser:
        denoiser(**inputs)
    for timestep in (0, 999):  # one of each engine
        with pytest.raises(InputError, match="This engine has been closed"):
            denoiser(inputs["sample"], timestep)
    denoiser.close()


def test_one_folder_holds_both_engines_and_every_file_is_checked(corrected, tmp_path):
    import shutil

    manifest = Manifest.read(shutil.copytree(corrected[1], tmp_path / "engine"), kind="engine")
    assert manifest.relaxed == ((0, 499),)
    assert {"relaxed/manifest.json", "relaxed/model.onnx", "model.onnx"} <= set(manifest.files)
    assert {plan.executed for plan in Manifest.read(tmp_path / "engine" / "relaxed", kind="engine").plan.values()} == {"weight-only"}
    (tmp_path / "engine" / "relaxed" / "model.onnx").write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"relaxed/model\.onnx does not match manifest\.json"):
        load_denoiser(tmp_path / "engine")


@pytest.mark.parametrize("change", [{"relaxed": [[0, 2000]]}, {"correction": {"first": [0]}}], ids=["relaxed", "correction"])
def test_a_manifest_whose_timesteps_do_not_fit_is_refused(corrected, tmp_path, change):
    import json
    import shutil

    path = shutil.copytree(corrected[1], tmp_path / "engine") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match="is not a manifest that edm-deploy wrote"):
        load_denoiser(tmp_path / "engine")
