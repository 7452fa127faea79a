"""Options that several commands have, and read, alike. Light, until a file is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmqwen.modalities import ModalityError, ModalitySpec, parse_modalities

SAFETENSORS = ".safetensors"

DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Of vllm.LLM or from_pretrained, as max_model_len=4096; repeat for more.",
    ),
]


BankOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help="Rows that samples and prompts may name, beside the checkpoint's own; repeat for "
        "more. `mmqwen bank build` writes such a file.",
    ),
]


def quiet_engine() -> None:
    """Keep vLLM's log off a command's own output, unless the user has set where it goes."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` options of an engine; a value is JSON where it reads as that, else text.

    Raises:
        ValueError: one is not of this form.
    """
    options: dict[str, Any] = {}
    for one in given:
        name, separator, value = one.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or not name.isidentifier():
            raise ValueError(f"--option {one!r}: expected NAME=VALUE, as in enforce_eager=true")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def read_widths(given: Sequence[str]) -> dict[str, ModalitySpec]:
    """`NAME=WIDTH` of each modality of a dataset.

    Raises:
        ModalityError: one is not of this form, or names a modality twice.
    """
    widths: dict[str, int] = {}
    for one in given:
        name, _, width = one.partition("=")
        if not (width.isascii() and width.isdigit()):
            raise ModalityError(f"--modality {one!r}: expected NAME=WIDTH, as in m1=768")
        if name in widths:
            raise ModalityError(f"--modality names {name!r} twice")
        widths[name] = int(width)
    return parse_modalities(widths)


def read_renames(given: Sequence[str]) -> dict[str, str]:
    """`OLD=NEW` of modalities.

    Raises:
        ModalityError: one is not of this form, or names a modality twice.
    """
    renames: dict[str, str] = {}
    for one in given:
        old, _, new = one.partition("=")
        if not old or not new:
            raise ModalityError(f"--rename {one!r}: expected OLD=NEW, as in m1=vitals")
        if old in renames:
            raise ModalityError(f"--rename names {old!r} twice")
        renames[old] = new
    return renames


def read_rows(given: Sequence[str]) -> dict[str, list[Any]]:
    """`NAME=FILE`, `NAME=FILE.safetensors:TENSOR` or `NAME={"bank": ...}`, an item each, to the
    items of each modality.

    Raises:
        ValueError: one is not of this form, or its file holds no such array.
    """
    items: dict[str, list[Any]] = {}
    for one in given:
        name, separator, file = one.partition("=")
        if not separator or not name or not file:
            raise ValueError(
                f"--rows {one!r}: expected NAME=FILE with a .npy or .safetensors file, or "
                'NAME=FILE.safetensors:TENSOR, or NAME={"bank": "items", "ids": [5, 17]}'
            )
        found = _read_named(file) if file.startswith("{") else _read_array(file)
        items.setdefault(name, []).append(found)
    return items


def _read_named(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise ValueError(
            f'--rows {text!r:.80}: expected JSON as {{"bank": "items", "ids": [5, 17]}}: {error}'
        ) from None


def _read_array(name: str) -> Any:
    path, tensor = Path(name), ""
    if not path.exists() and f"{SAFETENSORS}:" in name:
        before, tensor = name.rsplit(":", 1)
        path = Path(before)
    if not path.is_file():
        raise ValueError(f"--rows: there is no file {path}")
    if path.suffix == SAFETENSORS:
        return _read_tensor(path, tensor)
    if path.suffix != ".npy":
        raise ValueError(f"--rows: {path}: expected a .npy or {SAFETENSORS} file")
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"--rows: {path} cannot be read: {error}") from error


def _read_tensor(path: Path, tensor: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
            if not tensor and len(names) != 1:
                raise ValueError(f"--rows: {path} holds {names}; name one, as {path}:{names[0]}")
            if tensor and tensor not in names:
                raise ValueError(f"--rows: {path} holds {names}, not {tensor!r}")
            return handle.get_tensor(tensor or names[0])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--rows: {path} cannot be read: {error}") from error


def messages_of(
    text: str, items: Mapping[str, Sequence[Any]], specs: Mapping[str, ModalitySpec]
) -> list[dict[str, Any]]:
    """A user's message of a text with markers: items where the markers stand, the others before.

    Raises:
        ModalityError: more or fewer markers than items.
    """
    from mmqwen.modalities import check_marker_count

    left = {name: list(given) for name, given in items.items()}
    parts: list[dict[str, Any]] = []
    for name, given in items.items():
        if name not in specs:
            raise ModalityError(f"unknown modality {name!r}; expected one of {sorted(specs)}")
        if specs[name].token not in text:
            parts += [{"type": name, name: item} for item in given]
    for name, spec in specs.items():
        check_marker_count(spec, text.count(spec.token), len(left.get(name, ())))
    while text:
        found = [(text.index(s.token), name) for name, s in specs.items() if s.token in text]
        at, name = min(found, default=(len(text), ""))
        if text[:at]:
            parts.append({"type": "text", "text": text[:at]})
        text = text[at:]
        if name:
            parts.append({"type": name, name: left[name].pop(0)})
            text = text.removeprefix(specs[name].token)
    return [{"role": "user", "content": parts}]
