from __future__ import annotations

import pytest
import torch

from edm_deploy_tools.evaluation.feature_network import SIZE, WEIGHTS, WIDTHS, features_of, shipped_network


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_shipped_network_is_small_and_in_half_precision():
    from safetensors.torch import load_file

    assert WEIGHTS.stat().st_size < 2_000_000
    assert {value.dtype for value in load_file(WEIGHTS).values()} == {torch.float16}


def test_features_are_a_vector_for_each_image_whatever_the_batch(images):
    features = features_of(images)
    assert features.shape == (5, WIDTHS[-1])
    assert torch.allclose(features_of(images[2:3]), features[2:3], atol=1e-5)
    assert bool(features.isfinite().all())


def test_other_sizes_are_scaled_and_grey_is_three_equal_channels(images):
    smooth = torch.nn.functional.interpolate(images[:, :, :4, :4], (SIZE, SIZE), mode="bicubic").clamp(-1, 1)
    large = torch.nn.functional.interpolate(smooth, (4 * SIZE, 4 * SIZE), mode="bilinear", align_corners=False)
    far = float((features_of(large) - features_of(smooth)).norm() / features_of(smooth).norm())
    assert far < 0.1  # what is smooth survives being enlarged and scaled back
    assert torch.allclose(features_of(images[:, :1]), features_of(images[:, :1].repeat(1, 3, 1, 1)), atol=1e-5)


def test_nothing_of_it_learns():
    assert not any(parameter.requires_grad for parameter in shipped_network().parameters())


def test_noise_on_a_picture_moves_its_features_the_further_the_more_there_is(images):
    smooth = torch.nn.functional.avg_pool2d(images, 9, 1, 4)
    moved = [float((features_of((smooth + amount * images).clamp(-1, 1)) - features_of(smooth)).norm()) for amount in (0.05, 0.2, 0.8)]
    assert moved == sorted(moved)
