import logging

import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy.network.float_program import MODEL, exported_program, without_library_output
from tests.conftest import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def program():
    family, config, _ = tiny_model("unet2d")
    return exported_program(family, config, torch.float16, input_dtype=torch.float32)


def test_parameters_bear_the_models_names(program):
    _, _, model = tiny_model("unet2d")
    assert set(program.graph_signature.inputs_to_parameters.values()) == {MODEL + name for name in dict(model.named_parameters())}


def test_inputs_and_output_keep_their_type_while_the_model_computes_in_another(program):
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"][-2:]
    assert [value.dtype for value in values] == [torch.float32, torch.float32]
    (output,) = program.graph.output_node().args[0]
    assert output.meta["val"].dtype == torch.float32
    convolutions = [node for node in program.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert {node.meta["val"].dtype for node in convolutions} == {torch.float16}


def test_with_the_models_weights_it_computes_what_the_model_computes(program):
    family, _, model = tiny_model("unet2d")
    module = program.module(check_guards=False)
    module.load_state_dict({MODEL + name: value.half() for name, value in model.state_dict().items()})
    inputs = tiny_inputs("unet2d", batch=5, size=12)  # neither the batch nor the size that it was traced at
    torch.testing.assert_close(module(*inputs.values()), family.forward(model, inputs), rtol=0.02, atol=0.02)  # float16 rounds to 2^-11


def test_a_model_that_cannot_be_traced_is_one_clear_error(monkeypatch):
    family, config, _ = tiny_model("unet2d")
    monkeypatch.setattr(type(family), "forward", lambda self, model, inputs: inputs["sample"].tolist())
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot trace UNet2DModel with this config: "):
        exported_program(family, config, torch.float32)


def test_what_the_exporters_say_is_not_the_users_to_read(capsys):
    with without_library_output():
        print("noise")
        logging.getLogger("torch.onnx").warning("noise")
    assert capsys.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET
