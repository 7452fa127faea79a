"""A real browser for tests: headless Chromium by the W3C WebDriver protocol, without a library."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from servers import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = (
    None if CHROMIUM and DRIVER else "needs a browser: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-background-networking", "--no-first-run",
)  # fmt: skip


class Browser:
    """A window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One command of the protocol; its value."""
        return _call(method, f"{self._session}/{path}", body)

    def open(self, url: str) -> None:
        self.call("POST", "url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function's body in the page."""
        return self.call("POST", "execute/sync", {"script": script, "args": arguments})

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression in the page, once it is true.

        Raises:
            TimeoutError: it does not come true; the message has the page's text.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"return {script}"):
                return value
            time.sleep(0.05)
        text = self.run("return document.body.innerText")
        raise TimeoutError(f"{script} is not true after {seconds} s; the page says:\n{text}")

    def stroke(self, points: Sequence[tuple[float, float]], kind: str = "mouse") -> None:
        """Draw a line through points of the window, in CSS pixels, with a pointer of a kind."""
        moves = [
            {"type": "pointerMove", "duration": 10, "x": round(x), "y": round(y)} for x, y in points
        ]
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}}
        actions = [moves[0], down, *moves[1:], up]
        self.call("POST", "actions", {"actions": [{**pointer, "actions": actions}]})

    def press(self, key: str) -> None:
        """Press and release a key; special ones by their WebDriver code."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def picture(self, file: Path) -> None:
        """Save what the window shows as PNG."""
        file.write_bytes(b64decode(self.call("GET", "screenshot")))


@contextmanager
def browsing(*flags: str) -> Iterator[Browser]:
    """A window of a fresh browser, closed at the end."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    driver = subprocess.Popen(
        [str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(f"{url}/status")
        options = {"binary": CHROMIUM, "args": [*FLAGS, *flags]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = f"{url}/session/{_call('POST', f'{url}/session', wanted)['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _call("DELETE", session)
    finally:
        driver.terminate()
        driver.wait(30)


def _wait_for(url: str) -> None:
    for _ in range(300):
        try:
            _call("GET", url)
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{DRIVER} does not answer")


def _call(method: str, url: str, body: Any = None) -> Any:
    payload = json.dumps(body or {}).encode() if method == "POST" else None
    request = urllib.request.Request(url, payload, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.read()[:1000]!r}") from None
