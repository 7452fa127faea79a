"""Which packs of earlier requests a vLLM front end can be asked for by name, and by whom."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import Any

from mmqwen.banks.catalog import Life
from mmqwen.vllm_plugin.named import InUse, held_by

TENANTS_KEPT = 64
"""Tenants that a pack is held for; the earliest is forgotten."""

ENTRY_BYTES = 1024
"""What a pack is counted for beside its bytes: entries of tiny packs take memory too."""


@dataclass
class _Held:
    size: int
    item: Any
    tenants: dict[bytes, None]
    banks: InUse | None


class HeldPacks:
    """Packs that can be named: the latest used ones, up to a number of bytes.

    A pack is held for those tenants alone that sent it themselves. May be used by several threads.

    Args:
        capacity: bytes.
        keep: whether the packs' items are kept here; where they are not, the engine keeps them.
    """

    def __init__(self, capacity: int, *, keep: bool) -> None:
        self.capacity = capacity
        self.keep = keep
        self._packs: OrderedDict[str, _Held] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()
        self.hits = self.total = 0

    def __len__(self) -> int:
        return len(self._packs)

    @property
    def nbytes(self) -> int:
        """Bytes that the packs are counted for."""
        return self._bytes

    def has(self, digest: str) -> bool:
        """Whether a pack is held, for whomever."""
        return digest in self._packs

    def find(self, digests: Iterable[str], tenant: str | None) -> list[Any] | None:
        """Packs' items (None where the engine keeps them); None unless all are held for a tenant.

        What is found counts as used.
        """
        owner = _owner(tenant)
        digests = list(digests)
        with self._lock:
            held = [self._packs.get(digest) for digest in digests]
            found = all(pack is not None and owner in pack.tenants for pack in held)
            self.total += len(held)
            if not found:
                return None
            self.hits += len(held)
            for digest in digests:
                self._packs.move_to_end(digest)
            return [pack.item for pack in held if pack is not None]

    def put(self, digest: str, item: Any, size: int, tenant: str | None) -> bool:
        """Hold a pack that a tenant has sent.

        Returns:
            Whether it fits.
        """
        size += ENTRY_BYTES
        with self._lock:
            before = self._packs.pop(digest, None)
            if before is not None:
                self._bytes -= before.size
            if size > self.capacity:
                return False
            while self._bytes + size > self.capacity:
                _, oldest = self._packs.popitem(last=False)
                self._bytes -= oldest.size
            tenants = before.tenants if before is not None else {}
            tenants[_owner(tenant)] = None
            if len(tenants) > TENANTS_KEPT:
                del tenants[next(iter(tenants))]
            kept = item if self.keep else None
            self._packs[digest] = _Held(size, kept, tenants, held_by(item))
            self._bytes += size
            return True

    def drop(self, digest: str) -> None:
        """Hold a pack no more."""
        with self._lock:
            pack = self._packs.pop(digest, None)
            if pack is not None:
                self._bytes -= pack.size

    def banks_of(self, digests: Iterable[str]) -> list[InUse]:
        """The versions of banks that packs name, of those that are held."""
        with self._lock:
            found = [self._packs.get(digest) for digest in digests]
        return [pack.banks for pack in found if pack is not None and pack.banks is not None]

    def forget(self, life: Life) -> None:
        """Hold no pack that names this version of a bank."""
        with self._lock:
            for digest, pack in list(self._packs.items()):
                if pack.banks is not None and life in pack.banks.lives:
                    del self._packs[digest]
                    self._bytes -= pack.size

    def clear(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._packs.clear()
            self._bytes = 0


def _owner(tenant: str | None) -> bytes:
    return blake2b((tenant or "").encode("utf-8", "surrogatepass"), digest_size=16).digest()
