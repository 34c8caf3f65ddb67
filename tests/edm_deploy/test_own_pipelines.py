import pytest
import torch

from edm_deploy.own_pipelines import UnconditionalPipeline
from edm_deploy.pipelines import scheduler_named
from tests.conftest import SCHEDULER, tiny_model


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
