from __future__ import annotations

import json

import pytest

from calibration.run.options import Progress
from edm_deploy_tools.common import console
from edm_deploy_tools.common.console import (
    bytes_of,
    cell,
    finite,
    plain_progress,
    print_json,
    print_table,
    progress_words,
    size_words,
    time_words,
    training_progress,
)

NOW = Progress(stage="finetune", step=3, total=9, loss=0.5, rate=2.0, eta_seconds=3.0, memory_bytes=1_500_000_000)


@pytest.mark.parametrize(("size", "words"), [(12, "12 B"), (1500, "1.5 kB"), (4_400_000, "4.4 MB"), (2_300_000_000, "2.3 GB")])
def test_sizes_have_units(size, words):
    assert size_words(size) == words


@pytest.mark.parametrize(("seconds", "words"), [(0.26, "0.3 s"), (48, "48 s"), (312, "5 min 12 s"), (7500, "2 h 05 min")])
def test_times_have_units(seconds, words):
    assert time_words(seconds) == words


def test_progress_has_loss_rate_time_left_and_memory():
    assert progress_words(NOW) == "loss 0.5, 2.00/s, 3.0 s left, memory 1.5 GB"


def test_without_a_terminal_progress_is_a_line_on_stderr(capsys):
    plain_progress()(NOW)
    captured = capsys.readouterr()
    assert captured.err == "finetune 3/9 loss 0.5, 2.00/s, 3.0 s left, memory 1.5 GB\n"
    assert captured.out == ""


def test_json_can_be_read_back(capsys):
    print_json({"a": [1, 2.5]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, 2.5]}


def test_json_has_null_for_numbers_that_are_not_finite(capsys):
    print_json({"a": float("nan"), "b": [1.0, float("-inf")], "c": (2, "x")})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": None, "b": [1.0, None], "c": [2, "x"]}
    assert finite(True) is True


def test_training_progress_shows_rate_and_time_left(capsys):
    training_progress(3)(1, 0.25)
    line = capsys.readouterr().err
    assert line.startswith("train 1/3 loss 0.25, ")
    assert " left, memory " in line


def test_none_is_a_dash_and_fractions_are_short():
    assert (cell(None), cell(0.123456), cell(7), cell("x")) == ("-", "0.1235", "7", "x")


def test_the_size_of_a_directory_is_that_of_its_files(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "below" / "b").write_bytes(b"345")
    assert bytes_of(tmp_path) == 5


def test_square_brackets_are_no_markup(capsys):
    console.say('pip install "edm-deploy[openvino]"')
    console.print_facts({"inputs": "sample [batch, 3]"})
    console.print_table("", [{"shape": "[1, 2]"}])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("edm-deploy[openvino]", "sample [batch, 3]", "[1, 2]"))


def test_without_a_terminal_no_cell_is_folded(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    site = "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
    print_table("Sites", [{"site": site} | {f"column {number}": "1.23e-04 to 4.56e-02" for number in range(8)}])
    assert sum(site in line and line.count("4.56e-02") == 8 for line in capsys.readouterr().out.splitlines()) == 1
