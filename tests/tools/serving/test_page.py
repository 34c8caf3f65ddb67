"""The page at `/`, as a user sees it: in Chromium, from a server on this machine, with everything else unreachable."""

import os
from pathlib import Path

import pytest

from tests.tools.serving.browser import CHROMIUM, browsing
from tests.tools.serving.http_client import serving

pytestmark = [pytest.mark.extended, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt install chromium)")]
DONE = "document.querySelectorAll('figure[data-done] img')"
ERROR = "document.getElementById('error')"


@pytest.fixture
def browser(tmp_path):
    with browsing(tmp_path / "profile") as opened:
        yield opened


def fill(browser, **fields):
    for name, value in fields.items():
        browser.evaluate(f"document.getElementById('form').elements.{name}.value = {value!r}")


def test_images_are_generated_with_previews_saved_and_those_of_the_api(browser, replica, tmp_path):
    with serving({"tiny": replica}) as client:
        browser.open(f"http://127.0.0.1:{client.port}/")
        browser.wait_for("document.querySelector('select[name=scheduler]').options.length")
        assert "UNet2DModel" in browser.evaluate("document.getElementById('about').textContent")
        assert browser.evaluate("document.getElementById('prompt-field').hidden")  # this model takes no prompt
        browser.evaluate(
            "window.previews = 0; new MutationObserver(list => { previews += document.querySelectorAll('img.preview').length })"
            ".observe(document.getElementById('images'), {childList: true, subtree: true})"
        )
        fill(browser, seed="3", steps="60", n="2", scheduler="euler")
        browser.evaluate("document.getElementById('generate').click()")
        browser.wait_for(f"{DONE}.length === 2")
        assert browser.evaluate("previews") > 0
        sources = browser.evaluate(f"[...{DONE}].map(image => image.src)")
        expected = client.generate(seed=3, steps=60, n=2, scheduler="euler").json["data"]
        assert sources == [f"data:image/png;base64,{image['b64_json']}" for image in expected]
        assert browser.evaluate("[...document.querySelectorAll('figcaption a')].map(link => link.download)") == ["seed-3.png", "seed-4.png"]
        browser.wait_for("document.querySelector('#queue tr td').textContent === 'tiny'")
        assert browser.evaluate("document.querySelectorAll('#queue .rows i').length") == 4
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert browser.evaluate(
            "document.querySelector('#queue').getBoundingClientRect().right <= document.querySelector('#images').getBoundingClientRect().left"
        )
        keep = os.environ.get("EDM_DEPLOY_SCREENSHOTS")
        browser.screenshot((Path(keep) if keep else tmp_path) / "page.png")


def test_a_request_can_be_cancelled_and_an_error_is_shown(browser, replica):
    with serving({"tiny": replica}) as client:
        browser.open(f"http://127.0.0.1:{client.port}/#steps=150&n=10&run=1")
        browser.wait_for("document.querySelectorAll('figure').length === 10")
        browser.evaluate("document.getElementById('cancel').click()")
        browser.wait_for("document.querySelectorAll('figure').length === 0")
        browser.wait_for("!document.getElementById('generate').disabled")
        assert browser.evaluate(f"{ERROR}.hidden")
        fill(browser, n="1", size="64x64")
        browser.evaluate("document.getElementById('generate').click()")
        browser.wait_for(f"!{ERROR}.hidden")
        assert "outside the engine's profile" in browser.evaluate(f"{ERROR}.textContent")
    assert replica._loop.stats().cancelled == 1


def test_where_a_key_is_needed_the_page_asks_for_it(browser, replica):
    with serving({"tiny": replica}, keys=frozenset({"secret"})) as client:
        browser.open(f"http://127.0.0.1:{client.port}/")
        browser.wait_for("!document.getElementById('key-field').hidden")
        fill(browser, key="secret", steps="2", seed="1")
        browser.evaluate("document.querySelector('[name=key]').dispatchEvent(new Event('change'))")
        browser.wait_for("document.querySelector('select[name=scheduler]').options.length")
        browser.evaluate("document.getElementById('generate').click()")
        browser.wait_for(f"{DONE}.length === 1")
        assert browser.evaluate(f"{ERROR}.hidden")
