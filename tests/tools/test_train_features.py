from __future__ import annotations

import pytest
import torch

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy_tools.evaluation.feature_network import SIZE, FeatureNetwork
from edm_deploy_tools.train_features import LabelledImages, Settings, accuracy, augmented, folded, load_labelled, scaled, train


@pytest.fixture(scope="module")
def easy():
    """Two classes, dark and light, that a threshold separates."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    images = torch.randint(0, 100, (64, 3, SIZE, SIZE), generator=generator) + 150 * labels.reshape(-1, 1, 1, 1)
    return LabelledImages(images.to(torch.uint8), labels)


def test_an_easy_problem_is_learned_with_weights_exact_in_float16(easy):
    network = train(easy, Settings(epochs=4, batch=16))
    assert accuracy(network, easy) > 0.9
    for value in network.state_dict().values():
        assert torch.equal(value, value.half().float())


def test_folding_batch_norms_changes_the_output_by_rounding_only():
    torch.manual_seed(0)
    network = FeatureNetwork(normalized=True)
    network(torch.randn(32, 3, SIZE, SIZE))  # statistics that are not those of the start
    network.eval()
    images = torch.randn(4, 3, SIZE, SIZE)
    # float16 holds 11 bits: 5e-4 of each weight.
    assert torch.allclose(folded(network)(images), network(images), atol=1e-2)


def test_an_image_is_translated_and_mirrored():
    images = torch.arange(SIZE, dtype=torch.uint8).repeat(2000, 3, SIZE, 1)  # columns count up
    moved = augmented(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    left = (moved[:, 0, 0, 10] + 1) * 127.5
    assert {round(float(value)) for value in left} == {*range(6, 15), *range(17, 26)}  # up to 4 either way, mirrored or not
    assert float(scaled(torch.tensor([0, 255], dtype=torch.uint8)).sum()) == 0


def test_a_file_is_read_with_its_labels(tmp_path):
    import io

    from PIL import Image

    pyarrow = pytest.importorskip("pyarrow", reason="parquet files are read with pyarrow")
    from pyarrow import parquet

    def encoded(value):
        stream = io.BytesIO()
        Image.new("RGB", (SIZE, SIZE), (value, value, value)).save(stream, format="PNG")
        return {"bytes": stream.getvalue(), "path": None}

    path = tmp_path / "data.parquet"
    parquet.write_table(
        pyarrow.table({"img": [encoded(20 * label) for label in reversed(range(10))], "label": list(reversed(range(10)))}), path
    )
    data = load_labelled(path)
    assert data.labels.tolist() == list(range(10))
    assert data.images[:, 0, 0, 0].tolist() == [20 * label for label in range(10)]
    with pytest.raises(ArtifactError, match="neither a folder"):
        load_labelled(tmp_path / "nothing.parquet")


@pytest.mark.parametrize("name", ["epochs", "batch"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"{name} is 0; expected 1 or more"):
        Settings(**{name: 0})
