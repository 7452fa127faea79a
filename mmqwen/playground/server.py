"""The playground's own small server: three files from memory, rows of a drawing, answers.

It listens on localhost alone, reads no file for a request, and answers only pages that it has
served itself: another site's page in the same browser (or a name that was pointed at 127.0.0.1) is
refused by its `Host` and `Origin`.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import torch

from mmqwen.demo import digits
from mmqwen.playground.drawing import (
    MAX_POINTS,
    SAMPLES,
    DrawingError,
    draw,
    read_strokes,
    rows_of,
)
from mmqwen.playground.engine import Engine, EngineError

HOST = "127.0.0.1"
MAX_BODY = 64 * MAX_POINTS
"""Bytes of a request: a point is some 20."""
MAX_OPEN = 16
"""Requests at a time; one person needs two."""
SOCKET_SECONDS = 15
"""How long a client may take to send, or to take what it is sent."""

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Refusal(Exception):
    """A request that is answered with a status and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Playground(ThreadingHTTPServer):
    """The page and its two questions, beside a model server.

    Args:
        engine: the model server.
        port: where to listen; 0 for any free port.
        watch: called twice a second; what it raises ends `serve_forever`.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = 32

    def __init__(
        self, engine: Engine, port: int = 0, watch: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__((HOST, port), Handler)
        self.engine = engine
        self.watch = watch
        self.free = threading.BoundedSemaphore(MAX_OPEN)
        folder = files("mmqwen.playground") / "page"
        self.page = {
            path: (folder.joinpath(name).read_bytes(), kind) for path, (name, kind) in PAGE.items()
        }

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def service_actions(self) -> None:
        """Called by `serve_forever` between requests."""
        self.watch()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each request, up to `MAX_OPEN`."""
        if not self.free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """What the thread does."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news; anything else is shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Playground
    timeout = SOCKET_SECONDS
    server_version = "mmqwen"
    sys_version = ""

    def do_GET(self) -> None:
        """The page's files, and what it begins with."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """`/rows`: a drawing as rows. `/ask`: the rows that are sent, and the answer in pieces."""
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the person's."""

    def _answer(self, work: Callable[[], None]) -> None:
        try:
            self._check_origin()
            work()
        except Refusal as refusal:
            body = json.dumps({"error": str(refusal)}).encode()
            self._send(body, "application/json", refusal.status)

    def _check_origin(self) -> None:
        port = self.server.server_port
        own = {f"{name}:{port}" for name in (HOST, "localhost")}
        if self.headers.get("Host", "") not in own:
            raise Refusal(403, f"this server is {self.server.url} alone")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{name}" for name in own}:
            raise Refusal(403, "pages of other sites are not answered")

    def _get(self) -> None:
        if self.path == "/start":
            start = {"samples": SAMPLES, "question": digits.QUESTION}
            self._send(json.dumps(start).encode(), "application/json")
        elif self.path in self.server.page:
            self._send(*self.server.page[self.path])
        else:
            raise Refusal(404, "there is no such page; go to /")

    def _post(self) -> None:
        if self.path not in ("/rows", "/ask"):
            raise Refusal(404, "there is no such page; go to /")
        strokes, shuffle = self._read_drawing()
        rows = rows_of(strokes, shuffle)
        seen = {"rows": {name: item.tolist() for name, item in rows.items()}}
        if self.path == "/rows":
            seen["image"] = draw(strokes).tolist()
            self._send(json.dumps(seen).encode(), "application/json")
            return
        self._start(200, "application/x-ndjson")
        for event in self._events(seen, rows):
            self.wfile.write(json.dumps(event).encode() + b"\n")

    def _events(
        self, seen: Mapping[str, Any], rows: Mapping[str, torch.Tensor]
    ) -> Iterator[Mapping[str, Any]]:
        yield seen
        try:
            yield from self.server.engine.ask(rows)
        except EngineError as error:
            yield {"error": str(error)}

    def _read_drawing(self) -> tuple[list[Any], int | None]:
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "expected Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise Refusal(411, "expected a Content-Length")
        if int(length) > MAX_BODY:
            raise Refusal(413, f"{int(length)} bytes, expected at most {MAX_BODY}")
        try:
            body = json.loads(self.rfile.read(int(length)))
            if not isinstance(body, dict) or body.keys() - {"strokes", "shuffle"}:
                raise DrawingError('expected {"strokes": [[[x, y], ...], ...], "shuffle": N}')
            shuffle = body.get("shuffle")
            if shuffle is not None and not (type(shuffle) is int and 0 <= shuffle < 2**31):
                raise DrawingError("shuffle is no integer from 0, or null")
            return read_strokes(body.get("strokes")), shuffle
        except (ValueError, RecursionError) as error:  # JSON's errors are ValueErrors
            raise Refusal(400, str(error)[:200]) from None
        except TimeoutError:
            raise Refusal(408, "the request did not come in time") from None

    def _start(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self._start(status, kind, len(body))
        self.wfile.write(body)
