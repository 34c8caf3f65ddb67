"""What holds for every model family that the folder has, without anyone listing it."""

import inspect
from pathlib import Path

import pytest
import torch

from edm_deploy import models, registry
from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.meta_model import meta_model
from tests.conftest import TINY, tiny_inputs, tiny_model


@pytest.mark.parametrize("name", registry.names(models))
def test_a_family_has_a_tiny_model_and_is_found_by_its_class(name):
    assert name in {family for family, _ in TINY.values()}, "add a tiny config to tests/conftest.py: every contract runs on it"
    assert name_of_family(family_named(name).class_name) == name


@pytest.mark.parametrize("name", registry.names(models))
def test_its_signature_is_that_of_the_diffusers_model(name):
    family = family_named(name)
    assert family.signature == tuple(inspect.signature(family.model_class.forward).parameters)[1:]


@pytest.mark.parametrize("kind", TINY)
def test_its_labels_end_where_the_table_of_the_float_model_ends(kind):
    family, config, model = tiny_model(kind)
    count, inputs = family.labels(config), tiny_inputs(kind, batch=1)
    assert (count is not None) == ("class_labels" in inputs and inputs["class_labels"].dtype == torch.int64)
    if count is None:
        return
    family.forward(model, inputs | {"class_labels": torch.tensor([count - 1])})
    with pytest.raises(IndexError):
        family.forward(model, inputs | {"class_labels": torch.tensor([count])})


@pytest.mark.parametrize("kind", TINY)
def test_its_inputs_begin_with_sample_and_timestep_and_batch(kind):
    family, config, _ = tiny_model(kind)
    inputs = family.inputs(config)
    assert [declared.name for declared in inputs[:2]] == ["sample", "timestep"]
    assert all(declared.dims[0] == "batch" for declared in inputs)
    assert set(tiny_inputs(kind)) == {declared.name for declared in inputs}


@pytest.mark.parametrize("kind", TINY)
def test_samples_of_a_batch_do_not_see_each_other(kind):
    family, _, model = tiny_model(kind)
    inputs = tiny_inputs(kind, batch=3)
    together = family.forward(model, inputs)
    alone = family.forward(model, {name: value[1:2] for name, value in inputs.items()})
    assert torch.allclose(together[1:2], alone, atol=1e-5)


@pytest.mark.parametrize("kind", TINY)
def test_the_smallest_size_is_its_multiple(kind):
    family, config, model = tiny_model(kind)
    size = family.size_multiple(config)
    inputs = tiny_inputs(kind, size=size)
    prediction = family.prediction(config, family.forward(model, inputs))
    assert prediction.shape == (len(inputs["sample"]), *family.latent_shape(config | {"sample_size": size}))


@pytest.mark.parametrize("kind", TINY)
def test_each_layer_is_a_site_or_float_by_the_family_word(kind):
    family, config, _ = tiny_model(kind)
    bones = meta_model(family, config)
    sites = family.sites(bones)
    for name, layer in bones.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            assert (name in sites) == (family.placement(name) != "float")


def test_the_readme_names_every_family():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    missing = [name for name in registry.names(models) if f"`{family_named(name).class_name}`" not in readme]
    assert missing == []
