import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from edm_deploy import load_pipeline
from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy.serving.interface import ImageRequest
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.sample import advance
from engines import build_engine
from tests.conftest import artifact_by_hand
from tests.edm_deploy.serving.conftest import SLOTS

SCHEDULERS = ("ddim", "ddpm", "euler", "dpm-solver++", "unipc")


def pixels_of(model, request, image=0):
    """An image of a request that no other shares a call with."""
    prepared = model.prepare(request)
    sample = model.start(request, prepared, image)
    while not sample.done:
        advance([sample], model.predict([sample]))
    return model.pixels(sample.latents, request)


def mixed(model, requests, seed):
    """The images of all requests, computed in calls of random members in random order and number, each image joining and leaving at some call."""
    choice = random.Random(seed)
    waiting, running, done = list(range(len(requests))), {}, {}
    while waiting or running:
        if waiting and choice.random() < 0.5:
            index = waiting.pop(choice.randrange(len(waiting)))
            running[index] = model.start(requests[index], model.prepare(requests[index]), 0)
        members = [index for index in running if choice.random() < 0.7]
        choice.shuffle(members)
        while sum(len(running[index].rows) for index in members) > model.slots:
            members.pop()
        if not members:
            continue
        samples = [running[index] for index in members]
        advance(samples, model.predict(samples))
        for index in members:
            if running[index].done:
                done[index] = model.pixels(running[index].latents, requests[index])
        running = {index: sample for index, sample in running.items() if index not in done}
        if running and choice.random() < 0.05:  # a neighbour that is cancelled, and comes again later
            gone = choice.choice(list(running))
            del running[gone]
            waiting.append(gone)
    return [done[index] for index in range(len(requests))]


@pytest.mark.parametrize(
    ("backend", "schedules"),
    [
        ("openvino", 1),
        ("reference", 1),
        *(pytest.param(backend, 8, marks=pytest.mark.extended) for backend in ("openvino", "reference", "ort")),
    ],
)
def test_an_image_is_bit_for_bit_the_same_whoever_shares_its_calls(served_on, backend, schedules):
    """Neighbours of other seeds, step counts and schedulers join and leave; the row of an image changes from call to call."""
    with_engine = served_on(backend)
    requests = [
        ImageRequest(id=str(seed), seed=seed, steps=2 + seed % 4, scheduler=SCHEDULERS[seed % len(SCHEDULERS)]) for seed in range(7)
    ]
    alone = [pixels_of(with_engine, request) for request in requests]
    for seed in range(schedules):
        for number, (found, expected) in enumerate(zip(mixed(with_engine, requests, seed), alone, strict=True)):
            assert np.array_equal(found, expected), f"request {number}, schedule {seed}"
    assert len({image.tobytes() for image in alone}) == len(alone)
    with_engine.close()


def test_guided_images_are_bit_for_bit_the_same_whoever_shares_their_calls(text_model):
    requests = [
        ImageRequest(id=str(seed), seed=seed, prompt=f"a cat {seed}", steps=2 + seed % 3, guidance=[1.0, 4.0, None][seed % 3])
        for seed in range(6)
    ]
    alone = [pixels_of(text_model, request) for request in requests]
    assert all(np.array_equal(found, expected) for found, expected in zip(mixed(text_model, requests, 0), alone, strict=True))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_is_that_of_the_pipeline_with_its_seed(model, engine, scheduler):
    """The same arithmetic, of another batch size: codes of pixels differ by rounding of float32 sums that one quantizer turns into a step."""
    request = ImageRequest(id="a", seed=5, count=2, steps=3, scheduler=scheduler)
    pipe = load_pipeline(engine, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    for image in range(2):
        expected = pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(5 + image)).images[0]
        assert np.abs(pixels_of(model, request, image).astype(int) - np.asarray(expected).astype(int)).mean() < 2


def test_a_guided_image_is_that_of_the_pipeline_with_its_seed(text_model, text_engine):
    request = ImageRequest(id="a", seed=5, steps=3, prompt="a cat", negative_prompt="a dog", guidance=5.0)
    pipe = load_pipeline(text_engine[0], source=text_engine[1])
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a cat", negative_prompt="a dog", guidance_scale=5.0, num_inference_steps=3, generator=torch.Generator().manual_seed(5)
    ).images[0]
    assert np.abs(pixels_of(text_model, request).astype(int) - np.asarray(expected).astype(int)).mean() < 2
    other = pixels_of(text_model, replace(request, negative_prompt=None))
    assert not np.array_equal(other, pixels_of(text_model, request))


def test_an_image_may_start_from_a_picture(model, text_model):
    for served, prompt in ((model, None), (text_model, "a cat")):
        height, width = served.card.size
        picture = np.tile(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, 1, 3))
        request = ImageRequest(id="a", steps=10, prompt=prompt, guidance=1.0 if prompt else None, picture=picture)
        weak, strong = (pixels_of(served, replace(request, strength=strength)) for strength in (0.1, 1.0))
        assert weak.shape == picture.shape
        assert not np.array_equal(weak, strong)
    # A tenth of the schedule leaves a picture of pixels as it was, but for some noise.
    near = pixels_of(model, ImageRequest(id="a", steps=10, picture=np.full((8, 8, 3), 200, np.uint8), strength=0.1))
    far = pixels_of(model, ImageRequest(id="a", steps=10, picture=np.full((8, 8, 3), 200, np.uint8), strength=1.0))
    assert np.abs(near.astype(int) - 200).mean() < np.abs(far.astype(int) - 200).mean()


def test_other_sizes_within_the_profile_have_a_key_of_their_own(text_model):
    native, wide = (ImageRequest(id="a", prompt="a", width=width, height=16, steps=1) for width in (16, 32))
    assert pixels_of(text_model, wide).shape == (16, 32, 3)
    keys = [text_model.key(request, text_model.prepare(request), 999.0) for request in (native, wide)]
    assert keys[0] != keys[1]


REFUSED = {
    "prompt": (ImageRequest(id="a", prompt="a cat"), "prompt: this UNet2DModel takes no text. Leave the prompt out"),
    "label": (ImageRequest(id="a", label=1), "label 1: this UNet2DModel takes no class"),
    "guidance": (ImageRequest(id="a", guidance=2.0), "guidance: this UNet2DModel is not guided"),
    "seed": (ImageRequest(id="a", seed=-1), "seed is -1"),
    "last seed": (ImageRequest(id="a", seed=2**63 - 1, count=2), "leaves no seeds for 2 images"),
    "count": (ImageRequest(id="a", count=0), "count is 0, expected 1 or more"),
    "strength": (ImageRequest(id="a", strength=0.0), "strength is 0, expected a number above 0"),
    "scheduler": (ImageRequest(id="a", scheduler="dpm"), "No scheduler 'dpm'"),
    "flow": (ImageRequest(id="a", scheduler="flow-euler"), "cannot sample this model"),
    "steps": (ImageRequest(id="a", steps=0), "0 inference steps"),
    "size": (ImageRequest(id="a", width=9, height=8), "width 9: expected a multiple of 2 pixels"),
    "profile": (
        ImageRequest(id="a", width=64, height=8),
        "size 64x8 is outside the engine's profile: its width would be 64, expected 8 to 8",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_that_the_model_cannot_compute_is_refused(model, what):
    request, message = REFUSED[what]
    with pytest.raises((InputError, UnsupportedError), match=message):
        model.check(request)


def test_slots_outside_the_profile_are_refused(engine):
    with pytest.raises(InputError, match=r"8 slots: the engine in .* takes batches of 1 to 6\. Pass --slots 6"):
        ServedModel(engine, name="tiny", slots=8)
    with ServedModel(engine, name="tiny").denoiser as denoiser:
        assert denoiser.manifest.profile["batch"].max == 6


def test_the_memory_of_a_request_is_known_before(model, text_model):
    """What its samples hold while they are computed, by every scheduler, is no more than was stated."""
    for served, prompt, names in ((model, None, SCHEDULERS), (text_model, "a", ("ddim", None))):
        for scheduler in names:
            request = ImageRequest(id="a", prompt=prompt, count=2, steps=4, scheduler=scheduler)
            prepared = served.prepare(request)
            samples = [served.start(request, prepared, image) for image in range(2)]
            for _ in range(3):
                for together in [samples] if len(samples[0].rows) == 1 else [[sample] for sample in samples]:
                    advance(together, served.predict(together))
            shared = {id(value) for value in vars(prepared.schedule._template).values()}
            held = tensors_of([vars(sample) | vars(sample._scheduler) for sample in samples], shared)
            assert sum(held.values()) <= served.memory(request), scheduler


def tensors_of(value, shared):
    """Bytes of the tensors below a value by their storage, without those that all samples share."""
    found = {}
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, torch.Tensor) and id(each) not in shared:
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif isinstance(each, dict):
            pending += each.values()
        elif isinstance(each, list | tuple):
            pending += each
    return found


def test_the_card_says_what_a_model_takes(model, text_model):
    assert model.card.size == (8, 8) and not model.card.takes_prompt and model.card.guidance is None
    assert model.card.schedulers[0] == "ddim"
    assert text_model.card.size == (16, 16) and text_model.card.takes_prompt and text_model.card.guidance == 7.5
    assert text_model.card.slots == SLOTS


@pytest.mark.extended
def test_samples_of_the_second_engine_get_calls_of_their_own(tmp_path):
    """Else the two engines would receive parts of a call, of sizes that neighbours decide, and a backend chooses kernels by size."""
    artifact = replace(artifact_by_hand(), relaxed=mask_from_intervals([(0, 499)], 1000))
    onnx_from_artifact(artifact, tmp_path / "onnx")
    build_engine(
        tmp_path / "onnx", tmp_path / "engine", backend="ort", options=BuildOptions(profile={"batch": ShapeRange(1, SLOTS, SLOTS)})
    )
    served = ServedModel(tmp_path / "engine", name="relaxed", slots=SLOTS)
    request = ImageRequest(id="a", steps=4)
    prepared = served.prepare(request)
    assert len({served.key(request, prepared, timestep) for timestep in (999.0, 500.0)}) == 1
    assert served.key(request, prepared, 499.0) == served.key(request, prepared, 0.0) != served.key(request, prepared, 500.0)
    batches = []
    for session in served.denoiser._sessions:
        run = session.run
        session.run = lambda inputs, run=run: (batches.append(len(inputs["sample"])), run(inputs))[1]
    pixels_of(served, request)
    assert batches == [SLOTS] * 4
    served.close()
