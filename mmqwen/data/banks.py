"""Items of a sample that name rows of a bank, and the banks that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmqwen.banks import BankCatalog, BankError, BankRows, BankSpec, parse_banks
from mmqwen.banks.catalog import NamedRows
from mmqwen.modalities import ModalitySpec


@dataclass(frozen=True)
class BankItem:
    """`{"bank": name, "ids": [...]}` or `{"bank": name, "keys": [...]}` of a line.

    What `BankRows` is, but equal where it says the same, so that items can be told apart. Whether
    there are such rows is seen when they are read.

    Attributes:
        bank: the bank's name.
        ids: numbers of its rows.
        keys: strings of its keys file, instead of `ids`.
    """

    bank: Any
    ids: Any = None
    keys: Any = None

    @property
    def rows(self) -> BankRows:
        """The same as a prompt names it."""
        return BankRows(self.bank, self.ids, self.keys)

    def to_dict(self) -> dict[str, Any]:
        """As a line spells it."""
        ids, keys = self.ids, self.keys
        named = {"keys": list(keys)} if ids is None else {"ids": [int(one) for one in ids]}
        return {"bank": self.bank, **named}


def read_bank_item(fields: Mapping[str, Any]) -> BankItem:
    """One such item.

    Raises:
        ValueError: other fields, or no lists of ids or keys.
    """
    if set(fields) not in ({"bank", "ids"}, {"bank", "keys"}):
        raise ValueError(
            f"an item has fields {sorted(map(str, fields))}, expected 'bank', and 'ids' or 'keys'"
        )
    kind, name = ("ids", "integers") if "ids" in fields else ("keys", "strings")
    given = fields[kind]
    if not isinstance(given, (list, tuple)) or any(isinstance(v, (list, dict)) for v in given):
        raise ValueError(f"an item's {kind!r} are {given!r:.60}, expected a list of {name}")
    return BankItem(fields["bank"], **{kind: tuple(given)})


def served_banks(
    config: Any, folder: Any, given: Mapping[str, Any] | None = None
) -> dict[str, BankSpec]:
    """The banks of a checkpoint, with those given beside, or in the place of, its own.

    Args:
        config: the checkpoint's.
        folder: where it lies, to which its banks' files are relative.
        given: by name, as `parse_banks` reads them.

    Raises:
        BankError: as `parse_banks`.
    """
    return {**parse_banks(getattr(config, "banks", None), folder), **parse_banks(given)}


class DatasetBanks:
    """The banks that samples may name; one is opened when the first sample names it.

    Args:
        banks: by name, as `parse_banks` reads them; None for none.
        modalities: the model's.

    Raises:
        BankError: as `parse_banks`.
    """

    def __init__(
        self, banks: Mapping[str, Any] | None, modalities: Mapping[str, ModalitySpec] | None
    ) -> None:
        self._specs = parse_banks(banks)
        self._modalities = dict(modalities or {})
        self._opened: dict[str, BankCatalog | BankError] = {}

    @property
    def versions(self) -> dict[str, str]:
        """Those of the banks that were named, by name."""
        catalogs = {n: c for n, c in self._opened.items() if isinstance(c, BankCatalog)}
        return {name: catalog.banks[name].bank.version for name, catalog in catalogs.items()}

    def read(self, item: BankItem, modality: str, index: int) -> NamedRows:
        """One item, checked; `read()` of what is returned gives its rows, read from the file.

        Args:
            item: the item.
            modality: among whose items it stands.
            index: its place among these, for messages.

        Raises:
            BankError: there is no such bank, or its file cannot be used.
            EmbeddingError: it has no such rows; see `BankCatalog.read_item`.
        """
        return self._catalog(item.bank).read_item(item.rows, modality, index)

    def require(self, name: str) -> None:
        """Open a bank now.

        Raises:
            BankError: there is no such bank, or its file cannot be used.
        """
        self._catalog(name)

    def _catalog(self, name: Any) -> BankCatalog:
        if not isinstance(name, str) or name not in self._specs:
            raise BankError(
                f"unknown bank {name!r:.60}, expected one of {sorted(self._specs)}; give it with "
                "--bank NAME=FILE (banks= in Python), or a checkpoint that has it"
            )
        found = self._opened.get(name)
        if found is None:
            try:
                found = BankCatalog({name: self._specs[name]}, self._modalities)
            except BankError as error:
                found = error
            self._opened[name] = found
        if isinstance(found, BankError):
            raise found
        return found
