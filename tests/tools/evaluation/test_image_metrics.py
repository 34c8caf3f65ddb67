from pathlib import Path

import pytest
import torch
from PIL import Image

from edm_deploy.errors import InputError
from edm_deploy_tools.evaluation.feature_network import features_of
from edm_deploy_tools.evaluation.frechet import frechet_distance
from edm_deploy_tools.evaluation.image_metrics import ImageMetrics, MetricRequest, covered, inception_score, metric_names


def test_the_inception_score_is_the_number_of_classes_that_are_told_apart():
    assert inception_score(torch.zeros(6, 5)) == pytest.approx(1.0)
    certain = torch.eye(4).repeat(3, 1) * 1000
    assert inception_score(certain) == pytest.approx(4.0)
    assert inception_score(certain, split=2) == pytest.approx(2.0)  # of each part, two classes


def test_a_point_is_covered_within_the_distance_to_the_third_neighbour():
    manifold = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])
    # Radii: 3, 2, 2, 3 and 99. 104 is within the last, -3 at the edge of the first, -3.5 outside.
    assert covered(torch.tensor([[-3.0], [104.0], [-3.5], [300.0]]), manifold) == 0.5
    assert covered(manifold, manifold) == 1.0


def test_precision_and_recall_tell_lost_quality_from_lost_variety():
    generator = torch.Generator().manual_seed(0)
    real, one_mode = (torch.randn(64, 3, 8, 8, generator=generator) * scale for scale in (0.5, 0.01))
    figures = ImageMetrics(MetricRequest(names=("precision", "recall", "fid")), real).of(one_mode)
    assert figures["recall, features-cifar10"] < 0.2
    again = ImageMetrics(MetricRequest(names=("precision", "recall", "fid")), real).of(real)
    assert again["precision, features-cifar10"] == again["recall, features-cifar10"] == 1.0
    assert figures["Frechet distance, features-cifar10"] == pytest.approx(frechet_distance(features_of(one_mode), features_of(real)))


def test_images_of_a_folder_take_the_place_of_the_float_model_s(tmp_path):
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for number, image in enumerate(((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    figures = ImageMetrics(MetricRequest(names=("fid",), images=tmp_path), torch.zeros(2, 3, 8, 8)).of(images)
    assert figures["Frechet distance, features-cifar10"] < 0.01  # equal up to 8 bits


def test_figures_on_inception_features_have_their_published_names():
    request = MetricRequest(names=("fid", "sfid", "is", "precision"), inception=Path(__file__))
    assert [request.label(name) for name in request.names] == ["FID", "sFID", "IS", "precision"]
    assert metric_names("FID, is,,fid") == ("fid", "is")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("fid", "lpips"), "--metrics has 'lpips'; expected some of fid, sfid, is, precision, recall"),
        (("is",), "--metrics is needs the Inception network: name its weights with --inception"),
        ((), "--metrics names none"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        MetricRequest(names=names)


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match=r"--metrics recall needs 4 images or more, 3 given\. Increase --samples"):
        ImageMetrics(MetricRequest(names=("recall",)), torch.zeros(3, 3, 8, 8))
