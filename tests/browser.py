"""Opens pages in headless Chromium: a copy of the page says itself what is seen of it."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from html import escape, unescape
from pathlib import Path

import pytest

# What a page is asked once it has loaded. It lies in a frame of the width that is wanted, because
# the browser's own window is never as narrow as a phone's.
_SCRIPT = """<script>addEventListener("load", () => {
  const all = [...document.images], root = document.scrollingElement;
  const wide = [...document.querySelectorAll("body *")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.scrollWidth > e.clientWidth + 1
      && getComputedStyle(e).display !== "inline" && e.clientWidth > 0);
  parent.document.body.dataset.seen = JSON.stringify({
    width: innerWidth, scroll: root.scrollWidth, height: root.scrollHeight, images: all.length,
    broken: all.filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
    wide: wide.map(e => e.tagName + "." + e.className).slice(0, 9)});
});</script></body>"""


def chromium() -> str:
    """The browser's command; without one the test is skipped, under CI=true it fails."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    reason = "no Chromium: apt-get install chromium"
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def seen(page: Path, width: int) -> dict:
    """What a page looks like at a width in pixels."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        html = page.read_text("utf-8")
        assert html.count("</body>") == 1
        inner = escape(html.replace("</body>", _SCRIPT), quote=True)
        frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{inner}"></iframe>'
        copy.write_text(f'<!doctype html><meta charset="utf-8"><body>{frame}</body>', "utf-8")
        command = [
            *(chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={folder}/profile", "--window-size=1400,1000"),
            *("--virtual-time-budget=5000", "--dump-dom", copy.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    answer = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert answer, done.stderr[-1000:]
    return json.loads(unescape(answer[1]))
