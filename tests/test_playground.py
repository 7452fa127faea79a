"""The playground: drawings as rows, its small server under bad requests, and a real browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.datasets import load_digits

from browser import MISSING, browsing
from mmqwen.cli import main
from mmqwen.demo import digits
from mmqwen.modalities import parse_modalities
from mmqwen.playground import server as server_module
from mmqwen.playground.drawing import (
    MAX_POINTS,
    MAX_STROKES,
    SAMPLES,
    DrawingError,
    draw,
    read_strokes,
    rows_of,
)
from mmqwen.playground.engine import Engine, EngineError
from mmqwen.playground.server import MAX_BODY, Playground
from mmqwen.transport import decode_rows
from servers import free_port
from tiny import make_composite

LINE = [[[0.5, 0.1], [0.5, 0.9]]]
SPECS = parse_modalities(digits.MODALITIES)


def sample(digit: str) -> list[np.ndarray]:
    return [np.array(stroke) for stroke in SAMPLES[digit]]


# -- drawings ----------------------------------------------------------------------------------


def test_a_drawing_lies_among_real_digits_of_its_kind():
    real = load_digits()
    for digit in SAMPLES:
        apart = ((real.images / 16 - draw(sample(digit))) ** 2).sum(axis=(1, 2))
        near = real.target[apart.argsort()[:5]]
        assert np.bincount(near).argmax() == int(digit)


def test_place_and_size_of_a_drawing_do_not_matter():
    image = draw(sample("5"))
    assert image.dtype == np.float32
    assert set((image * 16).flatten().tolist()) <= set(range(17))
    assert abs(image.sum() * 16 - 310) < 20  # as much ink as the data's
    moved = [stroke * 300 + [40, -1000] for stroke in sample("5")]
    assert np.array_equal(draw(moved), image)


@pytest.mark.parametrize(
    "strokes", [[[[3, 3]]], [[[3, 3], [3, 3]]], [[[0, 5], [9, 5]]], [[[-1e6, -1e6], [1e6, 1e6]]]]
)
def test_any_mark_has_rows(strokes):
    rows = rows_of(read_strokes(strokes))
    assert rows["profile"].shape == (2, 10)
    assert 1 <= len(rows["strokes"]) <= 8
    assert all(bool(item.isfinite().all()) for item in rows.values())


def test_shuffled_rows_are_the_same_numbers_elsewhere():
    plain, shuffled, other = (rows_of(sample("4"), seed) for seed in (None, 1, 2))
    for name, item in plain.items():
        assert shuffled[name].shape == item.shape
        assert torch.equal(shuffled[name].flatten().sort()[0], item.flatten().sort()[0])
        assert not torch.equal(shuffled[name], item)
        assert not torch.equal(shuffled[name], other[name])
        assert torch.equal(shuffled[name], rows_of(sample("4"), 1)[name])


BAD_STROKES = [
    (None, "no list of 1"),
    ([], "no list of 1"),
    ([[]], "stroke 0 is no list of points"),
    ([[[1, 2]], "x"], "stroke 1 is no list"),
    ([[[1]]], "no point"),
    ([[[1, 2, 3]]], "no point"),
    ([[[1, True]]], "no point"),
    ([[["1", 2]]], "no point"),
    ([[[float("nan"), 2]]], "no point"),
    ([[[float("inf"), 2]]], "no point"),
    ([[[10**400, 2]]], "no point"),
    ([[[1, 2]]] * (MAX_STROKES + 1), "fewer lines"),
    ([[[1, 2]] * (MAX_POINTS + 1)], "shorter line"),
]


@pytest.mark.parametrize(("strokes", "words"), BAD_STROKES)
def test_what_is_no_drawing_is_refused(strokes, words):
    with pytest.raises(DrawingError, match=words):
        read_strokes(strokes)


# -- the server, with a model server that is none ------------------------------------------------


class StandIn(BaseHTTPRequestHandler):
    """Answers with the number of strokes' rows, or fails as `mode` says."""

    mode = "good"
    asked: ClassVar[list[dict]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, b'{"data": [{"id": "digits"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if self.mode == "refuses":
            self._send(400, b'{"error": {"message": "modality \'strokes\': got\\nwidth 3"}}')
            return
        if self.mode == "nonsense":
            self._send(200, b"data: {}\n\n")
            return
        parts = body["messages"][0]["content"]
        rows = decode_rows(parts[0]["strokes_embeds"], SPECS["strokes"])
        top = [{"token": str(at), "logprob": -1.0 - at} for at in range(10)]
        top.append({"token": "<|im_end|>", "logprob": -20.0})
        pieces = []
        for text in (str(len(rows)), ""):
            choice = {"delta": {"content": text}, "logprobs": {"content": [{"top_logprobs": top}]}}
            pieces.append(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        if self.mode == "busy":  # both tokens in one piece
            choice = {"delta": {"content": str(len(rows))}, "logprobs": {"content": [
                {"top_logprobs": top}, {"top_logprobs": top}]}}  # fmt: skip
            pieces = [b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"]
        if self.mode == "breaks":
            pieces[1] = b'data: {"error": {"message": "the server is shutting down"}}\n\n'
        self._send(200, b"".join(pieces) + b"data: [DONE]\n\n")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Its URL, while a thread serves."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setattr(StandIn, "asked", [])
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), StandIn)) as url:
        yield url


@pytest.fixture
def page(standin):
    with serving(Playground(Engine(standin))) as url:
        yield url


def request(url, path, body=None, method=None, **headers):
    """Status, headers, and the body as text."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
    if isinstance(body, dict):
        body = json.dumps(body)
        headers = {"Content-Type": "application/json", **headers}
    method = method or ("GET" if body is None else "POST")
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read().decode()
    connection.close()
    return found


def ask(url, strokes, **more):
    status, _, text = request(url, "/ask", {"strokes": strokes, **more})
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def test_the_page_is_three_files_that_ask_for_nothing_else(page):
    texts = {}
    for path, kind in (("/", "text/html"), ("/style.css", "text/css"), ("/app.js", "text/java")):
        status, headers, texts[path] = request(page, path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not [path for path, text in texts.items() if "//" in text.replace("// ", "")]
    start = json.loads(request(page, "/start")[2])
    assert list(start["samples"]) == list("0123456789")
    assert start["question"] == digits.QUESTION


def test_rows_and_answer_are_those_of_the_drawing(page):
    strokes = json.loads(json.dumps(SAMPLES["7"]))
    expected = {name: item.tolist() for name, item in rows_of(sample("7")).items()}
    status, _, text = request(page, "/rows", {"strokes": strokes})
    assert status == 200
    assert json.loads(text) == {"rows": expected, "image": draw(sample("7")).tolist()}

    first, *tokens = ask(page, strokes)
    assert first == {"rows": expected}
    assert [token["token"] for token in tokens] == [str(len(expected["strokes"])), ""]
    assert list(tokens[0]["chances"]) == list("0123456789")
    (sent,) = StandIn.asked
    assert sent["stream"] is True
    *parts, words = sent["messages"][0]["content"]
    assert words == {"type": "text", "text": digits.QUESTION}
    for part in parts:
        name = part["type"].removesuffix("_embeds")
        assert decode_rows(part[part["type"]], SPECS[name]).tolist() == expected[name]

    shuffled = ask(page, strokes, shuffle=3)[0]["rows"]
    assert shuffled == {name: item.tolist() for name, item in rows_of(sample("7"), 3).items()}


def test_tokens_that_come_in_one_piece_are_said_once(page, monkeypatch):
    monkeypatch.setattr(StandIn, "mode", "busy")
    _, *tokens = ask(page, SAMPLES["7"])
    assert [token["token"] for token in tokens] == [str(len(rows_of(sample("7"))["strokes"])), ""]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("/nothing", None, {}, 404, "no such page"),
        ("/../../etc/passwd", None, {}, 404, "no such page"),
        ("/app.js?x=/etc/passwd", None, {}, 404, "no such page"),
        ("/nothing", {"strokes": LINE}, {}, 404, "no such page"),
        ("/", None, {"Host": "evil.example"}, 403, "alone"),
        ("/ask", {"strokes": LINE}, {"Origin": "http://evil.example"}, 403, "other sites"),
        ("/ask", {"strokes": LINE}, {"Origin": "null"}, 403, "other sites"),
        ("/ask", {"strokes": LINE}, {"Content_Type": "text/plain"}, 415, "application/json"),
        ("/ask", {"strokes": LINE}, {"Content_Length": "-1"}, 411, "Content-Length"),
        ("/ask", {"strokes": LINE}, {"Content_Length": str(MAX_BODY + 1)}, 413, "at most"),
        ("/ask", "[" * 50_000, {"Content_Type": "application/json"}, 400, ""),
        ("/ask", "9" * 5000, {"Content_Type": "application/json"}, 400, ""),
        ("/ask", b"\xff\xfe\x00", {"Content_Type": "application/json"}, 400, ""),
        ("/ask", "[1]", {"Content_Type": "application/json"}, 400, "expected"),
        ("/ask", {}, {}, 400, "strokes"),
        ("/ask", {"strokes": LINE, "file": "x"}, {}, 400, "expected"),
        ("/ask", {"strokes": LINE, "shuffle": 1.5}, {}, 400, "shuffle"),
        ("/ask", {"strokes": LINE, "shuffle": -1}, {}, 400, "shuffle"),
        ("/rows", {"strokes": [[[float("nan"), 1]]]}, {}, 400, "no point"),
    ],
)
def test_bad_requests_are_refused_before_the_model_is_asked(
    page, path, body, headers, status, words
):
    found, _, text = request(page, path, body, **headers)
    assert found == status
    assert words in json.loads(text)["error"]
    assert StandIn.asked == []
    assert ask(page, LINE)[1]["token"]


def test_other_methods_are_refused(page):
    assert request(page, "/", method="PUT")[0] == 501
    assert request(page, "/", method="DELETE")[0] == 501


def test_clients_that_send_nothing_do_not_keep_others_out(standin, monkeypatch, capfd):
    monkeypatch.setattr(server_module.Handler, "timeout", 2)
    with serving(Playground(Engine(standin))) as page:
        half, *silent = [HTTPConnection(page.removeprefix("http://")) for _ in range(40)]
        half.putrequest("POST", "/ask")
        half.putheader("Content-Type", "application/json")
        half.putheader("Content-Length", "100")
        half.endheaders(b"{")
        for connection in silent:
            connection.connect()
        assert half.getresponse().status == 408
        end = time.monotonic() + 30
        while time.monotonic() < end:  # those that came while all places were taken were closed
            try:
                assert ask(page, LINE)[1]["token"]
                break
            except ConnectionError:
                time.sleep(0.1)
        else:
            pytest.fail("no place became free")
        for connection in [half, *silent]:
            connection.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("refuses", "answers 400: modality 'strokes': got width 3"),
        ("nonsense", "not as `mmqwen serve` does"),
        ("breaks", "shutting down"),
    ],
)
def test_a_model_server_that_fails_is_said_on_the_page(page, monkeypatch, mode, words):
    monkeypatch.setattr(StandIn, "mode", mode)
    first, *_, last = ask(page, LINE)
    assert "rows" in first
    assert words in last["error"]
    monkeypatch.setattr(StandIn, "mode", "good")
    assert ask(page, LINE)[1]["token"]


def test_a_model_server_that_is_not_there_is_said():
    engine = Engine(f"http://127.0.0.1:{free_port()}")
    assert not engine.is_up()
    with pytest.raises(EngineError, match="does not answer"):
        list(engine.ask(rows_of(sample("1"))))
    with pytest.raises(EngineError, match="expected http"):
        Engine("localhost:8000")


def test_it_listens_on_localhost_alone(standin):
    playground = Playground(Engine(standin))
    assert playground.server_address[0] == "127.0.0.1"
    playground.server_close()


# -- the command -------------------------------------------------------------------------------


def test_a_checkpoint_of_other_rows_is_refused(tmp_path, capsys):
    assert main(["playground", str(tmp_path)]) == 2
    assert "`mmqwen demo` makes" in capsys.readouterr().err
    other = make_composite(tmp_path / "other", modalities={"m1": 24})
    assert main(["playground", str(other)]) == 2
    error = capsys.readouterr().err
    assert "{'m1': 24}" in error
    assert "handwritten digits" in error


def test_the_demo_ends_with_it_where_it_went_well(monkeypatch, tmp_path):
    played = []
    monkeypatch.setattr("mmqwen.playground.run.run", lambda folder: played.append(folder) or 0)
    for status, expected in ((1, []), (0, [tmp_path / "checkpoint"])):
        monkeypatch.setattr("mmqwen.demo.run.run", lambda *_, result=status, **__: result)
        assert main(["demo", "--play", "-o", str(tmp_path)]) == status
        assert played == expected


# -- the whole, with vLLM and a browser -----------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`mmqwen playground` in a process of its own, and its URL; ended by SIGTERM."""
    pytest.importorskip("vllm")
    from mmqwen.demo.train import train

    folder = tmp_path_factory.mktemp("playground")
    train(folder / "checkpoint", steps=30)
    port = free_port()
    command = [sys.executable, "-m", "mmqwen.cli", "playground", str(folder / "checkpoint")]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--no-browser"],
            stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while "Ctrl-C ends it" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert psutil.wait_procs(children, timeout=5)[1] == [], "the model server lives on"
        assert "Traceback" not in log.read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_vllm_answers_drawings_and_outlives_bad_requests(whole):
    url, _ = whole
    good = ask(url, LINE)
    assert "".join(event["token"] for event in good[1:])
    assert 0 < sum(good[1]["chances"].values()) <= 1 + 1e-6
    for strokes, _ in BAD_STROKES:
        if strokes is not None:
            assert request(url, "/ask", {"strokes": strokes})[0] in (400, 413)
    cut = HTTPConnection(url.removeprefix("http://"))
    body = json.dumps({"strokes": LINE})
    cut.request("POST", "/ask", body, {"Content-Type": "application/json"})
    cut.close()  # a person who leaves
    assert [event["token"] for event in ask(url, LINE)[1:]] == [e["token"] for e in good[1:]]
    shuffled = ask(url, LINE, shuffle=1)
    assert shuffled[1]["chances"] != good[1]["chances"]


DONE = "['sent', 'shuffled'].every((name) => document.getElementById(name).dataset.done)"
SHOWN = """return ['sent', 'shuffled'].map((name) => {
  const find = (selector) => [...document.querySelectorAll(`#${name} ${selector}`)];
  const numbers = (kind) => find(`.${kind} i`).map((cell) => Number(cell.title));
  return {said: find('.said')[0].textContent, time: find('.time')[0].innerText,
    strokes: numbers('strokes'), profile: numbers('profile'),
    chances: find('.chances span').map((bar) => bar.title)};
});"""


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_in_a_browser_a_digit_is_drawn_sent_and_read(whole):
    url, _ = whole
    with browsing("--window-size=1200,900") as window:
        window.open(url)
        window.wait(DONE)  # the page begins with a digit of its own
        first, _ = window.run(SHOWN)
        assert first["strokes"] == rows_of(sample("3"))["strokes"].flatten().tolist()

        for kind in ("mouse", "touch"):
            window.press("\ue00c")  # Escape
            assert window.run("return document.querySelectorAll('.rows i').length") == 0
            left, top, side = window.run(
                "const b = document.getElementById('pad').getBoundingClientRect();"
                "return [b.left, b.top, b.width]"
            )
            corner = ((0.3, 0.1), (0.3, 0.9), (0.7, 0.9))
            window.stroke([(left + x * side, top + y * side) for x, y in corner], kind)
            window.wait("document.querySelector('#sent .strokes i')")
            window.wait(DONE)
            sent, shuffled = window.run(SHOWN)
            columns = [row[8:].index(2) for row in np.reshape(sent["strokes"], (-1, 16)).tolist()]
            assert columns == [1, 2, 3, 4, 5, 6], f"not the columns that the {kind} drew on"
            assert len(sent["profile"]) == 20
            assert sent["said"]
            assert "ms" in sent["time"]
            assert sorted(shuffled["strokes"]) == sorted(sent["strokes"])
            assert shuffled["strokes"] != sent["strokes"]
            assert shuffled["chances"] != sent["chances"]

        window.run("delete document.getElementById('shuffled').dataset.done")
        window.press("s")
        window.wait(DONE)
        assert window.run(SHOWN)[1]["strokes"] != shuffled["strokes"]

        window.press("1")
        window.wait(DONE)
        one, _ = window.run(SHOWN)
        assert one["strokes"] == rows_of(sample("1"))["strokes"].flatten().tolist()
        said = "".join(event["token"] for event in ask(url, SAMPLES["1"])[1:])
        assert one["said"] == said.strip()

        for digit in "4747":  # while the one before is being read
            window.press(digit)
            window.wait("document.querySelector('#sent .strokes i')")
        window.wait(DONE)
        (last, _), events = window.run(SHOWN), ask(url, SAMPLES["7"])
        assert last["strokes"] == np.ravel(events[0]["rows"]["strokes"]).tolist()
        assert last["said"] == "".join(event["token"] for event in events[1:]).strip()
        assert window.run("return document.querySelector('#problem').textContent") == ""
