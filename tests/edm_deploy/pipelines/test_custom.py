import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy.pipelines.custom import ClassEmbedder, UnconditionalPipeline
from edm_deploy.pipelines.schedulers import scheduler_named
from tests.conftest import SCHEDULER, tiny_model
from tests.tiny_unets import LABELS, tiny_pipeline


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++", "euler", "unipc"])
def test_the_unconditional_pipeline_takes_any_scheduler(name):
    _, _, model = tiny_model("unet2d")
    pipeline = UnconditionalPipeline(model, scheduler_named(name, SCHEDULER))
    images = pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]


def test_labels_reach_a_class_conditional_model():
    _, _, model = tiny_model("unet2d-classes")
    pipeline = UnconditionalPipeline(model, scheduler_named("ddim", SCHEDULER))

    def sample(label):
        generator = torch.Generator().manual_seed(0)
        return pipeline(num_inference_steps=2, generator=generator, class_labels=torch.tensor([label]), output_type="np").images

    assert abs(sample(0) - sample(3)).max() > 0


def test_a_label_becomes_one_token_and_the_last_row_is_no_label():
    table = ClassEmbedder(3, 4)
    assert table.embedding.weight.shape == (4, 4)
    assert torch.equal(table(torch.tensor([3, 0])), table.embedding.weight[[3, 0]][:, None])


def test_a_guided_step_is_the_classifier_free_combination():
    pipeline = tiny_pipeline("ldm")
    tokens = pipeline.class_embedder(torch.tensor([2, LABELS])).detach()
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.scheduler.set_timesteps(1)
    timestep = pipeline.scheduler.timesteps[0]
    given, without = (pipeline.unet(noise, timestep, token[None]).sample for token in tokens)
    expected = pipeline.scheduler.step(without + 3 * (given - without), timestep, noise).prev_sample
    generator = torch.Generator().manual_seed(0)
    found = pipeline([2], num_inference_steps=1, guidance_scale=3.0, generator=generator, output_type="latent").images
    torch.testing.assert_close(found, expected)  # two batches of one against one of two: float32's rounding


@pytest.mark.parametrize("labels", [[], [-1], [0, LABELS]], ids=str)
def test_a_label_that_the_model_has_not_is_refused(labels):
    with pytest.raises(InputError, match=r"class_labels is \[.*\]; expected one or more of 0 to 4"):
        tiny_pipeline("ldm")(labels)


@pytest.mark.parametrize("labels", [[1.5], torch.tensor([True]), torch.tensor([1j])], ids=str)
def test_a_label_that_is_no_integer_is_refused(labels):
    with pytest.raises(InputError, match=r"class_labels is of torch.*; expected integers, 0 to 4"):
        tiny_pipeline("ldm")(labels)
