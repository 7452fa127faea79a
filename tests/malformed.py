"""Requests that a server must refuse: some written out, some mutated at random from good ones."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmqwen.client import embeds_part

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
WIDTH = 24
"""Width of m1 in `make_composite`'s default."""

WEIRD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, 10**40, -(10**400), "", "x", "float32", "m1",
    "\x00", "é", "😀" * 40, "A" * 5000, [], [[]], [None], [[[[1]]]], {}, {"data": {}}, {"": ""},
    "../../etc/passwd", "gASVCgAAAAAAAACMBnB3bmVkIZQu", "$(id)", "<|m1|>",
]  # fmt: skip

SHAPES: list[Any] = [
    [], [WIDTH - 1], [WIDTH + 1], [0, WIDTH], [-1, WIDTH], [1, 0], [WIDTH, 1], [1, 1, WIDTH],
    [1, -WIDTH],
    [2**31, WIDTH], [2**40, WIDTH], [2**63, WIDTH], [10**30, WIDTH], [1, 2**62], [-(2**62), -4],
    ["1", WIDTH], [1.0, WIDTH], [True, WIDTH], [1, "24"], [None, WIDTH], [[1], WIDTH], [3, WIDTH],
    [1, WIDTH, 1], [1] * 1000, [65, WIDTH], [10**9, 10**9], {"0": 1, "1": WIDTH}, f"[1, {WIDTH}]",
]  # fmt: skip

OTHER_PARTS: list[Any] = [
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"image_url": "http://127.0.0.1:9/x.png"},
    {
        "type": "text",
        "text": "a",
        "uuid": "u",
        "image_url": "http://127.0.0.1:9/",
        "extra": "<|m1|>",
    },
    {"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/x.mp4"}},
    {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:9/x.wav"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "image_embeds", "image_embeds": "AAAA"},
    {"type": "image_embeds", "image_embeds": {"image_embeds": "AAAA"}},
    {"type": "audio_embeds", "audio_embeds": "AAAA"},
    {"type": "prompt_embeds", "prompt_embeds": "AAAA", "data": "AAAA"},
    {"type": "m3_embeds", "m3_embeds": {"data": "AAAA", "dtype": "float32", "shape": [1, 1]}},
    {"type": "mmqwen_pack_embeds", "mmqwen_pack_embeds": {}},
    {"type": "mmqwen_pack", "mmqwen_pack": [1, 2, 3]},
    {"type": "m1", "m1": [1.0] * WIDTH},
    {"type": "M1_EMBEDS", "M1_EMBEDS": {}},
    {"type": "m1_embeds"},
    {"type": "m1_embeds", "m2_embeds": {}},
    {"type": ["m1_embeds"]},
    {"type": {"a": 1}},
    {},
    [],
    [[]],
    7,
]


@dataclass(frozen=True)
class Bad:
    """A request that must be answered by a 4xx."""

    name: str
    path: str
    body: bytes


def chat(*content: Any, **fields: Any) -> dict[str, Any]:
    """A chat request with one user message of these parts."""
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": list(content)}],
        "max_tokens": 2,
        "temperature": 0,
        **fields,
    }


def text(words: str) -> dict[str, str]:
    """A part of text."""
    return {"type": "text", "text": words}


def good_part(seed: int = 0, rows: int = 2, dtype: str = "float32") -> dict[str, Any]:
    """A good item of m1."""
    values = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
    return embeds_part("m1", values, dtype)


def _with(**fields: Any) -> dict[str, Any]:
    part = copy.deepcopy(good_part())
    part["m1_embeds"].update(fields)
    return part


def _non_finite(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    dtype, bad = rng.choice(
        [
            ("float32", b"\x00\x00\xc0\x7f"), ("float32", b"\x00\x00\x80\xff"),
            ("float16", b"\x00\x7e"), ("float16", b"\x00\x7c"), ("bfloat16", b"\xc0\x7f"),
            ("bfloat16", b"\x80\xff"),
        ]
    )  # fmt: skip
    part = good_part(seed, rng.randint(1, 8), dtype)
    raw = bytearray(base64.b64decode(part["m1_embeds"]["data"]))
    at = rng.randrange(len(raw) // len(bad)) * len(bad)
    raw[at : at + len(bad)] = bad
    part["m1_embeds"]["data"] = base64.b64encode(raw).decode()
    return part


def _broken_base64(seed: int) -> str:
    rng = random.Random(seed)
    data = list(good_part(seed)["m1_embeds"]["data"])
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(4)
        at = rng.randrange(len(data) - 4)
        if kind == 0:
            data[at] = rng.choice("-_ \n\r\t=*\x00\u00e9\u2028\U0001f600")
        elif kind == 1:
            del data[at]
            data.append("!")
        elif kind == 2:
            data.insert(at, rng.choice("AZ\n"))
        else:
            del data[at:]
            data.extend("AAAA=")
    return "".join(data) + "A"  # never the right length, whatever else


def _bodies() -> Iterator[tuple[str, str, Any]]:
    for field in ("data", "dtype", "shape"):
        for value in WEIRD:
            if (field, value) != ("dtype", "float32"):
                yield f"{field} is {value!r:.30}", CHAT, chat(text("hi"), _with(**{field: value}))
    for value in WEIRD:
        yield f"payload is {value!r:.30}", CHAT, chat({"type": "m1_embeds", "m1_embeds": value})
        yield f"content is [{value!r:.30}]", CHAT, chat(value, text("<|m1|>"))
        yield f"extra field {value!r:.30}", CHAT, chat(_with(extra=value))
    for shape in SHAPES:
        yield f"shape {shape!r:.30}", CHAT, chat(_with(shape=shape), text("hi"))
        yield f"shape {shape!r:.30}, no data", CHAT, chat(_with(shape=shape, data=""))
    for part in OTHER_PARTS:
        yield f"part {part!r:.40}", CHAT, chat(part, text("hi <|m1|>"))
        yield f"part {part!r:.40} beside rows", CHAT, chat(good_part(), part, text("<|m2|>"))
    for missing in ("data", "dtype", "shape"):
        part = copy.deepcopy(good_part())
        del part["m1_embeds"][missing]
        yield f"no {missing}", CHAT, chat(part)
    for dtype in (
        "float64", "int8", "uint8", "complex64", "bool", "object", "torch.float32", "<f4",
        "FLOAT32", "float8_e4m3fn", "pickle", "O", "float32 ", "f4",
    ):  # fmt: skip
        yield f"dtype {dtype}", CHAT, chat(_with(dtype=dtype))
    for words in ("<|m1|>", "a <|m2|> b", "<|m1|>" * 200, "\n<|m1|>\n"):
        for stream in (False, True):
            yield "typed marker", CHAT, chat(text(words), stream=stream)
            yield "typed marker beside rows", CHAT, chat(good_part(), text(words), stream=stream)
            body = {"model": "tiny", "prompt": words, "max_tokens": 2, "stream": stream}
            yield "marker in a completion", COMPLETIONS, body
        bare = {"model": "tiny", "messages": [{"role": "user", "content": words}]}
        yield "marker in bare text", CHAT, bare
        yield "marker as a role", CHAT, {"messages": [{"role": words, "content": "hi"}]}
        yield "marker as a name", CHAT, {
            "model": "tiny", "messages": [{"role": words, "content": "hi", "name": words}]
        }  # fmt: skip
    yield "too many rows for the model", CHAT, chat(*(good_part(i, 64) for i in range(9)))
    yield "truncated to nothing", CHAT, chat(good_part(), text("hi"), truncate_prompt_tokens=3)
    yield "processor options", CHAT, chat(good_part(), mm_processor_kwargs={"a": 1})
    for content in (good_part(), 5, True, {"a": 1}, [[]], [5]):
        yield "content", CHAT, {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    for messages in (None, 5, "hi", {}, [], [5], [[]], [{}], [{"content": "hi"}]):
        yield "messages", CHAT, {"model": "tiny", "messages": messages, "n": 0}
    for seed in range(100):
        yield f"not finite {seed}", CHAT, chat(text("hi"), _non_finite(seed), stream=bool(seed % 2))
        yield f"not base64 {seed}", CHAT, chat(_with(data=_broken_base64(seed)), text("hi"))


def malformed() -> list[Bad]:
    """All of them, in a fixed order."""
    found = [
        Bad(name, path, json.dumps(body, allow_nan=True).encode()) for name, path, body in _bodies()
    ]
    good = json.dumps(chat(text("hi"), good_part())).encode()
    rng = random.Random(0)
    for at in range(60):
        cut = good[: rng.randrange(1, len(good) - 1)]
        found.append(Bad(f"cut {at}", CHAT, cut))
        found.append(Bad(f"noise {at}", CHAT, rng.randbytes(rng.randrange(1, 400)) + b"}"))
    found += [
        Bad("empty", CHAT, b""),
        Bad("null", CHAT, b"null"),
        Bad("deep", CHAT, b'{"messages":' + b"[" * 50000 + b"]" * 50000 + b"}"),
        Bad("NaN as data", CHAT, json.dumps(chat(_with(data=float("nan")))).encode()),
        Bad("lone surrogate", CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}]}'),
    ]
    return found
