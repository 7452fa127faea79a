"""Banks as configs and command lines name them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmqwen.banks.file import BankError
from mmqwen.modalities import NAME_PATTERN

PLACEMENTS = ("device", "projected", "host")
"""Where a bank's rows lie while they are served: in the device's memory, as they are or as the
embeddings that the projector makes of them, or in their file."""


@dataclass(frozen=True)
class BankSpec:
    """One bank as a config names it.

    Attributes:
        name: by which requests call it.
        file: where it lies.
        modality: whose rows it holds; None: as its file says.
        placement: one of `PLACEMENTS`.
        version: that its file must have; None: any.
    """

    name: str
    file: str
    modality: str | None = None
    placement: str = PLACEMENTS[0]
    version: str | None = None

    def to_dict(self) -> dict[str, str]:
        """The `config.json` form, without the name and without unset fields."""
        return {k: v for k, v in asdict(self).items() if k != "name" and v is not None}


def parse_banks(raw: Any, folder: str | os.PathLike[str] | None = None) -> dict[str, BankSpec]:
    """Read `{"items": {"file": ..., "modality": ..., "placement": ...}}` or `{"items": FILE}`.

    Args:
        raw: what a config's `banks` holds; None for none.
        folder: a checkpoint's, where files are looked for that are named relative to it.

    Raises:
        BankError: a field is missing, unknown or wrong.
    """
    if raw is not None and not isinstance(raw, Mapping):
        raise BankError(f"banks: got a {type(raw).__name__}, expected a dict from name to file")
    specs: dict[str, BankSpec] = {}
    for name, fields in (raw or {}).items():
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            raise BankError(f"bank name {name!r:.60} is no identifier of at most 64 characters")
        if isinstance(fields, BankSpec):
            fields = fields.to_dict()
        elif isinstance(fields, (str, os.PathLike)):
            fields = {"file": os.fspath(fields)}
        if not isinstance(fields, Mapping) or "file" not in fields:
            raise BankError(f"bank {name!r}: expected a file, or a dict with 'file'")
        unknown = set(fields) - {"file", "modality", "placement", "version"}
        if unknown:
            raise BankError(f"bank {name!r}: unknown fields {sorted(unknown)}")
        spec = BankSpec(name, **{**fields, "file": os.fspath(fields["file"])})
        if spec.placement not in PLACEMENTS:
            raise BankError(
                f"bank {name!r}: placement {spec.placement!r:.60}, expected one of {PLACEMENTS}"
            )
        path = Path(spec.file).expanduser()
        if folder is not None and not path.is_absolute() and (Path(folder) / path).exists():
            path = Path(folder) / path
        specs[name] = BankSpec(name, str(path), spec.modality, spec.placement, spec.version)
    return specs


def _parse_flag(text: str) -> tuple[str, dict[str, Any]]:
    name, separator, rest = text.partition("=")
    fields: dict[str, Any] = {}
    while True:
        head, _, option = rest.rpartition(":")
        key, equals, value = option.partition("=")
        if not (head and equals and key in ("placement", "modality")):
            break
        rest, fields[key] = head, value
    if not (separator and name and rest):
        raise BankError(
            f"--bank {text!r}: expected NAME=FILE, optionally followed by :placement=device, "
            ":placement=projected or :placement=host, and :modality=NAME"
        )
    return name, {"file": rest, **fields}


def parse_bank_flags(flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All `--bank` flags of a command: `items=FILE[:placement=host][:modality=item]`.

    Raises:
        BankError: one cannot be read, or two are of one name.
    """
    banks = dict(map(_parse_flag, flags))
    if len(banks) != len(flags):
        raise BankError("--bank names the same bank twice")
    return banks
