import pytest
import torch

from calibration.recipe import TrainingContext
from calibration.recipes.efficientdm import EfficientDM
from calibration.training.activation_checkpoints import checkpoint_activations
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_context


def prepared(kind: str) -> TrainingContext:
    """A calibrated student with updates."""
    recipe = EfficientDM(rows=1, rank=2, calibration_samples=2, compute="fp32")
    context = tiny_context(recipe, kind)
    recipe.prepare(context)
    return context


def gradients(context: TrainingContext, kept: list[int]) -> dict[str, torch.Tensor]:
    """Of all that is learnable, by name, from the mean square of a prediction; the bytes that are kept for the backward pass are appended to `kept`."""
    batch, saved = context.trajectories.next_batch(2), {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        saved[value.data_ptr()] = value.nbytes
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = context.student(batch.inputs).square().mean()
    kept.append(sum(saved.values()))
    context.student.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in context.student.learnable().items() if value.grad is not None}


@pytest.mark.parametrize(
    "kind", ["unet2d-condition", *(pytest.param(kind, marks=pytest.mark.extended) for kind in ("unet2d", "flux", "dit", "sd3", "pixart"))]
)
def test_gradients_are_the_same_and_less_is_kept(kind):
    context, kept = prepared(kind), []
    context.trajectories.next_index = 0
    expected = gradients(context, kept)
    checkpoint_activations(context.student)
    context.trajectories.next_index = 0
    found = gradients(context, kept)
    assert found.keys() == expected.keys()
    # A tensor that several blocks read is quantized in each: its gradients are summed in another order.
    assert all(torch.allclose(found[name], value, rtol=1e-3, atol=1e-6 * float(value.abs().max())) for name, value in expected.items())
    assert kept[1] < kept[0]


def test_a_model_without_such_blocks_is_refused():
    context = tiny_context(EfficientDM(rows=1))
    context.student.model = torch.nn.Identity()
    with pytest.raises(InputError, match=r"--gradient-checkpointing: UNet2DModel has no blocks"):
        checkpoint_activations(context.student)
