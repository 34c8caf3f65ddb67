import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy.network.meta_model import MAX_PARAMETERS, meta_model
from tests.conftest import TINY, TINY_UNET, tiny_model


@pytest.mark.parametrize("kind", TINY)
def test_a_meta_model_has_the_names_and_shapes_of_the_model_and_no_memory(kind):
    family, config, model = tiny_model(kind)
    meta = meta_model(family, config)
    assert {name: value.shape for name, value in meta.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert all(value.is_meta for value in meta.parameters())


def test_a_config_of_absurdly_many_layers_is_refused_while_the_model_is_built():
    family, _, _ = tiny_model("unet2d")
    with pytest.raises(ArtifactError, match=f"UNet2DModel of more than {MAX_PARAMETERS} parameter tensors"):
        meta_model(family, TINY_UNET | {"layers_per_block": 20000})
