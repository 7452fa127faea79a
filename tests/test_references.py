"""Tokens that stand for rows: who can make one, what they say, and clients that use them."""

from __future__ import annotations

import asyncio
import base64
import copy
from types import SimpleNamespace

import numpy as np
import pytest

from mmqwen.client import RowsChat, embeds_part
from mmqwen.messages import MessageError, read_messages
from mmqwen.modalities import ModalityError, ModalitySpec
from mmqwen.references import (
    KEY_FILE_VARIABLE,
    KEY_VARIABLE,
    MAX_TOKEN,
    PackName,
    Signer,
    TokenBook,
    read_secret,
)

SPECS = {"m1": ModalitySpec("m1", 8), "m2": ModalitySpec("m2", 4)}
SECRET = b"a secret of enough bytes"
PACKS = (
    PackName("ab" * 32, ((0, 3), (1, 1), (1, 1), (0, 200))),
    PackName("01" * 32, tuple((1, 1) for _ in range(128))),
)


# -- tokens ------------------------------------------------------------------------------------


def test_a_token_says_what_was_signed():
    signer = Signer(SPECS, SECRET)
    token = signer.sign("a tenant", PACKS)
    assert signer.read(token, "a tenant") == PACKS
    assert Signer(SPECS, SECRET).read(token, "a tenant") == PACKS  # another server, the same key
    assert len(token) < 200  # 128 items alike are one run


def test_the_longest_layout_fits():
    items = tuple((at % 2, 1000 + at) for at in range(1024))
    signer = Signer(SPECS)
    token = signer.sign(None, [PackName("ab" * 64, items)])
    assert len(token) <= MAX_TOKEN
    assert signer.read(token, None) == (PackName("ab" * 64, items),)


@pytest.mark.parametrize("tenant", [None, "", "b", "a tenan", "a tenant ", "A tenant", "\ud800"])
def test_a_token_is_good_for_its_tenant_alone(tenant):
    signer = Signer(SPECS, SECRET)
    assert signer.read(signer.sign("a tenant", PACKS), tenant) is None
    assert signer.read(signer.sign(tenant, PACKS), "a tenant") is None
    assert signer.read(signer.sign(tenant, PACKS), tenant) == PACKS


def test_no_salt_and_an_empty_one_are_the_same_tenant():
    """vLLM takes no empty salt, and keys its prefix cache by none where there is none."""
    signer = Signer(SPECS, SECRET)
    assert signer.read(signer.sign(None, PACKS), "") == PACKS


@pytest.mark.parametrize(
    "other",
    [
        Signer(SPECS, b"another secret of 16 bytes"),
        Signer(SPECS),
        Signer({"m2": SPECS["m2"], "m1": SPECS["m1"]}, SECRET),
        Signer({**SPECS, "m2": ModalitySpec("m2", 5)}, SECRET),
    ],
    ids=["key", "random key", "order of modalities", "width"],
)
def test_another_servers_tokens_say_nothing(other):
    assert other.read(Signer(SPECS, SECRET).sign(None, PACKS), None) is None


def test_random_keys_differ():
    assert Signer(SPECS).read(Signer(SPECS).sign(None, PACKS), None) is None


def test_no_changed_token_is_read():
    """Every byte changed, every length but its own, and what is no token at all."""
    signer = Signer(SPECS, SECRET)
    token = signer.sign(None, PACKS)
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1 + at % 255
        forged = base64.urlsafe_b64encode(changed).rstrip(b"=").decode()
        assert signer.read(forged, None) is None, at
    for length in range(len(token)):
        assert signer.read(token[:length], None) is None, length
    for text in (token + "A", token + "AAAA", "", "=", "====", "\0", "é" * 40, "a" * MAX_TOKEN):
        assert signer.read(text, None) is None, text[:10]


def test_a_bare_hash_names_nothing():
    assert Signer(SPECS, SECRET).read(PACKS[0].digest, None) is None


def test_keys_from_outside(monkeypatch, tmp_path):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.delenv(KEY_FILE_VARIABLE, raising=False)
    assert read_secret() is None
    file = tmp_path / "key"
    file.write_bytes(SECRET + b"\n")
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(file))
    assert read_secret() == SECRET
    monkeypatch.setenv(KEY_VARIABLE, SECRET.decode())
    with pytest.raises(ValueError, match="both set"):
        read_secret()
    monkeypatch.delenv(KEY_FILE_VARIABLE)
    assert read_secret() == SECRET
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(ValueError, match="has 5 bytes, expected 16"):
        read_secret()
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_secret()


def test_a_book_keeps_what_was_used_last():
    book = TokenBook(limit=2)
    book.learn(b"1", "one")
    book.learn(b"2", "two")
    assert book.find(b"1") == "one"
    book.learn(b"3", "three")
    assert book.find(b"2") is None
    book.forget(["one", "unknown"])
    assert book.find(b"1") is None
    assert book.find(b"3") == "three"
    book.learn(None, "nothing")
    assert book.find(None) is None


# -- messages ----------------------------------------------------------------------------------


def named(token="T", *parts):
    content = [{"type": "rows_reference", "rows_reference": token}, *parts]
    return [{"role": "user", "content": content}]


PLACE = {"type": "m1_embeds", "m1_embeds": None}


def test_a_message_by_reference_has_places_alone():
    messages = [
        {"role": "user", "content": "hi"},
        *named("T", PLACE, {"type": "text", "text": "x"}, {"type": "m2_embeds"}),
    ]
    plain, items = read_messages(messages, SPECS, references=True)
    assert plain[1]["content"] == "<|m1|>x<|m2|>"
    assert items == {"m1": [None], "m2": [None]}
    (turn,) = items.turns
    assert (turn.message, turn.names, turn.token) == (1, ["m1", "m2"], "T")


ROWS = embeds_part("m1", np.ones((2, 8), np.float32))

WRONG_MESSAGES = {
    "rows beside the token": named("T", ROWS),
    "rows and places": named("T", PLACE, ROWS),
    "two tokens": named("T", {"type": "rows_reference", "rows_reference": "U"}, PLACE),
    "no token": named(None, PLACE),
    "a number": named(1, PLACE),
    "a list": named(["T"], PLACE),
    "bytes": named(b"T", PLACE),
    "an empty token": named("", PLACE),
    "too long": named("T" * (MAX_TOKEN + 1), PLACE),
    "no places": named("T"),
    "text alone": named("T", {"type": "text", "text": "x"}),
    "rows in the token's part": [
        {
            "role": "user",
            "content": [
                {"type": "rows_reference", "rows_reference": "T", "m1_embeds": ROWS["m1_embeds"]},
                PLACE,
            ],
        }
    ],
    "rows in a place's part": named("T", {**PLACE, "m2_embeds": ROWS["m1_embeds"]}),
}


@pytest.mark.parametrize("messages", WRONG_MESSAGES.values(), ids=WRONG_MESSAGES)
def test_tokens_are_strings_and_alone(messages):
    with pytest.raises(MessageError):
        read_messages(messages, SPECS, references=True)


def test_where_no_references_are_served_a_token_is_refused():
    with pytest.raises(MessageError, match="rows_reference"):
        read_messages(named("T", PLACE), SPECS)


def test_a_place_without_a_token_is_refused():
    from mmqwen.transport import EmbeddingError

    with pytest.raises(EmbeddingError):
        read_messages([{"role": "user", "content": [PLACE]}], SPECS, references=True)


def test_no_modality_is_named_like_the_part():
    with pytest.raises(ModalityError, match="reserved"):
        ModalitySpec("rows_reference", 8)


# -- the client --------------------------------------------------------------------------------


class Refused(Exception):
    def __init__(self, status_code, body=None):
        super().__init__(status_code)
        self.status_code, self.body = status_code, body


class FakeServer:
    """Names each message by its position and a number, and notes what it was sent."""

    def __init__(self, names=True):
        self.sent = []
        self.names = names
        self.gone = ()
        self.count = 0
        self.chat = SimpleNamespace(
            completions=SimpleNamespace(with_raw_response=SimpleNamespace(create=self.create))
        )

    def create(self, *, messages, **fields):
        self.sent.append((copy.deepcopy(messages), fields))
        found = {at: tokens_of(message) for at, message in enumerate(messages)}
        used = [token for tokens in found.values() for token in tokens]
        if used and not self.names:
            raise Refused(400)
        missing = [token for token in used if token in self.gone]
        if missing:
            raise Refused(409, {"missing": missing})
        issued = []
        for at, message in enumerate(messages):
            if not found[at] and not isinstance(message["content"], str):
                self.count += 1
                issued.append(f"{at}=T{self.count}")
        headers = {"mmqwen-references": ",".join(issued)} if issued and self.names else {}
        return SimpleNamespace(headers=headers, parse=lambda: f"answer {len(self.sent)}")


def tokens_of(message):
    content = message["content"]
    return (
        []
        if isinstance(content, str)
        else [part["rows_reference"] for part in content if part["type"] == "rows_reference"]
    )


def question(seed):
    values = np.random.default_rng(seed).standard_normal((2, 8)).astype(np.float32)
    return {"role": "user", "content": [embeds_part("m1", values), {"type": "text", "text": "?"}]}


TALK = [question(0), {"role": "assistant", "content": "a train"}, question(1)]


def used(server, at=-1):
    return [tokens_of(message) for message in server.sent[at][0]]


def test_the_client_names_rows_that_were_sent():
    server = FakeServer()
    chat = RowsChat(server)
    messages = copy.deepcopy(TALK)
    assert chat.create(messages=messages[:1], model="m") == "answer 1"
    assert used(server) == [[]]
    assert chat.create(messages=messages, model="m") == "answer 2"
    assert used(server) == [["T1"], [], []]
    assert server.sent[-1][1] == {"model": "m"}
    places = [part for part in server.sent[-1][0][0]["content"] if part["type"] == "m1_embeds"]
    assert places == [{"type": "m1_embeds", "m1_embeds": None}]
    assert messages == TALK  # what the user gave is left as it was
    # Known by its rows, not by the object: equal rows elsewhere are named, others are not.
    chat.create(messages=[question(2), question(0)], model="m")
    assert used(server) == [[], ["T1"]]


def test_the_client_sends_rows_again_where_they_are_missing():
    server = FakeServer()
    chat = RowsChat(server)
    chat.create(messages=TALK, model="m")
    server.gone = ("T2",)
    assert chat.create(messages=TALK, model="m") == "answer 3"
    assert used(server, 1) == [["T1"], [], ["T2"]]
    assert used(server, 2) == [[], [], []]
    chat.create(messages=TALK, model="m")
    assert used(server) == [["T3"], [], ["T4"]]


def test_another_tenants_rows_are_not_named():
    server = FakeServer()
    chat = RowsChat(server)
    chat.create(messages=TALK, model="m", extra_body={"cache_salt": "a"})
    chat.create(messages=TALK, model="m", extra_body={"cache_salt": "b"})
    assert used(server) == [[], [], []]
    chat.create(messages=TALK, model="m", extra_body={"cache_salt": "a"})
    assert used(server) == [["T1"], [], ["T2"]]


def test_a_server_that_names_nothing_is_sent_rows():
    server = FakeServer(names=False)
    chat = RowsChat(server)
    for _ in range(2):
        chat.create(messages=TALK, model="m")
        assert used(server) == [[], [], []]


def test_a_server_started_anew_without_references_is_sent_rows():
    server = FakeServer()
    chat = RowsChat(server)
    chat.create(messages=TALK, model="m")
    server.names = False
    assert chat.create(messages=TALK, model="m") == "answer 3"
    assert used(server) == [[], [], []]


@pytest.mark.parametrize("status", [400, 401, 409, 500, None])
def test_errors_that_are_not_about_tokens_are_raised(status):
    def create(**fields):
        raise Refused(status)

    server = FakeServer()
    server.chat.completions.with_raw_response.create = create
    with pytest.raises(Refused):
        RowsChat(server).create(messages=TALK, model="m")


def test_a_request_that_is_bad_with_its_rows_too_is_raised():
    server = FakeServer()
    chat = RowsChat(server)
    chat.create(messages=TALK, model="m")

    def create(**fields):
        raise Refused(400)

    chat._completions.create = create
    with pytest.raises(Refused):
        chat.create(messages=TALK, model="m")


def test_the_async_client():
    server = FakeServer()
    direct = server.create

    async def create(**fields):
        return direct(**fields)

    server.chat.completions.with_raw_response.create = create
    chat = RowsChat(server)

    async def talk():
        await chat.create(messages=TALK, model="m")
        assert used(server) == [[], [], []]
        server.gone = ("T1",)
        assert await chat.create(messages=TALK, model="m") == "answer 3"
        assert used(server) == [[], [], []]
        await chat.create(messages=TALK, model="m")
        assert used(server) == [["T3"], [], ["T4"]]

    asyncio.run(talk())


@pytest.mark.parametrize("header", ["", "0", "0=", "=T", "x=T", "99=T", "0=T,,", "-1=T"])
def test_a_strange_header_harms_nobody(header):
    server = FakeServer()
    answer = SimpleNamespace(headers={"mmqwen-references": header}, parse=lambda: "answer")
    server.chat.completions.with_raw_response.create = lambda **fields: answer
    assert RowsChat(server).create(messages=TALK, model="m") == "answer"
