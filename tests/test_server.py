"""The OpenAI API over real sockets: right answers, and nothing that a client sends harms others."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from conversations import Conversation, rows, still_alive
from engines import TOLERANCE, reference
from malformed import CHAT, COMPLETIONS, chat, good_part, malformed, text
from mmqwen.client import embeds_part
from mmqwen.pipeline import MultimodalQwen3Pipeline
from mmqwen_kernels.native import select_native
from servers import (
    ENGINE_FLAGS,
    ONE_WORKER,
    STOCK,
    TINY_FLAGS,
    Server,
    launch,
    run_batch,
    running,
)
from tiny import make_composite

vllm = pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

CLOSED_BY_VLLM = vllm.__version_tuple__ >= (0, 30)
"""From 0.30 on vLLM itself closes /inference/v1/generate, unless `--enable-scale-out` opens it."""

MEMORY_GROWTH = 48 * 2**20
"""Most bytes by which all processes of the server may grow over the malformed requests, after a
first hundred of them. Seen: 3 MiB over 581 requests."""

ITEM_BYTES = 20_000
REQUEST_BYTES = 40_000
BODY_BYTES = 4 * (REQUEST_BYTES + 2) // 3 + 16 * 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(
        tmp_path_factory.mktemp("server") / "model",
        modalities={"m1": {"dim": 24, "max_rows": 64}, "m2": 40},
    )


@pytest.fixture(scope="module")
def start(checkpoint, tmp_path_factory):
    """Gives the module's server: the one that runs, or a new one after a test has ended it."""
    flags = [
        *TINY_FLAGS, "--max-item-bytes", str(ITEM_BYTES), "--max-request-bytes", str(REQUEST_BYTES),
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--structured-outputs-config", '{"disable_any_whitespace": true, "backend": "xgrammar"}',
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("log")
    started: list[Server] = []

    def current() -> Server:
        if not started or started[-1].process.poll() is not None:
            started.append(launch(checkpoint, folder / f"server{len(started)}.log", flags))
        return started[-1]

    yield current
    for server in started:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture
def server(start):
    return start()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


_alive = pytest.fixture(autouse=True)(still_alive)


# -- conversations and their reference ---------------------------------------------------------


LAYOUTS = {
    "rows, then text": lambda c: c.user(rows("m1", 3), "what is it?"),
    "text, then rows": lambda c: c.user("look:", rows("m1", 1)),
    "rows alone": lambda c: c.user(rows("m1", 2)),
    "several rows alone": lambda c: c.user(rows("m2", 2), rows("m1", 1), rows("m1", 4, seed=3)),
    "between texts": lambda c: c.user(
        "one ", rows("m2", 2), " two ", rows("m1", 1), rows("m2", 1, seed=5), " three"
    ),
    "many items": lambda c: c.user(
        *(rows("m1" if i % 2 else "m2", 1 + i % 3, seed=i) for i in range(40)), "how many?"
    ),
    "many turns": lambda c: (
        c.say("system", "Answer in one word.")
        .user(rows("m1", 2), "what is it?")
        .say("assistant", "a train")
        .user("and ", rows("m2", 3), "?")
        .say("assistant", "the coast")
        .user(rows("m1", 1, seed=9))
    ),
    "rows in every role": lambda c: (
        c.say("system", rows("m1", 1), "a rule")
        .user("hi")
        .say("assistant", rows("m2", 1))
        .user("so?")
    ),
    "longer than a step": lambda c: c.user(*(rows("m1", 60, seed=i) for i in range(6)), "and?"),
    "text alone": lambda c: c.user("just words"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_equal_the_reference(client, checkpoint, layout):
    conversation = LAYOUTS[layout](Conversation())
    conversation.check(client, checkpoint)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_wire_dtype(client, checkpoint, dtype):
    Conversation().user("see", rows("m1", 4), rows("m2", 2), dtype=dtype).check(client, checkpoint)


def test_equals_the_pipeline(client, checkpoint):
    """The same conversation through the offline door, in this process, gives the same text."""
    from mmqwen.pipeline import MultimodalQwen3Pipeline

    conversation = Conversation().user(rows("m1", 3), "what is it?", rows("m2", 2))
    (_, first), (_, second) = rows("m1", 3), rows("m2", 2)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "m1", "m1": first},
                text("what is it?"),
                {"type": "m2", "m2": second},
            ],
        }
    ]
    with MultimodalQwen3Pipeline(checkpoint, engine="transformers", dtype="float32") as pipeline:
        offline = pipeline.chat(messages, max_tokens=5)
    online = conversation.check(client, checkpoint).choices[0]
    # vLLM keeps back a character that the last token leaves unfinished.
    assert online.message.content.rstrip("\ufffd") == offline.rstrip("\ufffd")


# -- what vLLM gives every model ----------------------------------------------------------------


def test_streamed_answers_are_the_same(client, checkpoint):
    conversation = Conversation().user(rows("m1", 3), "go on", rows("m2", 1))
    whole = conversation.check(client, checkpoint, max_tokens=12)
    pieces, usage = [], None
    for chunk in client.chat.completions.create(
        **conversation.request(max_tokens=12, stream=True, stream_options={"include_usage": True})
    ):
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert len(pieces) > 2
    assert "".join(pieces) == whole.choices[0].message.content
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_several_choices_and_log_probabilities(client, checkpoint):
    conversation = Conversation().user(rows("m1", 3), "choose")
    answer = client.chat.completions.create(
        **conversation.request(n=3, temperature=1.0, seed=1, top_logprobs=4)
    )
    assert len(answer.choices) == 3
    assert len({tuple(choice.token_ids) for choice in answer.choices}) > 1
    conversation.compare(answer, checkpoint, greedy=False)
    assert all(len(step.top_logprobs) == 4 for step in answer.choices[0].logprobs.content)


def test_prompt_log_probabilities_at_rows(client, checkpoint):
    """Placeholders are masked, so their log-probability is -inf, which JSON does not have."""
    conversation = Conversation().user("a ", rows("m1", 3), " b")
    conversation.check(client, checkpoint, extra_body={"prompt_logprobs": 1})


def test_choice_and_json_schema(client, checkpoint):
    conversation = Conversation().user(rows("m1", 3), "yes or no?")
    chosen = client.chat.completions.create(
        **conversation.request(
            max_tokens=10, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
        )
    )
    assert chosen.choices[0].message.content in ("yes", "no")
    schema = {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 2, "maxItems": 2}
    written = client.chat.completions.create(
        **conversation.request(
            max_tokens=60,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answers", "schema": schema, "strict": True},
            },
        )
    )
    assert set(json.loads(written.choices[0].message.content)) <= {"yes", "no"}


@pytest.mark.skipif(
    vllm.__version_tuple__ < (0, 31),
    reason="vLLM before 0.31 grants white space without an end inside a tool call, whatever "
    "disable_any_whitespace says, and a model of random weights never leaves it",
)
def test_tool_call(client):
    parameters = {"type": "object", "properties": {"on": {"enum": [1]}}, "required": ["on"]}
    conversation = Conversation().user(rows("m1", 3), "switch it on")
    answer = client.chat.completions.create(
        **conversation.request(
            logprobs=False,
            max_tokens=300,
            tools=[{"type": "function", "function": {"name": "switch", "parameters": parameters}}],
            tool_choice={"type": "function", "function": {"name": "switch"}},
        )
    )
    calls = answer.choices[0].message.tool_calls
    assert calls, answer.choices[0]
    assert calls[0].function.name == "switch"


def test_earlier_turns_stay_cached(client, checkpoint):
    def cached(conversation):
        return conversation.check(client, checkpoint).usage.prompt_tokens_details.cached_tokens

    opening = rows("m1", 50, seed=41)
    first = Conversation().user(opening, "what is it?")
    assert cached(first) == 0
    first.say("assistant", "a train").user("and this?", rows("m2", 20, seed=42))
    assert cached(first) >= 32
    first.say("assistant", "the coast").user("and this?", rows("m1", 3, seed=43))
    assert cached(first) >= 64
    changed = (opening[0], opening[1] + 1e-3)
    other = Conversation().user(changed, "what is it?").say("assistant", "a train").user("and?")
    assert cached(other) == 0


def test_completions_take_text(client, checkpoint):
    answer = client.completions.create(model="tiny", prompt="The morning train", max_tokens=4)
    assert answer.usage.completion_tokens == 4


def test_async_client(server, checkpoint):
    conversation = Conversation().user(rows("m1", 2), "async")

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await client.chat.completions.create(**conversation.request())

    conversation.compare(asyncio.run(ask()), checkpoint)


# -- many clients ------------------------------------------------------------------------------


def test_64_concurrent_clients_of_all_kinds(server, checkpoint):
    """Rows and text, streamed and not, good and bad: each gets its own answer."""

    async def ask(client, index):
        conversation = Conversation().user(
            f"client {index} ",
            *(rows("m1" if (index + i) % 2 else "m2", 1 + i, seed=index) for i in range(index % 4)),
            " says",
        )
        request = conversation.request(max_tokens=3 + index % 5)
        if index % 8 == 7:
            bad = Conversation().user("bad ", rows("m1", 2), "<|m1|>")
            with pytest.raises(openai.BadRequestError, match="placeholder"):
                await client.chat.completions.create(**bad.request())
        if index % 3 == 0:
            del request["logprobs"]
            stream = await client.chat.completions.create(**request, stream=True)
            words = [
                chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices
            ]
            return conversation, "".join(words)
        return conversation, await client.chat.completions.create(**request)

    async def all_of_them():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            answers = await asyncio.gather(*(ask(client, index) for index in range(64)))
            for conversation, answer in answers:
                if isinstance(answer, str):
                    size = 3 + int(conversation.messages[0]["content"][0]["text"].split()[1]) % 5
                    again = await client.chat.completions.create(
                        **conversation.request(max_tokens=size)
                    )
                    conversation.compare(again, checkpoint)
                    assert again.choices[0].message.content == answer
                else:
                    conversation.compare(answer, checkpoint)

    asyncio.run(all_of_them())


def test_clients_that_vanish_free_their_requests(server, client):
    with httpx.Client(base_url=server.url, timeout=30) as web:
        for index in range(24):
            body = chat(good_part(index, 20), text("tell"), max_tokens=300, stream=True)
            body["ignore_eos"] = True
            with web.stream("POST", CHAT, json=body) as response:
                assert response.status_code == 200
                next(response.iter_lines())
        # And some that hang up in the middle of sending.
        for _ in range(8):
            with pytest.raises(httpx.HTTPError):
                web.post(CHAT, content=_broken_off(), headers={"content-type": "application/json"})
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0


def _broken_off():
    yield b'{"model": "tiny", "messages": [{"role": "user", "content": '
    raise httpx.WriteError("gone")


# -- what must be refused -----------------------------------------------------------------------


def refuse(server: Server, body: Any, *words: str, path: str = CHAT, status: int = 400) -> str:
    """Send it, check the refusal, and return its message."""
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == status, answer.text[:300]
    message = answer.json()["error"]["message"]
    for word in words:
        assert word in message, message
    return message


def test_malformed_requests_harm_nobody(server, checkpoint):
    """Each gets a 4xx, memory stays flat, and a client that sends good ones notices nothing."""
    requests = malformed()
    assert len(requests) >= 500
    good = Conversation().user("a good one ", rows("m1", 3))
    failures: list[BaseException] = []
    done = threading.Event()

    def neighbour() -> None:
        own = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        while not done.is_set():
            try:
                good.check(own, checkpoint)
            except BaseException as error:
                failures.append(error)
                return
            time.sleep(0.2)

    thread = threading.Thread(target=neighbour)
    thread.start()
    try:
        wrong, before = [], 0
        with httpx.Client(base_url=server.url, timeout=60) as web:
            for index, bad in enumerate(requests):
                if index == 100:
                    before = server.resident()
                answer = web.post(
                    bad.path, content=bad.body, headers={"content-type": "application/json"}
                )
                if not 400 <= answer.status_code < 500:
                    wrong.append((bad.name, answer.status_code, answer.text[:100]))
                elif len(answer.content) > 20_000:
                    wrong.append((bad.name, "long answer", len(answer.content)))
            grown = server.resident() - before
    finally:
        done.set()
        thread.join()
    print(f"{len(requests)} malformed requests, {grown / 2**20:.1f} MiB grown")
    assert not wrong
    assert not failures
    assert grown < MEMORY_GROWTH


def test_refusals_are_logged_without_the_payload(server):
    secret = base64.b64encode(b"a secret that no log may hold " * 10).decode()
    part = good_part()
    part["m1_embeds"]["data"] = secret
    before = len(server.log.read_bytes())
    refuse(server, chat(part), "characters of data")
    log, end = "", time.monotonic() + 60
    while "Refused" not in log and time.monotonic() < end:
        time.sleep(0.1)
        log = server.log.read_bytes()[before:].decode()
    assert "Refused a request: modality 'm1', item 0: got" in log
    assert secret[:40] not in log


def test_bytes_of_an_item_are_limited(server):
    width = 40
    rows_that_fit = ITEM_BYTES // (4 * width)
    big = np.zeros((rows_that_fit + 1, width), np.float32)
    refuse(server, chat(embeds_part("m2", big)), "m2", "20160 bytes", f"at most {ITEM_BYTES}")


def test_bytes_of_a_request_are_limited(server):
    item = embeds_part("m2", np.zeros((120, 40), np.float32))
    refuse(server, chat(item, item, item), "item 2", "40000 bytes", "those before this one")


def test_body_is_limited(server):
    refuse(server, chat(text("a" * BODY_BYTES)), "body is longer", "--max-request-bytes")


def test_body_without_a_declared_length_is_limited(server):
    def chunks():
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(BODY_BYTES // 2**20 + 1):
            yield b"a" * 2**20
        yield b'"}'

    answer = httpx.post(
        server.url + COMPLETIONS, content=chunks(), headers={"content-type": "application/json"},
        timeout=60,
    )  # fmt: skip
    assert answer.status_code == 400
    assert "body is longer" in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/inference/v1/generate", "/inference/v1/abort_requests", "/v1/chat/completions/render",
        "/v1/completions/render", "/v1/messages/render", "/v1/chat/completions/derender",
        "/v1/completions/derender", "/abort_requests", "/inference/v1/generate/",
        "/inference%2Fv1/generate",
    ],
)  # fmt: skip
def test_token_api_is_closed(server, path):
    refuse(server, {}, "is closed", path=path, status=403)


ROWS = [[1.0] * 24] * 2
MISPLACED: dict[str, Any] = {
    "multi_modal_data": {"m1": [ROWS]},
    "multimodal_data": {"multimodal_embeddings": {"m1": [ROWS]}},
    "multimodal_embeddings": {"m1": [ROWS]},
    "mm_data": {"m1": [ROWS]},
    "embeddings": ROWS,
    "m1_embeds": {"data": "AA==", "dtype": "float32", "shape": [1, 24]},
    "m1": ROWS,
    "mutli_modal_data": {"m1": [ROWS]},
    "mm_processor_kwargs": {"m1": [ROWS]},
}
TEXT_DOORS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hi", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/chat/completions/batch": {
        "messages": [[{"role": "user", "content": "hi"}]], "max_tokens": 2,
    },
    "/tokenize": {"prompt": "hi"},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/invocations": {"prompt": "hi", "max_tokens": 2},
}  # fmt: skip


@pytest.mark.parametrize("path", TEXT_DOORS)
def test_rows_in_fields_that_vllm_skips(server, path):
    """Each was answered as text alone, with a 200."""
    for field, value in MISPLACED.items():
        body = {"model": "tiny", **TEXT_DOORS[path], field: value}
        if field == "mm_processor_kwargs" and path in ("/tokenize", "/v1/messages"):
            continue  # no options reach a prompt there, whatever they hold
        refuse(
            server, body, *([field, "m1_embeds"] if "kwargs" not in field else [field]), path=path
        )
    plain = {"model": "tiny", **TEXT_DOORS[path], "my_own_label": "m1", "user": "somebody"}
    assert httpx.post(server.url + path, json=plain, timeout=60).status_code == 200


def test_rows_beside_the_parts_of_a_message(server):
    for message in (
        {"role": "user", "content": "hi", "multi_modal_data": {"m1": [ROWS]}},
        {"role": "user", "content": "hi", "m1_embeds": good_part()["m1_embeds"]},
        {"role": "user", "content": [{**text("hi"), "m1_embeds": good_part()["m1_embeds"]}]},
    ):
        refuse(server, {"model": "tiny", "messages": [message]}, "would be dropped", "m1_embeds")
    parts = [{**good_part(), "text": "hi"}]
    doors = {"/v1/responses": "input", "/v1/messages": "messages"}
    for path, field in doors.items():
        body = {"model": "tiny", "max_tokens": 2, field: [{"role": "user", "content": parts}]}
        assert httpx.post(server.url + path, json=body, timeout=60).status_code == 400


# -- the cases of facts/serving.md, by name ------------------------------------------------------


@dataclass
class Bomb:
    """Makes a file when it is unpickled."""

    path: str

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickle_over_the_wire(server, tmp_path):
    mark = tmp_path / "pwned"
    bomb = base64.b64encode(pickle.dumps(Bomb(str(mark)))).decode()
    part = good_part()
    part["m1_embeds"]["data"] = bomb
    refuse(server, chat(part), "characters of data")
    for kind in ("prompt_embeds", "image_embeds", "audio_embeds"):
        refuse(server, chat({"type": kind, kind: bomb}, text("hi")), kind)
        refuse(server, chat({"type": kind, kind: bomb, "data": bomb}), kind)
    body = {"model": "tiny", "prompt": "", "prompt_embeds": bomb, "max_tokens": 1}
    refuse(server, body, "enable-prompt-embeds", path=COMPLETIONS)
    assert not mark.exists()


def _torch_saved(tensor: torch.Tensor) -> str:
    import io

    out = io.BytesIO()
    torch.save(tensor, out)
    return base64.b64encode(out.getvalue()).decode()


def test_cve_2025_62164_sparse_tensor_through_torch_load(server):
    """Indices out of bounds in a sparse tensor wrote out of bounds when it was made dense."""
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[2**40]]), torch.tensor([1.0]), (2**41,), check_invariants=False
    )
    data = _torch_saved(sparse)
    part = good_part()
    part["m1_embeds"]["data"] = data
    refuse(server, chat(part), "characters of data")
    body = {"model": "tiny", "prompt": "", "prompt_embeds": data, "max_tokens": 1}
    refuse(server, body, path=COMPLETIONS)


def test_sparse_tensor_that_densifies_to_terabytes(server):
    """1.5 KB on the wire, 4 TiB in memory: the declared size is checked before anything else."""
    before = server.resident()
    for shape in ([2**37, 8], [2**40, 24], [2**62, 24]):
        part = good_part()
        part["m1_embeds"]["shape"] = shape
        refuse(server, chat(part), "m1")
    assert server.resident() - before < 32 * 2**20


def test_cve_2025_62372_right_dimensions_wrong_width(server):
    for name, width in (("m1", 25), ("m1", 40), ("m2", 24), ("m2", 64)):
        part = embeds_part(name, np.ones((2, width), np.float32))
        refuse(server, chat(part, text("hi")), name, f"width {width}")


def test_cve_2025_46722_unframed_hash(client, checkpoint):
    """Rows that are the same bytes in other shapes, orders, dtypes or items never share a cache."""
    values = np.random.default_rng(7).standard_normal((50, 24)).astype(np.float32)
    swapped = values[::-1].copy()
    halves = (("m1", values[:25]), ("m1", values[25:]))
    narrow = values.reshape(30, 40)
    for pieces in (
        [("m1", values)], [("m1", swapped)], list(halves), [*halves[::-1]], [("m2", narrow)],
        [halves[0], " ", halves[1]], [("m1", values), "?"],
    ):  # fmt: skip
        Conversation().user(*pieces, "same bytes").check(client, checkpoint)


def test_cve_2026_44222_placeholder_spelled_in_text(server, checkpoint):
    """In every field of every door that ends up in a prompt."""
    word = "see <|m1|>"
    refuse(server, chat(text(word)), "<|m1|>", "placeholder")
    refuse(server, chat(text(word), good_part()), "<|m1|>", "placeholder")
    refuse(server, {"model": "tiny", "messages": [{"role": "user", "content": word}]}, "<|m1|>")
    refuse(server, {"model": "tiny", "messages": [{"role": word, "content": "hi"}]}, "<|m1|>")
    refuse(server, {"model": "tiny", "prompt": word}, "<|m1|>", path=COMPLETIONS)
    refuse(server, {"model": "tiny", "prompt": ["hi", word]}, "<|m1|>", path=COMPLETIONS)
    token = reference(str(checkpoint)).specs["m1"].token_id
    refuse(server, {"model": "tiny", "prompt": [5, token, 6]}, "<|m1|>", path=COMPLETIONS)
    refuse(server, {"model": "tiny", "prompt": word}, "<|m1|>", path="/tokenize")
    refuse(server, {"model": "tiny", "input": word}, "<|m1|>", path="/v1/responses")
    anthropic = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": word}]}
    refuse(server, anthropic, "<|m1|>", path="/v1/messages")
    refuse(server, chat(text(word)), "<|m1|>", path="/invocations")


def test_placeholder_is_never_sampled(client, checkpoint):
    """Not even where the client allows nothing else."""
    token = reference(str(checkpoint)).specs["m1"].token_id
    for extra in ({"allowed_token_ids": [token]}, {"logit_bias": {str(token): 100}}):
        for temperature in (0, 1):
            request = Conversation().user(rows("m1", 2), "hi").request(extra_body=extra)
            request["temperature"] = temperature
            answer = client.chat.completions.create(**request)
            assert token not in answer.choices[0].token_ids


def test_cve_2026_105754_hash_supplied_by_the_caller(server, client, checkpoint):
    """Two clients that give different rows one `uuid` each get the answer to their own."""
    for seed in (1, 2, 1):
        conversation = Conversation().user(rows("m1", 40, seed=seed), "mine?")
        for part in conversation.messages[0]["content"]:
            part["uuid"] = "the same"
        extra = {"multi_modal_uuids": {"m1": ["the same"], "mmqwen_pack": ["the same"]}}
        conversation.check(client, checkpoint, extra_body=extra)


def test_nan_rows_are_not_cached_for_others(server, client, checkpoint):
    name, values = rows("m1", 40, seed=77)
    bad = values.copy()
    bad[39, 3] = np.nan
    raw = {"data": base64.b64encode(bad.tobytes()).decode(), "dtype": "float32", "shape": [40, 24]}
    part = {"type": "m1_embeds", "m1_embeds": raw}
    refuse(server, chat(part, text("what?")), "m1", "NaN")
    Conversation().user((name, values), "what?").check(client, checkpoint)


def test_media_are_neither_fetched_nor_decoded(server):
    """No such model takes them; vLLM would fetch a URL before it noticed."""
    hits = []

    async def serve_and_ask():
        async def hit(reader, writer):
            hits.append(await reader.read(100))
            writer.close()

        listener = await asyncio.start_server(hit, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/x"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"image_url": url},
            {"type": "text", "text": "hi", "uuid": "u", "image_url": url},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "audio_url", "audio_url": {"url": url}},
        ]
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as web, listener:
            return [(await web.post(CHAT, json=chat(part))).status_code for part in parts]

    statuses = asyncio.run(serve_and_ask())
    assert statuses == [400, 400, 200, 400, 400]  # the third is text with fields that are dropped
    assert not hits


# -- what an operator sees -----------------------------------------------------------------------


def test_metrics_count(server, client, checkpoint):
    names = (
        "mmqwen_requests_total", 'mmqwen_items_total{modality="m1"}',
        'mmqwen_rows_total{modality="m1"}', 'mmqwen_bytes_total{modality="m1"}',
        'mmqwen_items_total{modality="m2"}', 'mmqwen_refusals_total{reason="width"}',
        'mmqwen_refusals_total{reason="typed_marker"}',
        'mmqwen_refusals_total{reason="closed_endpoint"}', "vllm:request_success_total",
    )  # fmt: skip
    before = [server.metric(name) for name in names]
    Conversation().user(rows("m1", 3), rows("m1", 2), dtype="float16").check(client, checkpoint)
    Conversation().user(rows("m2", 1), "one").check(client, checkpoint)
    Conversation().user("text alone").check(client, checkpoint)
    refuse(server, chat(embeds_part("m1", np.ones((2, 7), np.float32))), "width")
    refuse(server, chat(text("<|m1|>")))
    refuse(server, {}, path="/inference/v1/generate", status=403)
    counted = [server.metric(name) - was for name, was in zip(names, before, strict=True)]
    assert counted == [2, 2, 5, 5 * 24 * 2, 1, 1, 1, 1, 3]
    assert server.metric("mmqwen_native_helper") == int(select_native().in_use)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *([(["--enable-scale-out"], "--allow-token-api")] if CLOSED_BY_VLLM else []),
        (["--tokens-only"], "--allow-token-api"),
        (["--grpc"], "--allow-token-api"),
        (["--tokenizer-mode", "mistral"], "bypasses the renderer"),
    ],
)
def test_flags_that_open_doors_are_refused(monkeypatch, capsys, flags, words):
    from mmqwen.serve import main

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    assert main(["checkpoint", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_plugin_that_vllm_would_not_load_is_noticed(monkeypatch, capsys):
    from mmqwen.serve import main

    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert main(["checkpoint"]) == 2
    assert "leaves the plugin out" in capsys.readouterr().err


def test_a_start_without_a_checkpoint(monkeypatch, capsys):
    from mmqwen.serve import main

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    for argv in ([], ["--port", "8123"]):
        assert main(argv) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("mmqwen serve: no checkpoint is named; `mmqwen serve CHECKPOINT`")


def test_a_start_with_a_plain_model(monkeypatch, capsys, checkpoint, tmp_path):
    from mmqwen.serve import main

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    base = checkpoint.with_name("model-base")
    for argv in ([str(base)], ["--model", str(base)]):
        assert main(argv) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert "Qwen3ForCausalLM" in message
        assert f"mmqwen build --base {base}" in message
        assert len(message) < 500
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err.strip().splitlines()[-1]


def test_checkpoints_and_overrides_are_let_through(checkpoint):
    from argparse import Namespace

    from mmqwen.serve import check_model

    def flags(model, **overrides):
        return Namespace(model_tag=None, model=str(model), hf_overrides=overrides, revision=None)

    check_model(flags(checkpoint), "default")
    ours = {"architectures": ["MultimodalQwen3ForConditionalGeneration"]}
    check_model(flags(checkpoint.with_name("model-base"), **ours), "default")


# -- life and death -----------------------------------------------------------------------------


def test_stock_server_takes_embeddings(checkpoint, tmp_path):
    """vLLM's own command without any flag of ours."""
    with running(checkpoint, tmp_path / "stock.log", program=STOCK, env=ONE_WORKER) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        LAYOUTS["many turns"](Conversation()).check(client, checkpoint)
        refuse(server, chat(text("<|m1|>")), "placeholder")
        for path in (CHAT, COMPLETIONS):
            body = {
                "model": str(checkpoint),
                **TEXT_DOORS[path],
                "multi_modal_data": {"m1": [ROWS]},
            }
            refuse(server, body, "multi_modal_data", "m1_embeds", path=path)
        assert server.metric('mmqwen_refusals_total{reason="misplaced"}') == 2
        assert server.metric("mmqwen_requests_total") == 1
        answer = httpx.post(f"{server.url}/inference/v1/generate", json={}, timeout=60)
        # 400: open, and the body is not what it takes; 404: not opened by this command.
        assert answer.status_code in ((403, 404) if CLOSED_BY_VLLM else (400, 404)), answer.text
        assert server.stop() == 0


def test_rows_in_fields_of_a_batch(checkpoint, tmp_path):
    """`vllm run-batch` hands lines to their handlers past every route, and so past the door."""
    body = {"model": str(checkpoint), **TEXT_DOORS[CHAT]}
    line = {"method": "POST", "url": CHAT, "body": body}
    parts = {"messages": [{"role": "user", "content": [good_part(), text("?")]}]}
    served = {"text": line, "parts": {**line, "body": {**body, **parts}}}
    refused = {f: {**line, "body": {**body, f: value}} for f, value in MISPLACED.items()}
    refused["mm_data beside the body"] = {**line, "mm_data": {"m1": [ROWS]}}
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    lines = {**served, **refused}.items()
    asked.write_text("".join(json.dumps({"custom_id": k, **v}) + "\n" for k, v in lines))
    run_batch(["--model", str(checkpoint), "-i", str(asked), "-o", str(answered), *ENGINE_FLAGS])
    found = {entry["custom_id"]: entry for entry in map(json.loads, answered.open())}
    for name in served:
        assert found[name]["response"]["body"]["choices"], found[name]
    for name in refused:
        assert found[name]["response"]["status_code"] == 400, found[name]
        assert name.split()[0] in json.dumps(found[name]["error"])


@pytest.mark.parametrize("begun", ["not begun", "stream", "json"])
def test_answers_that_hang_at_the_shutdown_are_ended(begun):
    """vLLM's engine sometimes goes before its last outputs are sent, and sometimes after."""
    from mmqwen.vllm_plugin.gate import CleanExit

    class State:
        server = type("Server", (), {"should_exit": False})()

    app_object = type("App", (), {"state": State()})()
    kind = b"text/event-stream" if begun == "stream" else b"application/json"
    sent: list[dict[str, Any]] = []

    async def hangs(scope, receive, send):
        if begun != "not begun":
            headers = [(b"content-type", kind)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async def main():
        scope = {"type": "http", "app": app_object, "path": "/"}
        asked = asyncio.create_task(CleanExit(hangs)(scope, None, send))
        await asyncio.sleep(0.1)
        State.server.should_exit = True
        await asyncio.wait_for(asked, 10)

    asyncio.run(main())
    body = sent[-1]["body"]
    assert not sent[-1].get("more_body")
    if begun == "not begun":
        assert sent[0]["status"] == 503
    assert (b"shutting down" in body) == (begun != "json")
    assert body.endswith(b"data: [DONE]\n\n") == (begun == "stream")


def test_given_answers_are_scored_as_the_page_says(client, checkpoint):
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- test: http -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "evaluation.md", "exec"), names)
    asked = Conversation().user(rows("m1", 3), "or", rows("m2", 2), "the train?")
    answers = ["a river", "no", "Answer in one word"]
    found = names["score"](client, "tiny", asked.messages, answers)
    with MultimodalQwen3Pipeline(checkpoint, engine="transformers", dtype="float32") as pipeline:
        items = asked.items
        parts: list[dict[str, Any]] = [{"type": "m1", "m1": items["m1"][0]}, text("or")]
        parts += [{"type": "m2", "m2": items["m2"][0]}, text("the train?")]
        prompt = {"messages": [{"role": "user", "content": parts}]}
        wanted = [score.logprob for score in pipeline.score(prompt, answers)]
    assert found == pytest.approx(wanted, abs=20 * TOLERANCE)


def test_sigterm_under_load(start):
    """It ends in time, and each answer is whole, ended with an error, or refused."""
    server = start()
    ends: list[str] = []

    def ask(index: int) -> None:
        streamed = index % 2 == 0
        body = chat(good_part(index, 8), text("tell"), max_tokens=450, stream=streamed)
        body["ignore_eos"] = True
        end = "not taken"  # the connection was closed before the server answered at all
        try:
            with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as response:
                end = "cut off"
                lines = [line for line in response.iter_lines() if line]
            end = f"status {response.status_code}"
            if response.status_code == 200 and streamed and lines[-1] == "data: [DONE]":
                end = "error" if "shutting down" in lines[-2] else "whole"
        except httpx.HTTPError:
            pass
        ends.append(end)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") < 8 and time.monotonic() < end:
        time.sleep(0.05)
    status = server.stop()  # raises where that takes longer than an orchestrator would wait
    for thread in threads:
        thread.join(60)
    print(f"SIGTERM: exit status {status}, answers {sorted(ends)}")
    assert status == 0
    assert len(ends) == 16
    # 500: vLLM's own answer to a request that reaches it while its engine stops.
    stopped = {"status 503", "status 500", "not taken"}
    assert set(ends) <= {"whole", "error", "status 200", *stopped}
