"""The model server behind the playground: asked over HTTP, or started here."""

from __future__ import annotations

import http.client
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from mmqwen.client import embeds_part
from mmqwen.demo import digits

START_SECONDS = 300
STOP_SECONDS = 30
ANSWER_SECONDS = 60
MAX_TOKENS = 4


class EngineError(RuntimeError):
    """The model server is not there, or refused."""


class Engine:
    """A running `mmqwen serve` of the demo's checkpoint.

    Args:
        url: where it listens, as `http://127.0.0.1:8000`.

    Raises:
        EngineError: the URL cannot be read.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"--url {url!r} is no address, expected http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._parts = parts
        self._model: str | None = None

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            with self._request("GET", "/health"):
                return True
        except EngineError:
            return False

    def model(self) -> str:
        """The name of the model that it serves.

        Raises:
            EngineError: it does not answer.
        """
        if self._model is None:
            with self._request("GET", "/v1/models") as answer:
                self._model = str(json.load(answer)["data"][0]["id"])
        return self._model

    def ask(self, rows: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
        """Ask which digit some rows are.

        Args:
            rows: `strokes` `[n, 16]` and `profile` `[2, 10]`.

        Yields:
            `{"token": text, "chances": {digit: probability}}` for each token, as it comes.

        Raises:
            EngineError: it does not answer, or refuses.
        """
        content = [embeds_part(name, item) for name, item in rows.items()]
        body = {
            "model": self.model(),
            "messages": [
                {"role": "user", "content": [*content, {"type": "text", "text": digits.QUESTION}]}
            ],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 20,
        }
        with self._request("POST", "/v1/chat/completions", body) as answer:
            for line in answer:
                data = line.decode("utf-8").removeprefix("data:").strip()
                if not line.startswith(b"data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise EngineError(str(event["error"].get("message")))
                for choice in event["choices"]:
                    text = choice["delta"].get("content") or ""
                    # A busy server sends several tokens at once, and their text in one piece.
                    for token in (choice.get("logprobs") or {}).get("content") or ():
                        yield {"token": text, "chances": _chances(token["top_logprobs"])}
                        text = ""

    @contextmanager
    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """A good answer; the connection ends with the block, which also ends an answer midway."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else None
        connection = (kind or http.client.HTTPConnection)(
            self._parts.netloc.rpartition("@")[2], timeout=ANSWER_SECONDS
        )
        try:
            payload = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} if payload else {}
            connection.request(method, self._parts.path.rstrip("/") + path, payload, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise EngineError(_message(answer))
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"the model server at {self.url} does not answer ({type(error).__name__}); start "
                "it with `mmqwen serve CHECKPOINT`, or leave --url out"
            ) from None
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self.url} answers, but not as `mmqwen serve` does ({error!r:.100}); name "
                "another --url, or leave it out"
            ) from None
        finally:
            connection.close()


def _message(answer: http.client.HTTPResponse) -> str:
    """What a refusal says."""
    text = answer.read(100_000).decode("utf-8", "replace")
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = text
    return f"the model server answers {answer.status}: {' '.join(message.split())[:500]}"


def _chances(tokens: list[dict[str, Any]]) -> dict[str, float]:
    """Of the digits among the likeliest tokens."""
    return {
        token["token"].strip(): math.exp(token["logprob"])
        for token in tokens
        if token["token"] in "0123456789" and token["token"]
    }


@contextmanager
def started(checkpoint: Path, port: int) -> Iterator[tuple[Engine, subprocess.Popen[bytes]]]:
    """`mmqwen serve CHECKPOINT` on localhost, from ready to ended.

    Args:
        checkpoint: one that `mmqwen demo` has made.
        port: where it listens.

    Yields:
        The engine, and its process.

    Raises:
        EngineError: it did not start; the message has the end of its log.
    """
    gpu = torch.cuda.is_available()
    # Compiled, a CPU engine starts in 17 to 36 s (a busy two-core machine); eagerly, in 6.
    flags = (
        ["--gpu-memory-utilization", "0.3", "--dtype", "bfloat16"]
        if gpu
        else ["--enforce-eager", "--dtype", "float32"]
    )
    command = [
        *(sys.executable, "-m", "mmqwen.serve", str(checkpoint), "--max-model-len", "512"),
        *("--host", "127.0.0.1", "--port", str(port), *flags),
    ]
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**defaults, **os.environ}
    # The demo's own engine runs in its process; a server's needs one of its own to be ended.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches us, and we end it
        )
        try:
            engine = Engine(f"http://127.0.0.1:{port}")
            end = time.monotonic() + START_SECONDS
            while not engine.is_up():
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(max(0, log.seek(0, os.SEEK_END) - 3000))
                    tail = log.read().decode("utf-8", "replace")
                    raise EngineError(f"`mmqwen serve {checkpoint}` did not start:\n{tail}")
                time.sleep(0.3)
            yield engine, process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
