"""The Space in examples/space, in a browser, with the tests' Hub. Skipped where gradio or a browser is missing."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from tests.support.build import Make
from tests.support.hub import Hub
from tests.support.hub_server import TOKEN

pytest.importorskip("gradio", reason="the extra 'examples' is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="the extra 'examples' is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)
ROOT = Path(bnbfix.__file__).parent.parent
APP = ROOT / "examples" / "space" / "app.py"
SHOTS = os.environ.get("BNBFIX_SCREENSHOTS")  # a folder to look at what the tests see


@contextmanager
def space(hub: Hub, **environment: str) -> Iterator[str]:
    """The Space as a process of its own; yields its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ours = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, str(APP)], env=hub.environment | ours | environment)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
                break
            except OSError:
                assert child.poll() is None, "the Space ended"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        child.terminate()
        child.wait(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def tab(browser: Any, url: str, width: int = 1200, scheme: str = "light") -> Iterator[Any]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = context.new_page()
    found.goto(url)
    yield found
    context.close()


def ask(page: Any, repo: str) -> None:
    page.get_by_label("Model").fill(repo)
    page.get_by_role("button", name="Scan", exact=True).click()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_a_repo_is_scanned_and_its_report_shown(
    hub: Hub, pristine: Make, browser: Any, width: int, scheme: str
) -> None:
    hub.server.add("org/partial", pristine("dense31b", "partial", shards=2))
    with space(hub) as url, tab(browser, url, width, scheme) as page:
        ask(page, " https://huggingface.co/org/partial ")
        frame = page.frame_locator("iframe")
        frame.get_by_text("BNB103").first.wait_for()
        assert re.search(r"Fails in \d+ of \d+ release ranges", frame.locator(".last").inner_text())
        command = page.locator(".cm-content").inner_text()
        assert "bnbfix repair org/partial --vllm portable --create-pr" in command
        box = page.locator("iframe").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, "nothing is wider than the window"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        codes = frame.locator(".releases td:last-child a").all()
        right = [c.bounding_box()["x"] + c.bounding_box()["width"] for c in codes]
        assert right and max(right) <= box["x"] + box["width"], "every code is seen"
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/space-{width}-{scheme}.png", full_page=True)


def test_errors_are_shown_in_words(hub: Hub, pristine: Make, browser: Any) -> None:
    hub.server.add("org/hidden", pristine("e4b", "all"), access="private")
    with space(hub, HF_TOKEN=TOKEN) as url, tab(browser, url) as page:
        for repo, words in (
            ("/etc", "Name a model on the Hub"),
            ("--from=/etc/passwd", "Name a model on the Hub"),
            ("org/nowhere", "no such model on"),
            ("org/hidden", "no such model on"),  # the Space's own token is not used
        ):
            page.reload()
            ask(page, repo)
            page.get_by_text(words).first.wait_for()
            assert page.locator("iframe").count() == 0


def test_time_is_bounded(hub: Hub, pristine: Make, browser: Any) -> None:
    hub.server.add("org/slow", pristine("e4b", "all"))
    with space(hub, BNBFIX_SECONDS="0.01") as url, tab(browser, url) as page:
        ask(page, "org/slow")
        page.get_by_text("The scan took longer than").first.wait_for()


def test_users_do_not_wait_for_each_other(hub: Hub, pristine: Make, browser: Any) -> None:
    hub.server.add("org/fine", pristine("e4b", "all"))
    hub.server.add("org/other", pristine("dense31b", "partial"))
    with space(hub) as url, tab(browser, url) as one, tab(browser, url) as two:
        ask(one, "org/fine")
        ask(two, "org/other")
        two.frame_locator("iframe").get_by_text("BNB103").first.wait_for()
        one.frame_locator("iframe").get_by_text("BNB103").first.wait_for(state="detached")
        one.frame_locator("iframe").get_by_text("org/fine").first.wait_for()


def test_what_serves_a_sound_model_includes_the_plugin() -> None:
    app = runpy.run_path(str(APP))
    text = app["repair_commands"]("org/fine@v1", "0.32.0", {"verdict": "loads"})
    assert text == "pip install vllm==0.32.0 vllm-bnb-plugin\nvllm serve org/fine --revision v1"


def test_no_repair_is_offered_where_none_is_known() -> None:
    app = runpy.run_path(str(APP))
    finding = {"code": "BNB401", "severity": "fails", "reason": "no release loads it"}
    text = app["repair_commands"]("org/moe", "portable", {"verdict": "fails", "findings": [finding]})
    assert text == "pip install bnbfix\nbnbfix explain BNB401"
