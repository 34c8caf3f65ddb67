import pytest
import torch

from engines.openvino_graph.group_norm import split_group_norms


@pytest.mark.parametrize(("mean", "precision", "tolerance"), [(0.0, "f32", 1e-5), (30.0, "f32", 1e-4), (0.0, "bf16", 0.02)])
def test_a_split_group_norm_is_the_group_norm(mean, precision, tolerance):
    ov = pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 5) * torch.linspace(0.5, 2, 8).reshape(8, 1, 1) + mean
    gamma, beta = torch.randn(8), torch.randn(8)
    parameter = ov.opset13.parameter([-1, 8, -1, -1], ov.Type.f32)
    norm = ov.opset13.group_normalization(parameter, gamma.numpy(), beta.numpy(), 4, 1e-5)
    model = ov.Model([norm], [parameter])
    split_group_norms(ov, model)
    assert "GroupNormalization" not in {node.get_type_name() for node in model.get_ops()}
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    found = torch.from_numpy(compiled(x.numpy())[0].copy())
    expected = torch.nn.functional.group_norm(x, 4, gamma, beta, eps=1e-5)
    # A mean of 30 deviations costs float32 five bits; bfloat16 has eight bits in all.
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
