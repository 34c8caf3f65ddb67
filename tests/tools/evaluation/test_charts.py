from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from edm_deploy_tools.evaluation.charts import colored, curves, heat_map, log_ticks, png_uri, spread


def test_a_picture_survives_its_data_uri():
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    kind, _, data = png_uri(picture).partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(picture))


def test_ticks_are_round_numbers_within_the_axis():
    assert log_ticks(-2.0, -0.5) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2])
    assert log_ticks(-4.0, 0.0) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_labels_move_apart_and_keep_their_order():
    assert spread([50.0, 10.0, 12.0], gap=5) == [50.0, 10.0, 15.0]


def test_curves_are_well_formed_and_name_each_line():
    chart = ElementTree.fromstring(curves({"a <b>": [0.1, 0.2], "c": [0.3, 0.01]}, [900, 0], x_label="x", y_label="y"))
    texts = {element.text for element in chart.iter() if element.text}
    assert {"a <b>", "c", "900"} <= texts


def test_no_values_give_no_chart():
    assert curves({"a": [0.0, 0.0]}, [1, 0], x_label="x", y_label="y") == ""


def test_a_heat_map_is_well_formed_even_where_all_values_are_equal():
    for values in (np.array([[0.1, 1.0], [10.0, 0.5]]), np.full((2, 2), 3.0)):
        chart = ElementTree.fromstring(heat_map(values, ["a", "b"], [0, 500], x_label="t", value_label="scale"))
        assert len([element for element in chart.iter() if element.tag == "image"]) == 2


def test_colours_run_from_dark_to_light():
    low, high = colored(np.array([[0.0, 1.0]]))[0]
    assert int(low.sum()) < int(high.sum())
