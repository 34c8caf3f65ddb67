from __future__ import annotations

from edm_deploy_tools.evaluation.report import html_table


def test_a_table_escapes_what_it_shows():
    table = html_table([{"": "<a>", "n": 0.123456}], numbers=("n",))
    assert "&lt;a&gt;" in table
    assert '<td class="number">0.1235</td>' in table


def test_what_is_not_known_is_a_dash():
    assert "<td>-</td>" in html_table([{"": "a", "x": None}])
