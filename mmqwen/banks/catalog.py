"""The banks that a model serves, by name, and items that name their rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from mmqwen.banks.file import Bank, BankError, UnknownBankError, open_bank
from mmqwen.banks.rows import BankRows, is_named
from mmqwen.banks.spec import BankSpec
from mmqwen.modalities import ModalitySpec
from mmqwen.transport.errors import EmbeddingError, refuse, show
from mmqwen.transport.rows import as_items


class Life:
    """Lives as long as anything may name rows by a number: catalogs and prompts keep it alive."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, eq=False)
class ServedBank:
    """A version of a bank, as a catalog has it.

    Attributes:
        number: by which packs call this version: of two versions that are served at the same time,
            each has its own.
        spec: as the config names it, its modality and version settled.
        bank: its file.
        version: its version, as bytes.
        life: of the number.
    """

    number: int
    spec: BankSpec
    bank: Bank
    version: bytes
    life: Life = field(default_factory=Life)


class NamedRows(NamedTuple):
    """An item that names rows of a bank, checked.

    Attributes:
        source: the bank.
        ids: int64 `[n]`, each a row of it.
    """

    source: ServedBank
    ids: np.ndarray

    @property
    def native(self) -> tuple[int, np.ndarray, bytes]:
        """What the native helper is told of it."""
        return self.source.number, self.ids, self.source.version

    def read(self) -> torch.Tensor:
        """The rows themselves, `[n, d]`, in the bank's dtype."""
        return self.source.bank.rows[torch.from_numpy(self.ids)]


class BankCatalog:
    """The banks of a model.

    Args:
        banks: as a config names them.
        modalities: the model's.
        dtype: in which it is served, if that is known.

    Raises:
        BankError: a file cannot be used, is of another version than its config says, of a modality
            that the model lacks, of another width than it, or leaves the range of `dtype`.
    """

    def __init__(
        self,
        banks: Mapping[str, BankSpec],
        modalities: Mapping[str, ModalitySpec],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._modalities = modalities
        self._dtype = dtype
        self.banks: dict[str, ServedBank] = {}
        for number, (name, spec) in enumerate(banks.items()):
            self.banks[name] = self.open(spec, number)

    def open(self, spec: BankSpec, number: int) -> ServedBank:
        """A version of a bank, checked, and mapped, so that another file may take its place.

        Args:
            spec: as a config names it.
            number: by which packs are to call it.

        Raises:
            BankError: as the catalog itself.
        """
        try:
            bank = open_bank(spec.file)
            if self._dtype is not None:
                bank.require_range(self._dtype)
            modality = self._modality(spec, bank)
            _ = bank.keys, bank.rows
            stat, facts = bank.file.stat(), bank.facts
        except (BankError, OSError) as error:
            raise BankError(f"bank {spec.name!r}: {error}") from None
        if (stat.st_size, stat.st_mtime_ns) != (facts.size, facts.mtime_ns):
            raise BankError(f"bank {spec.name!r}: {spec.file} was changed while it was opened")
        if spec.version not in (None, bank.version):
            raise BankError(
                f"bank {spec.name!r}: {spec.file} has version {bank.version[:16]}, expected "
                f"{spec.version!r:.18}; the file was changed since, start anew with this one"
            )
        settled = BankSpec(
            spec.name, os.path.abspath(spec.file), modality, spec.placement, bank.version
        )
        return ServedBank(number, settled, bank, bytes.fromhex(bank.version))

    def open_another(self, name: str, file: str | os.PathLike[str], number: int) -> ServedBank:
        """Another version of a bank, served as the one that is here, which stays.

        Raises:
            UnknownBankError: there is no such bank.
            BankError: as `open`; also another modality than the bank's.
        """
        now = self.banks.get(name) if isinstance(name, str) else None
        if now is None:
            raise UnknownBankError(
                f"unknown bank {name!r:.80}, expected one of {sorted(self.banks)}"
            )
        spec = now.spec
        return self.open(BankSpec(name, os.fspath(file), spec.modality, spec.placement), number)

    def replaced(self, served: ServedBank) -> BankCatalog:
        """The catalog with this version of a bank; who has the catalog itself sees no change."""
        other = copy(self)
        other.banks = {**self.banks, served.spec.name: served}
        return other

    def _modality(self, spec: BankSpec, bank: Bank) -> str:
        given = {name for name in (spec.modality, bank.modality) if name is not None}
        if len(given) != 1:
            raise BankError(
                f"modality {spec.modality!r} in the config and {bank.modality!r} in {bank.file}; "
                "expected one, or twice the same"
            )
        name = given.pop()
        modality = self._modalities.get(name)
        if modality is None:
            raise BankError(
                f"unknown modality {name!r}, expected one of {sorted(self._modalities)}"
            )
        if bank.width != modality.dim:
            raise BankError(
                f"{bank.file}: rows are {bank.width} wide, expected {modality.dim}, the width of "
                f"modality {name!r}"
            )
        return name

    def to_dict(self) -> dict[str, dict[str, str]]:
        """The `config.json` form, with files, modalities and versions settled."""
        return {name: served.spec.to_dict() for name, served in self.banks.items()}

    def read_item(self, item: Any, modality: str, index: int) -> NamedRows:
        """Check one item that names rows; see `is_named`.

        Args:
            item: `BankRows`, or `{"bank": name, "ids": [...]}` or `{"bank": name, "keys": [...]}`.
            modality: among whose items it stands.
            index: its position among these, for messages.

        Raises:
            EmbeddingError: an unknown bank or key, a bank of another modality, an id that is no
                integer or no row of the bank, or not 1 to `max_rows` of them.
        """
        if not isinstance(item, BankRows):
            item = read_fields(item, modality, index)
        served = self.banks.get(item.bank) if isinstance(item.bank, str) else None
        if served is None:
            refuse(
                "bank", modality, index, f"unknown bank {show(item.bank)}",
                f"one of {sorted(self.banks)}", "start the server or pipeline with this bank",
            )  # fmt: skip
        if served.spec.modality != modality:
            refuse(
                "bank", modality, index,
                f"bank {item.bank!r}, whose rows are of modality {served.spec.modality!r}",
                f"a bank of modality {modality!r}", "name its rows among that modality's items",
            )  # fmt: skip
        if (item.ids is None) == (item.keys is None):
            refuse(
                "field", modality, index, f"bank {item.bank!r} with both or none of ids and keys",
                "one of them", "give ids=[...] or keys=[...]",
            )  # fmt: skip
        most = self._modalities[modality].max_rows
        if item.keys is not None:
            ids = _read_keys(item, served, modality, index, most)
        else:
            ids = _read_ids(item, modality, index, most)
        if int(ids.view(np.uint64).max()) >= served.bank.num_rows:  # negative ones are large there
            wrong = int(ids[(ids < 0) | (ids >= served.bank.num_rows)][0])
            refuse(
                "id", modality, index, f"id {wrong} of bank {item.bank!r}",
                f"0 to {served.bank.num_rows - 1}", "the bank has no such row",
            )  # fmt: skip
        return NamedRows(served, ids)

    def read_items(
        self, value: Any, modality: str
    ) -> tuple[Sequence[Any], list[NamedRows | None]] | None:
        """A modality's items, and of each the rows that it names, or None.

        Returns:
            None where one cannot be served: `read_item` says why.
        """
        members = (value,) if is_named(value) else value
        try:
            found = [
                self.read_item(item, modality, at) if is_named(item) else None
                for at, item in enumerate(members)
            ]
        except EmbeddingError:
            return None
        return members, found

    def by_value(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """Items in which the rows themselves stand where rows were named.

        Raises:
            EmbeddingError: as `read_item`, and `as_items`.
        """
        found: dict[str, Any] = {}
        for name, value in items.items():
            members = as_items(value, name)
            if any(map(is_named, members)):
                value = [
                    self.read_item(item, name, at).read() if is_named(item) else item
                    for at, item in enumerate(members)
                ]
            found[name] = value
        return found


def read_fields(item: BankRows | Mapping[str, Any], modality: str, index: int) -> BankRows:
    """Rows of a bank, named as JSON can: `{"bank": name, "ids": [...]}`, or "keys".

    Raises:
        EmbeddingError: other fields.
    """
    if isinstance(item, BankRows):
        return item
    if len(item) != 2 or not ("ids" in item or "keys" in item):
        refuse(
            "field", modality, index, f"fields {[show(field) for field in list(item)[:8]]}",
            "'bank', and 'ids' or 'keys'", "name rows by nothing else",
        )  # fmt: skip
    return BankRows(item["bank"], item.get("ids"), item.get("keys"))


def _check_count(count: int, item: BankRows, modality: str, index: int, most: int) -> None:
    if not 0 < count <= most:
        refuse(
            "rows", modality, index, f"{count} rows of bank {item.bank!r}", f"1 to {most} rows",
            "leave empty items out, and split long ones or raise the modality's max_rows",
        )  # fmt: skip


def _read_ids(item: BankRows, modality: str, index: int, most: int) -> np.ndarray:
    ids = item.ids
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy() if ids.dtype != torch.bfloat16 else ids.float().numpy()
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            _refuse_ids(item, modality, index, f"ids that are {ids.dtype} {list(ids.shape)}")
        _check_count(len(ids), item, modality, index, most)
        if ids.dtype == np.uint64:
            ids = np.minimum(ids, np.uint64(np.iinfo(np.int64).max))
        return ids.astype(np.int64)
    if not isinstance(ids, (list, tuple, range)):
        _refuse_ids(item, modality, index, f"ids that are {show(ids)}")
    _check_count(len(ids), item, modality, index, most)
    if set(map(type, ids)) != {int}:
        for one in ids:
            if isinstance(one, (bool, np.bool_)) or not isinstance(one, Integral):
                _refuse_ids(item, modality, index, f"the id {show(one)}")
        ids = [int(one) for one in ids]
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError:
        wrong = max(ids, key=abs)
        _refuse_ids(item, modality, index, f"the id {show(wrong)}")


def _refuse_ids(item: BankRows, modality: str, index: int, got: str) -> NoReturn:
    refuse(
        "id", modality, index, f"{got}, of bank {item.bank!r}", "a flat list of integers from 0 on",
        "give the numbers of rows as ids=[...]",
    )  # fmt: skip


def _read_keys(
    item: BankRows, served: ServedBank, modality: str, index: int, most: int
) -> np.ndarray:
    known, keys = served.bank.keys, item.keys
    if known is None:
        refuse(
            "key", modality, index, f"keys of bank {item.bank!r}, which has none", "ids",
            "name rows by ids, or build the bank with --keys FILE",
        )  # fmt: skip
    if not isinstance(keys, Sequence) or isinstance(keys, (str, bytes)):
        refuse(
            "key", modality, index, f"keys of bank {item.bank!r} that are {show(keys)}",
            "a list of strings", "give keys=[...]",
        )  # fmt: skip
    _check_count(len(keys), item, modality, index, most)
    ids: list[int] = []
    for key in keys:
        row = known.row(key) if isinstance(key, str) else None
        if row is None:
            refuse(
                "key", modality, index, f"the key {show(key)} of bank {item.bank!r}",
                f"one of the {len(known)} strings of {served.bank.file.name}.keys",
                "the bank has no such row",
            )  # fmt: skip
        ids.append(row)
    return np.array(ids, dtype=np.int64)
