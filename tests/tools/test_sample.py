from __future__ import annotations

import pytest
from PIL import Image

from edm_deploy.errors import InputError
from edm_deploy.manifest import Range
from edm_deploy_tools.sample import batch_sizes, grid_of, sample


def test_batches_stay_within_the_profile():
    assert batch_sizes(20, Range(1, 8, 16)) == [16, 4]
    assert batch_sizes(32, Range(1, 8, 16)) == [16, 16]
    assert batch_sizes(3, Range(4, 4, 4)) == [4]


def test_more_images_than_a_batch_are_drawn(chain, tmp_path):
    drawn = sample(chain.engine, tmp_path / "images", num_images=10, steps=2)
    assert drawn.count == 10
    assert len(list((tmp_path / "images").glob("[0-9]*.png"))) == 10
    assert drawn.seconds_per_image == pytest.approx(drawn.seconds / 10)


def test_the_grid_enlarges_small_images_and_keeps_their_colours():
    grid = grid_of([Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")])
    assert grid.size == (2 * 100 - 4, 2 * 100 - 4)
    assert grid.getpixel((0, 0)) == (255, 0, 0)
    assert grid.getpixel((195, 195)) == (255, 255, 255)


def test_a_directory_of_something_else_is_left_alone(chain, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Exception, match="holds other files"):
        sample(chain.engine, tmp_path, num_images=1, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_no_images_are_refused(chain, tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        sample(chain.engine, tmp_path / "images", num_images=0)
