import pytest
import torch
from torch import nn

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.convert_inception import convert_inception
from edm_deploy_tools.evaluation import inception
from edm_deploy_tools.evaluation.inception import SIZE, Inception, InceptionOutputs, load_inception, outputs_of, resized


def test_the_network_is_inception_v3_with_1008_classes():
    with torch.device("meta"):
        network = Inception()
    # torchvision's inception_v3 has 27 161 264 parameters: less 3 326 696 of the auxiliary classifier, and 8 more classes of 2048 + 1.
    assert sum(value.numel() for value in network.parameters()) == 27_161_264 - 3_326_696 + 8 * 2049
    names = network.state_dict().keys()
    assert len(names) == 94 * 6 + 2  # a weight and five tensors of the norm for each convolution
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch3x3dbl_3.bn.running_var", "Mixed_7c.branch3x3_2b.conv.weight", "fc.bias"} <= names
    found = network.eval()(torch.empty(2, 3, SIZE, SIZE, device="meta"))
    assert [tuple(value.shape) for value in (found.pooled, found.spatial, found.logits)] == [(2, 2048), (2, 7 * 17 * 17), (2, 1008)]


def test_images_are_resized_from_the_first_pixel_without_antialiasing():
    image = torch.zeros(1, 1, 2, 2)
    image[..., 1] = 299.0
    rows = resized(image)
    assert rows.shape == (1, 1, SIZE, SIZE)
    # Column i is at 2 i / 299: 0 at the first, 2 at i = 1, and the second pixel is repeated from the middle on.
    torch.testing.assert_close(rows[0, 0, 0, [0, 1, 150, 298]], torch.tensor([0.0, 2.0, 299.0, 299.0]))
    whole = torch.rand(1, 3, SIZE, SIZE)
    torch.testing.assert_close(resized(whole), whole)


def test_pixels_are_rounded_to_eight_bits_and_scaled_to_below_one():
    seen = []

    def network(images):
        seen.append(images)
        return InceptionOutputs(*(torch.zeros(len(images), 1) for _ in range(3)))

    outputs_of(network, torch.tensor([-1.0, 1.0, 0.001, 3.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2))
    assert [float(value) for value in seen[0][:, 0, 0, 0]] == [-1.0, 127 / 128, 0.0, 127 / 128]
    assert seen[0].shape[1] == 3


class Small(nn.Module):
    """In place of the network: its weights have 95 MB."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A pickle of weights whose hash is taken as the published one."""
    import hashlib

    path = tmp_path / "weights.pth"
    torch.save(Small().state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for module in ("edm_deploy_tools.convert_inception", "edm_deploy_tools.evaluation.inception"):
        monkeypatch.setattr(f"{module}.PUBLISHED", digest[:8])
    return path


def test_converted_weights_are_those_of_the_file(published, tmp_path, monkeypatch):
    convert_inception(published, tmp_path / "w.safetensors")
    monkeypatch.setattr(inception, "Inception", Small)
    found = load_inception(tmp_path / "w.safetensors")
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in torch.load(published).items())


def test_weights_that_are_not_the_published_ones_are_refused(published, tmp_path):
    from safetensors.torch import load_file, save_file

    convert_inception(published, tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match="has other weights than the network"):
        load_inception(tmp_path / "w.safetensors")
    changed = {name: value + 1 for name, value in load_file(tmp_path / "w.safetensors").items()}
    save_file(changed, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"does not hold the weights of pt_inception.* unchanged"):
        load_inception(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"cannot be read as safetensors .*convert_inception"):
        load_inception(published)
    published.write_bytes(published.read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=r"has the sha256 .*, that of the published weights begins with"):
        convert_inception(published, tmp_path / "y.safetensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        convert_inception(tmp_path / "missing.pth", tmp_path / "y.safetensors")
