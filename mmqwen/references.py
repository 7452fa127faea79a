"""Rows by reference: signed tokens that stand for rows sent before. Standard library only.

A server that was asked to gives a token for the rows of each message; a later message holds the
token in the place of its rows. Why a token is made so: docs/adr/0008-rows-by-reference.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

from mmqwen.modalities import ModalitySpec

REFERENCE_KIND = "rows_reference"
"""Type of the part of a chat message that holds a token."""

MAX_TOKEN = 16 * 1024
"""Most characters of a token. Of 1,024 items of which no two neighbours are alike it has 4,300."""

KEY_VARIABLE = "MMQWEN_REFERENCE_KEY"
KEY_FILE_VARIABLE = "MMQWEN_REFERENCE_KEY_FILE"
"""Environment variables that hold, or name a file with, the secret by which tokens are signed."""

_SHORTEST_KEY = 16
_VERSION = 1
_MAC_BYTES = 16


class RowsMissing(ValueError):
    """Rows are given by tokens that stand for nothing here; send the rows again.

    Attributes:
        tokens: those tokens.
        reason: short code for metrics.
    """

    reason = "reference"

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = list(dict.fromkeys(tokens))
        super().__init__(
            f"{len(self.tokens)} message(s) give rows by reference that this server has no more, "
            "or never had from you; send the rows of these messages again"
        )


@dataclass(frozen=True)
class PackName:
    """What a token says of one pack.

    Attributes:
        digest: the pack's content hash, in hexadecimal.
        items: (modality's index, rows) of each item, in the order of the prompt.
    """

    digest: str
    items: tuple[tuple[int, int], ...]


@dataclass
class Turn:
    """A chat message that holds rows.

    Attributes:
        message: its position among the messages.
        names: the modality of each of its items.
        token: what stands for its rows, where they were not sent.
    """

    message: int
    names: list[str]
    token: str | None = None


class ChatRows(dict[str, list[Any]]):
    """The items of a conversation by modality, None where a token stands for them.

    Attributes:
        turns: the messages that hold rows, in order.
        tenant: whose rows they are: the request's `cache_salt`.
        issued: position of a message to the token for its rows, once they are packed.
        missing: tokens that stood for nothing, once they were looked at.
        look_again: looks at them once more, where they may have been lost since.
    """

    def __init__(self, items: Mapping[str, list[Any]] | None = None) -> None:
        super().__init__(items or {})
        self.turns: list[Turn] = []
        self.tenant: str | None = None
        self.issued: dict[int, str] = {}
        self.missing: list[str] = []
        self.look_again: Callable[[], Any] | None = None

    @property
    def tokens(self) -> list[str]:
        """All tokens that stand for rows."""
        return [turn.token for turn in self.turns if turn.token is not None]

    def by_reference(self, tokens: Mapping[int, str]) -> ChatRows:
        """The same conversation with tokens in the place of some messages' rows.

        Args:
            tokens: position of a message to its token.
        """
        left = {name: iter(members) for name, members in self.items()}
        short = ChatRows({name: [] for name in self})
        for turn in self.turns:
            token = tokens.get(turn.message, turn.token)
            for name in turn.names:
                item = next(left[name])
                short[name].append(item if token is None else None)
            short.turns.append(Turn(turn.message, turn.names, token))
        return short


# -- tokens ------------------------------------------------------------------------------------


class Signer:
    """Makes tokens, and reads its own.

    A token is base64 of what it says and a MAC over that, the tenant and the modalities: nobody
    else's names rows, and none gives rows another shape, order or modality than they were sent in.

    Args:
        specs: the modalities, in the order of their indices.
        secret: servers with the same secret take each other's tokens; left out, a random one.
    """

    def __init__(self, specs: Mapping[str, ModalitySpec], secret: bytes | None = None) -> None:
        table = json.dumps([[name, spec.dim] for name, spec in specs.items()]).encode()
        main = hashlib.blake2b(secret or secrets.token_bytes(32)).digest()
        self._key = hashlib.blake2b(table, key=main, person=b"mmqwen-ref-key").digest()

    def sign(self, tenant: str | None, packs: Sequence[PackName]) -> str:
        """The token of a message's packs."""
        said = bytearray([_VERSION])
        _put(said, len(packs))
        for pack in packs:
            digest = bytes.fromhex(pack.digest)
            _put(said, len(digest))
            said += digest
            runs = [(item, len(list(same))) for item, same in groupby(pack.items)]
            _put(said, len(runs))
            for (index, rows), times in runs:
                _put(said, index)
                _put(said, rows)
                _put(said, times)
        said += self._mac(tenant, said)
        return base64.urlsafe_b64encode(said).rstrip(b"=").decode()

    def read(self, token: str, tenant: str | None) -> tuple[PackName, ...] | None:
        """What a token says; None of one that was not made here, or not for this tenant."""
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), b"-_", validate=True)
        except (ValueError, binascii.Error):
            return None
        said, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if not said or not hmac.compare_digest(mac, self._mac(tenant, said)):
            return None
        # What follows is our own writing.
        packs = []
        count, at = _get(said, 1)
        for _ in range(count):
            size, at = _get(said, at)
            digest = said[at : at + size].hex()
            runs, at = _get(said, at + size)
            items: list[tuple[int, int]] = []
            plain = said[at : at + 3 * runs]
            if plain.isascii():  # as many numbers of one byte each, the most usual
                at += len(plain)
                for index, rows, times in zip(plain[::3], plain[1::3], plain[2::3], strict=True):
                    items += [(index, rows)] * times
            else:
                for _ in range(runs):
                    index, at = _get(said, at)
                    rows, at = _get(said, at)
                    times, at = _get(said, at)
                    items += [(index, rows)] * times
            packs.append(PackName(digest, tuple(items)))
        return tuple(packs)

    def _mac(self, tenant: str | None, said: bytes | bytearray) -> bytes:
        # Salts of other characters than Unicode's reach us from JSON as halves of surrogate pairs.
        owner = (tenant or "").encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(key=self._key, digest_size=_MAC_BYTES, person=b"mmqwen-ref-mac")
        digest.update(len(owner).to_bytes(8, "little") + owner)
        digest.update(said)
        return digest.digest()


def _put(out: bytearray, number: int) -> None:
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def _get(said: bytes, at: int) -> tuple[int, int]:
    """A number that `_put` wrote, and where the next one begins."""
    number = shift = 0
    while said[at] > 0x7F:
        number |= (said[at] & 0x7F) << shift
        shift += 7
        at += 1
    return number | said[at] << shift, at + 1


def read_secret() -> bytes | None:
    """The secret that the environment gives; None where it gives none.

    Raises:
        ValueError: both variables are set, the file cannot be read, or the secret is short.
    """
    text, file = os.environ.get(KEY_VARIABLE), os.environ.get(KEY_FILE_VARIABLE)
    if text is None and file is None:
        return None
    if text is not None and file is not None:
        raise ValueError(f"{KEY_VARIABLE} and {KEY_FILE_VARIABLE} are both set; expected one")
    if file is not None:
        try:
            secret = Path(file).read_bytes().strip()
        except OSError as error:
            raise ValueError(f"the key of row references cannot be read: {error}") from None
    else:
        secret = (text or "").encode()
    if len(secret) < _SHORTEST_KEY:
        raise ValueError(
            f"the key of row references has {len(secret)} bytes, expected {_SHORTEST_KEY} or more; "
            "make one with `openssl rand -hex 32`"
        )
    return secret


# -- who sends them ----------------------------------------------------------------------------


@dataclass
class TokenBook:
    """The tokens that a server gave, by a digest of the rows that they stand for.

    Attributes:
        limit: how many are kept, the latest used ones.
    """

    limit: int = 4096
    _tokens: OrderedDict[bytes, str] = field(default_factory=OrderedDict)
    _lock: Any = field(default_factory=Lock)

    def find(self, digest: bytes | None) -> str | None:
        """The token for rows, or None."""
        if digest is None:
            return None
        with self._lock:
            token = self._tokens.get(digest)
            if token is not None:
                self._tokens.move_to_end(digest)
            return token

    def learn(self, digest: bytes | None, token: str) -> None:
        """Keep what a server gave for rows."""
        if digest is None:
            return
        with self._lock:
            self._tokens[digest] = token
            self._tokens.move_to_end(digest)
            while len(self._tokens) > self.limit:
                self._tokens.popitem(last=False)

    def forget(self, tokens: Iterable[str]) -> None:
        """Drop tokens that stand for nothing any more."""
        gone = set(tokens)
        with self._lock:
            for digest in [key for key, token in self._tokens.items() if token in gone]:
                del self._tokens[digest]


def fast_digest() -> Callable[[], Any]:
    """A hash that resists an attacker: BLAKE3 where it is installed (vLLM brings it), else BLAKE2b.

    BLAKE3 takes 6 us for 64 KB where BLAKE2b takes 70.
    """
    try:
        from blake3 import blake3
    except ImportError:
        return lambda: hashlib.blake2b(digest_size=32)
    return blake3  # type: ignore[no-any-return]
