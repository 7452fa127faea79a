"""Rows that lie on the server, which a request names by id: banks.

A bank is one table of one modality's rows in a file. `BankRows("items", ids=[5, 17, 9])` stands
wherever a tensor of rows may stand. Importing this package loads nothing heavy; each public name
is resolved when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmqwen.banks.build import build_bank, check_bank
    from mmqwen.banks.catalog import BankCatalog
    from mmqwen.banks.file import Bank, BankBusyError, BankError, UnknownBankError, open_bank
    from mmqwen.banks.rows import BankRows
    from mmqwen.banks.spec import BankSpec, parse_bank_flags, parse_banks
    from mmqwen.banks.update import BankChange, update_bank

_HOMES = {
    "Bank": "file",
    "BankBusyError": "file",
    "BankCatalog": "catalog",
    "BankChange": "update",
    "BankError": "file",
    "BankRows": "rows",
    "BankSpec": "spec",
    "UnknownBankError": "file",
    "build_bank": "build",
    "check_bank": "build",
    "open_bank": "file",
    "parse_bank_flags": "spec",
    "parse_banks": "spec",
    "update_bank": "update",
}

__all__ = [
    "Bank",
    "BankBusyError",
    "BankCatalog",
    "BankChange",
    "BankError",
    "BankRows",
    "BankSpec",
    "UnknownBankError",
    "build_bank",
    "check_bank",
    "open_bank",
    "parse_bank_flags",
    "parse_banks",
    "update_bank",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mmqwen.banks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmqwen.banks' has no attribute {name!r}")
