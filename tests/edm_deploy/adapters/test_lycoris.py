import pytest
import torch

from edm_deploy.adapters.lycoris import low_rank, weight_update
from edm_deploy.errors import InputError

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def test_a_loha_is_the_elementwise_product_of_two_products():
    parts = {"hada_w1_a": rand(6, 2), "hada_w1_b": rand(2, 4), "hada_w2_a": rand(6, 2), "hada_w2_b": rand(2, 4)}
    found, rank = weight_update(parts, (6, 4))
    expected = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    assert rank == 2
    torch.testing.assert_close(found, expected)


def test_a_loha_with_tucker_cores_gives_a_filter():
    parts = {f"hada_w{n}_{side}": rand(2, size) for n in (1, 2) for side, size in (("a", 6), ("b", 4))}
    parts |= {"hada_t1": rand(2, 2, 3, 3), "hada_t2": rand(2, 2, 3, 3)}
    found, _ = weight_update(parts, (6, 4, 3, 3))
    one = sum(parts["hada_w1_a"][i, 5] * parts["hada_w1_b"][j, 1] * parts["hada_t1"][i, j, 2, 0] for i in range(2) for j in range(2))
    two = sum(parts["hada_w2_a"][i, 5] * parts["hada_w2_b"][j, 1] * parts["hada_t2"][i, j, 2, 0] for i in range(2) for j in range(2))
    torch.testing.assert_close(found[5, 1, 2, 0], one * two)


def test_a_lokr_is_the_kronecker_product_of_whole_matrices_or_of_products():
    first, second = rand(2, 2), rand(3, 2)
    found, rank = weight_update({"lokr_w1": first, "lokr_w2": second}, (6, 4))
    assert rank is None
    assert found[4, 3] == first[1, 1] * second[1, 1]
    a, b = rand(3, 1), rand(1, 2 * 9)
    found, rank = weight_update({"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b}, (6, 4, 3, 3))
    assert rank == 1
    torch.testing.assert_close(found[4, 3, 2, 1], first[1, 1] * (a @ b).reshape(3, 2, 3, 3)[1, 1, 2, 1])
    found, _ = weight_update({"lokr_w1": first, "lokr_w2": rand(3, 2, 3, 3)}, (6, 4, 3, 3))
    assert found.shape == (6, 4, 3, 3)


def test_factors_of_another_shape_or_too_few_are_refused():
    with pytest.raises(InputError, match=r"The factors lokr_w1 \[2, 2\], lokr_w2 \[3, 2\] do not give an update of a weight \[5, 4\]"):
        weight_update({"lokr_w1": rand(2, 2), "lokr_w2": rand(3, 2)}, (5, 4))
    with pytest.raises(InputError, match="do not give an update"):
        weight_update({"hada_w1_a": rand(2, 2)}, (2, 2))


def test_the_nearest_lora_is_exact_where_the_rank_suffices_and_states_its_error_where_not():
    delta = (rand(6, 2) @ rand(2, 12)).reshape(6, 4, 3)[..., None]
    update, error = low_rank(delta, 4)
    assert update.rank == 2 and error < 1e-5
    torch.testing.assert_close(update.delta(), delta, atol=1e-5, rtol=0)
    _, s, _ = torch.linalg.svd(delta.flatten(1))
    update, error = low_rank(delta, 1)
    assert error == pytest.approx(float(s[1] / s.norm()), rel=1e-3)
    assert low_rank(torch.zeros(3, 4), 2)[1] == 0


def test_of_large_updates_the_randomized_decomposition_is_as_near(monkeypatch):
    delta = rand(40, 6) @ rand(6, 50)
    _, exact = low_rank(delta, 4)
    monkeypatch.setattr("edm_deploy.adapters.lycoris.EXACT_BELOW", 1)
    before = torch.get_rng_state()
    assert low_rank(delta, 4)[1] == pytest.approx(exact, rel=1e-3)
    assert torch.equal(torch.get_rng_state(), before)
