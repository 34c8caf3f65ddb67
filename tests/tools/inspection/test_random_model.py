import torch
from safetensors.torch import load_file

from edm_deploy.pipelines.source import load_source
from edm_deploy_tools.inspection.architectures import Architecture
from edm_deploy_tools.inspection.random_model import random_weights, weight_bytes, write_random_model
from tests.conftest import SCHEDULER, tiny_model


def tiny_architecture():
    _, config, model = tiny_model("unet2d")
    return Architecture(
        name="tiny",
        title="Tiny",
        class_name="UNet2DModel",
        config=config,
        pipeline_class="DDIMPipeline",
        scheduler_class="DDIMScheduler",
        scheduler_config={key: value for key, value in SCHEDULER.items() if key != "_class_name"},
        parameters=sum(value.numel() for value in model.parameters()),
    )


def test_a_random_model_is_a_source_of_its_architecture(tmp_path):
    chosen = tiny_architecture()
    source = load_source(write_random_model(chosen, tmp_path / "m", size=16))
    assert source.config["sample_size"] == 16
    assert sum(value.numel() for value in source.model.parameters()) == chosen.parameters
    assert 2 * chosen.parameters <= weight_bytes(tmp_path / "m") <= 2 * chosen.parameters + 50_000


def test_the_seed_decides_the_weights(tmp_path):
    digests = [
        load_source(write_random_model(tiny_architecture(), tmp_path / str(n), seed=seed)).digest() for n, seed in enumerate((0, 0, 9))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_products_keep_the_variance_and_norms_start_as_one():
    shapes = {
        "a.weight": torch.empty(64, 400, device="meta"),
        "norm.weight": torch.empty(3, device="meta"),
        "b.bias": torch.empty(3, device="meta"),
    }
    made = {name: stored.make() for name, stored in random_weights(shapes, 0).items()}
    assert 0.9 < float(made["a.weight"].float().std() * 20) < 1.1
    assert made["norm.weight"].tolist() == [1, 1, 1]
    assert made["b.bias"].tolist() == [0, 0, 0]


def test_weights_are_float16(tmp_path):
    path = write_random_model(tiny_architecture(), tmp_path / "m") / "unet" / "diffusion_pytorch_model.safetensors"
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
