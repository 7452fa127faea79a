"""Banks listed and changed over HTTP: who may, by which files, and what requests meet meanwhile."""

from __future__ import annotations

import asyncio
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import httpx
import pytest

from bank_versions import is_answer, table, write
from mmqwen.banks import open_bank
from mmqwen.transport import encode_rows
from servers import TINY_FLAGS, running
from tiny import make_composite

pytest.importorskip("vllm")

KEY = "a key of the server"
HEADERS = {"Authorization": f"Bearer {KEY}"}
VERSIONS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bank-server")


@pytest.fixture(scope="module")
def files(folder):
    (folder / "new").mkdir()
    first = write(folder, "first", table(0))
    return [first, *(write(folder / "new", f"v{at}", table(at)) for at in range(1, VERSIONS))]


@pytest.fixture(scope="module")
def checkpoint(folder):
    return make_composite(folder / "model")


@pytest.fixture(scope="module")
def server(checkpoint, folder, files):
    flags = [
        *TINY_FLAGS, "--bank", f"items={files[0]}", "--bank-updates", str(folder / "new"),
        "--api-key", KEY, "--row-references",
        # Several steps for a request, so that updates come between them.
        "--max-num-batched-tokens", "64", "--max-num-seqs", "8",
    ]  # fmt: skip
    with running(checkpoint, folder / "server.log", flags) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=120, headers=HEADERS) as found:
        yield found


def body(part: Any, **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "see"}, {"type": "m1_embeds", "m1_embeds": part}]
    return {
        "model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1,
        "temperature": 0, "logprobs": True, "top_logprobs": 8, **fields,
    }  # fmt: skip


def first_of(answer: httpx.Response) -> dict[Any, float]:
    assert answer.status_code == 200, answer.text
    first = answer.json()["choices"][0]["logprobs"]["content"][0]
    return {entry["token"]: entry["logprob"] for entry in first["top_logprobs"]}


def ask(client: httpx.Client, part: Any, **fields: Any) -> dict[Any, float]:
    return first_of(client.post("/v1/chat/completions", json=body(part, **fields)))


def named(ids: list[int]) -> dict[str, Any]:
    return {"bank": "items", "ids": ids}


def sent(version: int, ids: list[int]) -> Any:
    return encode_rows(table(version)[ids])


def update(client: httpx.Client, file: Any, name: str = "items") -> httpx.Response:
    return client.post(f"/v1/banks/{name}", json={"file": file})


def assert_unchanged(client: httpx.Client, before: Any) -> None:
    """What is shown is what it was. (Versions that were replaced before may go meanwhile.)"""
    now = client.get("/v1/banks").json()
    assert now["replaced_in_use"] <= before["replaced_in_use"]
    assert now | {"replaced_in_use": 0} == before | {"replaced_in_use": 0}


def test_a_bank_is_changed_and_shown(client, server, files):
    before = client.get("/v1/banks").json()["data"]
    version = open_bank(files[0]).version
    assert before == [
        {
            "id": "items", "object": "bank", "version": version, "modality": "m1",
            "placement": "device", "rows": 50, "width": 24,
        }
    ]  # fmt: skip
    assert is_answer(ask(client, named([4, 5])), ask(client, sent(0, [4, 5])))
    done = update(client, "v1.bank")
    assert done.status_code == 200, done.text
    new = open_bank(files[1]).version
    fields = done.json()
    assert fields.pop("seconds") >= 0
    assert fields == {
        "object": "bank.update", "bank": "items", "old": version, "new": new, "rows": 50,
    }  # fmt: skip
    assert client.get("/v1/banks").json()["data"][0]["version"] == new
    answer = ask(client, named([4, 5]))
    assert is_answer(answer, ask(client, sent(1, [4, 5])))
    assert not is_answer(answer, ask(client, sent(0, [4, 5])))
    # Nobody names the old version any more.
    end = time.monotonic() + 30
    while client.get("/v1/banks").json()["replaced_in_use"] and time.monotonic() < end:
        time.sleep(0.2)
    assert client.get("/v1/banks").json()["replaced_in_use"] == 0
    assert server.metric('mmqwen_bank_updates_total{result="done"}') >= 1
    log = server.log.read_text()
    assert f"Bank 'items': version {version[:16]} -> {new[:16]}, 50 rows" in log


@pytest.mark.parametrize("key", [None, "wrong", KEY[:-1]])
def test_without_the_key_nothing_is_shown_or_changed(server, client, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    before = client.get("/v1/banks").json()
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as other:
        assert other.get("/v1/banks").status_code == 401
        assert update(other, "v2.bank").status_code == 401
    assert_unchanged(client, before)


def test_files_of_the_folder_alone_are_served(client, folder, files):
    outside, new = Path(files[0]), folder / "new"
    (new / "link.bank").symlink_to(outside)
    (new / "up").symlink_to(folder)
    beside = Path(write(new, "beside", table(9)))
    Path(f"{beside}.keys").unlink()
    Path(f"{beside}.keys").symlink_to("/etc/hosts")
    os.mkfifo(new / "pipe.bank")
    before = client.get("/v1/banks").json()
    for file in ("../first.bank", str(outside), "link.bank", "up/first.bank", "beside.bank",
                 "/etc/passwd", "/no/such/file", "../none"):  # fmt: skip
        answer = update(client, file)
        assert answer.status_code == 403, (file, answer.text)
        assert "outside the folder" in answer.json()["error"]["message"]
    for file in ("none.bank", "", ".", "pipe.bank", "a\0b", 3, None, ["v1.bank"], "x" * 5000):
        answer = update(client, file)
        assert answer.status_code == 400, (file, answer.text)
    for content in ("{", "[]", "3", '{"file": "v1.bank", "more": 1}', "[" * 100_000):
        answer = client.post("/v1/banks/items", content=content)
        assert answer.status_code == 400, (content[:20], answer.text)
    assert_unchanged(client, before)
    assert update(client, str(new / "v1.bank")).status_code == 200


def test_a_wrong_bank_or_file_is_named_and_nothing_changes(client, folder):
    answer = update(client, "v1.bank", name="itmes")
    assert answer.status_code == 404
    assert "unknown bank 'itmes', expected one of ['items']" in answer.text
    before = client.get("/v1/banks").json()["data"]
    write(folder / "new", "narrow", table(5, width=23))
    write(folder / "new", "scenes", table(5, width=40), modality="m2")
    (folder / "new" / "torn.bank").write_bytes(b"\x10" + bytes(40))
    for file, words in (
        ("narrow.bank", "rows are 23 wide, expected 24"),
        ("scenes.bank", "'m2'"),
        ("torn.bank", "expected a whole safetensors file"),
    ):
        answer = update(client, file)
        assert answer.status_code == 400
        assert words in answer.text
    assert client.get("/v1/banks").json()["data"] == before


def test_rows_given_by_reference_are_asked_for_again(client):
    """A token stands for rows of the version that was replaced, the client's part for current."""
    update(client, "v1.bank")
    first = client.post("/v1/chat/completions", json=body(named([6, 7])))
    issued = dict(pair.split("=") for pair in first.headers["mmqwen-references"].split(","))
    token = issued["0"]
    by_token = body(None)
    by_token["messages"][0]["content"].append({"type": "rows_reference", "rows_reference": token})
    assert is_answer(first_of(client.post("/v1/chat/completions", json=by_token)), first_of(first))
    update(client, "v2.bank")
    end = time.monotonic() + 30
    while client.get("/v1/banks").json()["replaced_in_use"] and time.monotonic() < end:
        time.sleep(0.2)
    missing = client.post("/v1/chat/completions", json=by_token)
    assert missing.status_code == 409
    assert missing.json()["error"]["missing"] == [token]
    again = ask(client, named([6, 7]))
    assert is_answer(again, ask(client, sent(2, [6, 7])))


def test_no_answer_under_load_is_of_a_version_that_was_not_there(client, server):
    """Each answer is that of a version which was current between its request and its answer."""
    update(client, "v1.bank")
    cases = [list(range(first, first + count)) for first in (0, 10, 20) for count in (1, 20)]
    cases.append([at % 50 for at in range(150)])
    expected = {
        (version, at): ask(client, sent(version, ids))
        for version in (1, 2)
        for at, ids in enumerate(cases)
    }
    for at in range(len(cases)):
        assert not is_answer(expected[1, at], expected[2, at])
    order: list[int] = [1]  # the versions, in the order in which they became current

    async def run() -> tuple[int, int]:
        wrong = done = 0
        async with httpx.AsyncClient(base_url=server.url, timeout=120, headers=HEADERS) as own:

            async def request(number: int) -> None:
                nonlocal wrong, done
                at = number % len(cases)
                since = len(order) - 1
                fields = body(named(cases[at]), max_tokens=1 + number % 3 * 4)
                got = first_of(await own.post("/v1/chat/completions", json=fields))
                # An update answers a moment after it is done, so one more may be current.
                seen = {*order[since:], *pending}
                wrong += not any(is_answer(got, expected[version, at]) for version in seen)
                done += 1

            async def worker(first: int) -> None:
                for number in range(first, 240, 8):
                    await request(number)

            async def change() -> None:
                while not all(task.done() for task in tasks):
                    version = 3 - order[-1]
                    pending.append(version)
                    answer = await own.post("/v1/banks/items", json={"file": f"v{version}.bank"})
                    assert answer.status_code == 200, answer.text
                    order.append(version)
                    pending.clear()
                    await asyncio.sleep(0.05)

            pending: list[int] = []
            tasks = [asyncio.create_task(worker(first)) for first in range(8)]
            changes = asyncio.create_task(change())
            await asyncio.gather(*tasks)
            await changes
            return wrong, done

    assert asyncio.run(run()) == (0, 240)
    assert len(order) > 3


def test_two_updates_at_a_time_are_one_too_many(client, server, folder, files):
    """Large enough to be read for a while; its facts are not beside it yet."""
    large = Path(write(folder / "new", "large", table(3, rows=400_000)))
    Path(f"{large}.json").unlink()

    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, headers=HEADERS) as own:
            return await asyncio.gather(
                *(own.post("/v1/banks/items", json={"file": "large.bank"}) for _ in range(2))
            )

    answers = asyncio.run(both())
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    (busy,) = (answer for answer in answers if answer.status_code == 409)
    assert "an update of a bank is running" in busy.text
    assert ask(client, named([399_999]))


# -- flags ---------------------------------------------------------------------------------------


def flags(folder: Path, **fields: Any) -> Namespace:
    given = {"bank_updates": str(folder), "api_key": [KEY], "data_parallel_size": 1, **fields}
    return Namespace(**given)


def test_the_flag_is_refused_where_updates_would_be_open_or_unheard(folder, files, monkeypatch):
    from mmqwen.serve import ServeError, _allow_bank_updates
    from mmqwen.vllm_plugin.limits import BANK_FOLDER_VARIABLE, bank_folder

    monkeypatch.setenv(BANK_FOLDER_VARIABLE, "")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for wrong, words in (
        (flags(folder, api_key=None), "without an API key"),
        (flags(folder, api_key=[""]), "without an API key"),
        (flags(folder / "none"), "is no folder"),
        (flags(Path(files[0])), "is no folder"),
        (Namespace(**{**vars(flags(folder)), "bank_updates": ""}), "without a folder"),
        (flags(folder, api_server_count=2), "with 2 API servers"),
        (flags(folder, data_parallel_size=4), "with 4 API servers.*--api-server-count 1"),
    ):
        with pytest.raises(ServeError, match=words):
            _allow_bank_updates(wrong)
    _allow_bank_updates(flags(folder, data_parallel_size=4, api_server_count=1))
    assert bank_folder() == folder.resolve()
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    _allow_bank_updates(flags(folder, api_key=None))
    _allow_bank_updates(flags(folder, bank_updates=None))
    assert bank_folder() is None


def test_the_stock_server_does_not_start_open_either(checkpoint, folder, files):
    """The variable without a key; by `vllm serve`, which looks at none of our flags."""
    from fastapi import FastAPI

    from mmqwen.vllm_plugin.bank_routes import attach
    from mmqwen.vllm_plugin.limits import BANK_FOLDER_VARIABLE

    class Client:
        renderer = Namespace(bank_updates=object())

    app = FastAPI()
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("VLLM_API_KEY", raising=False)
        patched.setenv(BANK_FOLDER_VARIABLE, str(folder))
        with pytest.raises(ValueError, match="without an API key"):
            attach(app, Client, Namespace(api_key=None))
        with pytest.raises(ValueError, match="reads no rows"):
            attach(app, Namespace(renderer=Namespace(bank_updates=None)), Namespace(api_key=[KEY]))
        before = len(app.routes)
        patched.delenv(BANK_FOLDER_VARIABLE)
        attach(app, Client, Namespace(api_key=[KEY]))
        assert len(app.routes) == before


def test_front_ends_and_engines_that_would_not_hear_of_it(monkeypatch, folder):
    from mmqwen.vllm_plugin.engine_config import refuse_bank_updates
    from mmqwen.vllm_plugin.limits import BANK_FOLDER_VARIABLE

    def config(**fields: Any) -> Namespace:
        return Namespace(parallel_config=Namespace(**fields))

    refuse_bank_updates(config(_api_process_count=2))
    monkeypatch.setenv(BANK_FOLDER_VARIABLE, str(folder))
    refuse_bank_updates(config(_api_process_count=1))
    with pytest.raises(ValueError, match="with 2 API servers"):
        refuse_bank_updates(config(_api_process_count=2))
    with pytest.raises(ValueError, match="enable_elastic_ep"):
        refuse_bank_updates(config(enable_elastic_ep=True))
