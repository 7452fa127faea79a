"""`mmqwen bank build` and `check`: tables of any size, some MiB at a time."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mmqwen.banks.file import (
    MODALITY_FIELD,
    MOST_ROWS,
    ROWS_TENSOR,
    Bank,
    BankError,
    Facts,
    Keys,
    facts_file,
    keys_file,
    largest_of,
    new_hash,
    open_bank,
    row_blocks,
    scan,
    write_facts,
)
from mmqwen.modalities import NAME_PATTERN, ROW_DTYPES

_DATA_ALIGN = 64
"""Where in the file the rows begin is a multiple of this, for loads of 16 bytes."""


def build_bank(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    modality: str,
    keys: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
) -> Bank:
    """Write a bank: the table, its version, and its keys. Nothing is held whole in memory.

    Args:
        source: a `.npy` file, a `.safetensors` file (its tensor `rows`, or the only one), or a
            folder of such files, which are joined in the order of their names.
        output: the file to write; it appears whole or not at all, over an earlier one.
        modality: whose rows they are.
        keys: a file of names, one a line and row.
        dtype: "float32", "float16" or "bfloat16" in the bank; left out, the source's own, float32
            for float64.

    Returns:
        The bank, opened.

    Raises:
        BankError: the source or the keys cannot be used, or the output cannot be written.
    """
    source, output = Path(source), Path(output)
    if not NAME_PATTERN.fullmatch(modality):
        raise BankError(f"modality {modality!r:.60} is no name of one")
    if dtype is not None and dtype not in ROW_DTYPES:
        raise BankError(f"dtype {dtype!r:.60}, expected one of {list(ROW_DTYPES)}")
    parts = _open_source(source)
    widths = {part.shape[1] for _, part in parts}
    if len(widths) > 1:
        raise BankError(f"{source}: rows of widths {sorted(widths)}, expected one")
    kinds = {_stored(part) for _, part in parts}
    if dtype is None and len(kinds) > 1:
        raise BankError(f"{source}: dtypes {sorted(kinds)}, expected one; choose by --dtype")
    name = dtype or kinds.pop()
    count, width = sum(part.shape[0] for _, part in parts), widths.pop()
    if count > MOST_ROWS:
        raise BankError(f"{source}: {count} rows, expected at most {MOST_ROWS}")
    if keys is not None:
        _check_keys(Path(keys), count)
    part_file = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        facts = _write(part_file, parts, modality, name, (count, width))
        for stale in (facts_file(output), keys_file(output)):
            stale.unlink(missing_ok=True)
        if keys is not None:
            shutil.copyfile(keys, keys_file(output))
        part_file.replace(output)
    except OSError as error:
        raise BankError(f"cannot write {output}: {error}") from error
    finally:
        part_file.unlink(missing_ok=True)
    write_facts(output, facts)
    return open_bank(output)


def check_bank(file: str | os.PathLike[str]) -> Bank:
    """Read a whole bank and compare it with what is stored beside it.

    Raises:
        BankError: it cannot be used, or is not what its version says.
    """
    bank = open_bank(file)
    found = scan(bank.file)
    if found.version != bank.version:
        raise BankError(
            f"{bank.file}: its content's version is {found.version[:16]}, what stands beside it is "
            f"{bank.version[:16]}; the file was changed in place: remove "
            f"{facts_file(bank.file).name}, or build it again"
        )
    _ = bank.keys
    return bank


def _check_keys(file: Path, count: int) -> None:
    try:
        Keys(file, count)
    except OSError as error:
        raise BankError(f"{file}: cannot be read: {error}") from error


def _open_source(source: Path) -> Sequence[tuple[Path, torch.Tensor]]:
    files = [source]
    if source.is_dir():
        files = sorted(f for f in source.iterdir() if f.suffix in (".npy", ".safetensors"))
        if not files:
            raise BankError(f"{source}: holds no .npy and no .safetensors file")
    parts = []
    for file in files:
        rows = _open_safetensors(file) if file.suffix != ".npy" else _open_npy(file)
        if rows.ndim == 1:
            rows = rows.unsqueeze(0)
        if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
            raise BankError(
                f"{file}: {rows.dtype} {list(rows.shape)}, expected floating [rows, width]"
            )
        parts.append((file, rows))
    return parts


def _open_npy(file: Path) -> torch.Tensor:
    try:
        array: Any = np.load(file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BankError(f"{file}: cannot be read: {error}") from error
    if array.dtype.kind != "f" or array.dtype.itemsize > 8 or not array.dtype.isnative:
        raise BankError(f"{file}: {array.dtype}, expected float16, float32 or float64")
    return torch.from_numpy(array)


def _open_safetensors(file: Path) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            name = ROWS_TENSOR if ROWS_TENSOR in names else names[0] if len(names) == 1 else None
            if name is None:
                raise BankError(f"{file}: holds {names[:4]}, expected {ROWS_TENSOR!r}")
            return handle.get_tensor(name)  # mapped
    except (OSError, SafetensorError) as error:
        raise BankError(f"{file}: cannot be read: {error}") from error


def _stored(rows: torch.Tensor) -> str:
    name = str(rows.dtype).removeprefix("torch.")
    return "float32" if name == "float64" else name


def _write(
    file: Path,
    parts: Sequence[tuple[Path, torch.Tensor]],
    modality: str,
    name: str,
    shape: tuple[int, int],
) -> Facts:
    dtype, (code, size) = getattr(torch, name), ROW_DTYPES[name]
    entry = {"dtype": code, "shape": shape, "data_offsets": [0, shape[0] * shape[1] * size]}
    header = {"__metadata__": {MODALITY_FIELD: modality}, ROWS_TENSOR: entry}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGN)
    begin = struct.pack("<Q", len(text)) + text
    hasher, largest = new_hash(), 0.0
    with open(file, "wb") as stream:
        stream.write(begin)
        hasher.update(begin)
        for source, rows in parts:
            at = 0
            for block in row_blocks(rows):
                largest_of(block, str(source), at)
                stored = block.to(dtype).contiguous()
                if not bool(stored.isfinite().all()):
                    raise BankError(
                        f"{source}: a value of rows {at} to {at + len(block) - 1} is beyond the "
                        f"range of {name}; choose another --dtype"
                    )
                largest = max(largest, largest_of(stored, str(source), at))
                raw = stored.view(torch.uint8).numpy().data
                stream.write(raw)
                hasher.update(raw)
                at += len(block)
    stat = file.stat()
    return Facts(stat.st_size, stat.st_mtime_ns, hasher.hexdigest(), largest)
