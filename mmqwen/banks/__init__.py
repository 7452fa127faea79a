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
    from mmqwen.banks.catalog import BankCatalog, BankSpec, parse_bank_flags, parse_banks
    from mmqwen.banks.file import Bank, BankError, open_bank
    from mmqwen.banks.rows import BankRows

_HOMES = {
    "Bank": "file",
    "BankCatalog": "catalog",
    "BankError": "file",
    "BankRows": "rows",
    "BankSpec": "catalog",
    "build_bank": "build",
    "check_bank": "build",
    "open_bank": "file",
    "parse_bank_flags": "catalog",
    "parse_banks": "catalog",
}

__all__ = [
    "Bank",
    "BankCatalog",
    "BankError",
    "BankRows",
    "BankSpec",
    "build_bank",
    "check_bank",
    "open_bank",
    "parse_bank_flags",
    "parse_banks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mmqwen.banks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmqwen.banks' has no attribute {name!r}")
