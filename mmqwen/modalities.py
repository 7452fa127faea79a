"""What a modality is, and the marker rules that every door shares.

Imports the standard library only, so that configuration, command line and client can use it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Any

NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
"""Names are used as weight names, chat part types and token spellings, so they are identifiers."""

RESERVED_NAMES = frozenset(
    {
        *("image", "video", "audio", "vision_chunk", "prompt_embeds", "text", "mmqwen_pack"),
        "rows_reference",
    }
)
"""Names that vLLM or this package already gives a meaning of their own."""

DEFAULT_MAX_ROWS = 1024

ROW_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
"""What rows may be of on the wire, in packs (which number them in this order) and in datasets:
numpy's and torch's name, safetensors' name, bytes of an element."""


ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "none")
NORMS = ("none", "layer", "rms")
"""What a projector may be made of; `mmqwen_kernels` says what each means."""


class ModalityError(ValueError):
    """A modality's description is wrong, or a prompt's markers do not match its items."""


@dataclass(frozen=True)
class ProjectorSpec:
    """What a projector is, beside its sizes: `linear_2(activation(linear_1(norm(x))))`.

    Attributes:
        activation: one of `ACTIVATIONS`, between the layers.
        norm: one of `NORMS`, over each row, before the first layer.
        norm_eps: added under the norm's root; None: 1e-5 for layer, 1e-6 for rms.
        bias: whether the linear layers have one.
        layers: 2, or 1: `linear_1(norm(x))`.
    """

    activation: str = "relu"
    norm: str = "none"
    norm_eps: float | None = None
    bias: bool = True
    layers: int = 2


@dataclass(frozen=True)
class ModalitySpec:
    """One modality: its row width, its projector's hidden width and its placeholder token.

    What is None was not told: it is absent from `config.json`, and `projector` has the defaults.

    Attributes:
        name: identifier, at most 64 characters.
        dim: width of one row, in elements.
        hidden_dim: hidden units of the projector; None means the language model's hidden size.
        token: spelling of the placeholder, `<|name|>` unless told.
        token_id: id of the placeholder; None until it is assigned.
        max_rows: most rows that one item may have.
        activation, norm, norm_eps, bias, layers: see `ProjectorSpec`.
    """

    name: str
    dim: int
    hidden_dim: int | None = None
    token: str = ""
    token_id: int | None = None
    max_rows: int = DEFAULT_MAX_ROWS
    activation: str | None = None
    norm: str | None = None
    norm_eps: float | None = None
    bias: bool | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME_PATTERN.fullmatch(self.name):
            raise ModalityError(
                f"modality name {self.name!r} is not an identifier of at most 64 letters, digits "
                "and underscores that begins with a letter"
            )
        if self.name in RESERVED_NAMES:
            raise ModalityError(f"modality name {self.name!r} is reserved; choose another name")
        if not self.token:
            object.__setattr__(self, "token", f"<|{self.name}|>")
        for field in ("dim", "hidden_dim", "max_rows", "token_id"):
            value = getattr(self, field)
            if value is None and field in ("hidden_dim", "token_id"):
                continue
            smallest = 0 if field == "token_id" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ModalityError(
                    f"modality {self.name!r}: {field} is {value!r}, expected an integer >= "
                    f"{smallest}"
                )
        self._check_projector()

    def _check_projector(self) -> None:
        def refuse(what: str) -> ModalityError:
            return ModalityError(f"modality {self.name!r}: {what}")

        choices: dict[str, tuple[Any, ...]] = {"activation": ACTIVATIONS, "norm": NORMS}
        choices |= {"bias": (True, False), "layers": (1, 2)}
        for field, allowed in choices.items():
            value = getattr(self, field)
            known = any(value == one and type(value) is type(one) for one in allowed)
            if value is not None and not known:
                raise refuse(f"{field} is {value!r}, expected one of {list(allowed)}")
        eps = self.norm_eps
        if eps is not None:
            number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
            if not number or not 0 < eps < 1:
                raise refuse(f"norm_eps is {eps!r}, expected a number between 0 and 1")
            if self.norm == "none":
                raise refuse(f"norm_eps is {eps!r}, but norm is none")
        if self.layers == 1 and self.hidden_dim is not None:
            raise refuse(f"hidden_dim is {self.hidden_dim}, but one layer has no hidden units")
        if self.layers == 1 and self.activation not in (None, "none"):
            raise refuse(f"activation is {self.activation!r}, but one layer has none")

    @property
    def projector(self) -> ProjectorSpec:
        """What its projector is, with defaults for what was not told."""
        told = {f: getattr(self, f) for f in PROJECTOR_FIELDS if getattr(self, f) is not None}
        if self.layers == 1:
            told["activation"] = "none"
        return ProjectorSpec(**told)

    def settled(self, hidden_size: int) -> ModalitySpec:
        """The same with its hidden width settled; `hidden_size` is the language model's."""
        if self.hidden_dim is not None or self.layers == 1:
            return self
        return replace(self, hidden_dim=hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` form, without the name and without unset fields."""
        return {k: v for k, v in asdict(self).items() if k != "name" and v is not None}


PROJECTOR_FIELDS = tuple(field.name for field in fields(ProjectorSpec))
_FIELDS = tuple(field.name for field in fields(ModalitySpec) if field.name != "name")


def parse_modalities(raw: Mapping[str, Any]) -> dict[str, ModalitySpec]:
    """Read `{"m1": {"dim": 768, ...}}` or `{"m1": 768}` into specs, in the given order.

    Raises:
        ModalityError: a field is missing, unknown or out of range, or two modalities share a
            token or a token id.
    """
    specs: dict[str, ModalitySpec] = {}
    for name, given in raw.items():
        told = spec_fields(name, given)
        if "dim" not in told:
            raise ModalityError(f"modality {name!r}: 'dim' (the width of a row) is missing")
        specs[name] = ModalitySpec(name=name, **told)
    for field in ("token", "token_id"):
        values = [getattr(spec, field) for spec in specs.values()]
        given = [value for value in values if value is not None]
        if len(set(given)) != len(given):
            raise ModalityError(f"two modalities share a {field}: {values}")
    return specs


def spec_fields(name: str, given: Any) -> dict[str, Any]:
    """What is told of one modality, `dim` or not: by a spec, a width, or a dict.

    Raises:
        ModalityError: it is none of these, or a field is unknown.
    """
    if isinstance(given, ModalitySpec):
        return given.to_dict()
    if isinstance(given, int) and not isinstance(given, bool):
        return {"dim": given}
    if not isinstance(given, Mapping):
        raise ModalityError(f"modality {name!r}: expected a width or a dict, got {given!r}")
    unknown = set(given) - set(_FIELDS)
    if unknown:
        raise ModalityError(
            f"modality {name!r}: unknown fields {sorted(unknown)}, expected some of {list(_FIELDS)}"
        )
    return dict(given)


_INTEGERS = ("dim", "hidden_dim", "max_rows", "token_id", "layers")


def read_field(key: str, text: str) -> Any:
    """A field of a `ModalitySpec` from how it is written on a command line or in metadata.

    Raises:
        ModalityError: it cannot be read as what the field is; whether it is allowed is not asked.
    """
    if key in _INTEGERS:
        if text.isascii() and text.isdigit():  # str.isdigit alone also takes superscripts
            return int(text)
        raise ModalityError(f"{key} is {text!r}, expected an integer")
    if key == "norm_eps":
        try:
            return float(text)
        except ValueError:
            raise ModalityError(f"{key} is {text!r}, expected a number") from None
    if key == "bias":
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ModalityError(f"{key} is {text!r}, expected true or false")
    return text


def assign_token_ids(
    specs: Mapping[str, ModalitySpec], known_tokens: Mapping[str, int], first_free_id: int
) -> dict[str, ModalitySpec]:
    """Give every modality a token id: its own, the tokenizer's, or the next one past the end.

    Args:
        specs: modalities, with or without ids.
        known_tokens: spelling to id, of the tokenizer's added tokens.
        first_free_id: `len(tokenizer)`, the first id that spells nothing yet.

    Raises:
        ModalityError: a given id contradicts the tokenizer's.
    """
    spelled = {token_id: token for token, token_id in known_tokens.items()}
    for name, spec in specs.items():
        owner = spelled.get(spec.token_id) if spec.token_id is not None else None
        if owner is not None and known_tokens.get(spec.token) is None:
            raise ModalityError(
                f"modality {name!r}: token_id {spec.token_id} is the tokenizer's {owner!r}, not "
                f"{spec.token!r}; choose a free id"
            )
    taken = {spec.token_id for spec in specs.values() if spec.token_id is not None} | set(spelled)
    assigned: dict[str, ModalitySpec] = {}
    next_id = first_free_id
    for name, spec in specs.items():
        known = known_tokens.get(spec.token)
        if known is not None and spec.token_id not in (None, known):
            raise ModalityError(
                f"modality {name!r}: token {spec.token!r} has id {known} in the tokenizer, but "
                f"token_id is {spec.token_id}"
            )
        token_id = known if known is not None else spec.token_id
        if token_id is None:
            while next_id in taken:
                next_id += 1
            token_id = next_id
            next_id += 1
        assigned[name] = replace(spec, token_id=token_id)
    return assigned


@dataclass(frozen=True)
class Expansion:
    """A prompt whose markers have been replaced by one placeholder per row.

    Attributes:
        token_ids: the expanded prompt.
        names: modality of each item, in the order of the prompt.
        counts: rows of each.
        starts: position of each one's first placeholder.
        unmarked: how many of them, the first ones, stand before the text without a marker.
    """

    token_ids: list[int]
    names: list[str]
    counts: list[int]
    starts: list[int]
    unmarked: int

    @property
    def items(self) -> list[tuple[str, int]]:
        """(modality, index among that modality's items), in the order of the prompt."""
        seen: dict[str, int] = {}
        found: list[tuple[str, int]] = []
        for name in self.names:
            index = seen.get(name, 0)
            seen[name] = index + 1
            found.append((name, index))
        return found


def expand_markers(
    token_ids: Sequence[int],
    specs: Mapping[str, ModalitySpec],
    row_counts: Mapping[str, Sequence[int]],
) -> Expansion:
    """Replace each marker by as many placeholders as its item has rows.

    Where the prompt holds no marker of a modality, that modality's items go before the text, in
    the order in which `row_counts` lists modalities and items. Cost does not grow with the length
    of the text beyond one pass.

    Args:
        token_ids: the prompt, with one placeholder id per item where a marker stands.
        specs: modalities with their token ids assigned.
        row_counts: for each modality that has items, the rows of each item.

    Raises:
        ModalityError: an unknown modality, markers without items, or more or fewer markers than
            items.
    """
    for name in row_counts:
        if name not in specs:
            raise ModalityError(f"unknown modality {name!r}; expected one of {sorted(specs)}")
    by_id = {spec.token_id: name for name, spec in specs.items()}
    if by_id.keys().isdisjoint(token_ids):
        found = []
    else:
        found = [(at, by_id[token]) for at, token in enumerate(token_ids) if token in by_id]
    seen: dict[str, int] = {}
    for _, name in found:
        seen[name] = seen.get(name, 0) + 1
    for name, markers in seen.items():
        check_marker_count(specs[name], markers, len(row_counts.get(name, ())))

    out: list[int] = []
    names: list[str] = []
    counts: list[int] = []
    starts: list[int] = []
    for name, rows in row_counts.items():
        if name not in seen and rows:
            names += [name] * len(rows)
            counts += rows
            starts += accumulate(rows[:-1], initial=len(out))
            out += [specs[name].token_id] * sum(rows)  # type: ignore[list-item]
    unmarked = len(names)
    left = {name: iter(row_counts[name]) for name in seen}
    last = 0
    for at, name in found:
        out += token_ids[last:at]
        count = next(left[name])
        names.append(name)
        counts.append(count)
        starts.append(len(out))
        out += [token_ids[at]] * count
        last = at + 1
    out += token_ids[last:] if last else token_ids
    return Expansion(out, names, counts, starts, unmarked)


def check_marker_count(spec: ModalitySpec, markers: int, items: int) -> None:
    """Refuse a prompt whose markers of one modality do not match its items.

    Raises:
        ModalityError: there is at least one marker and the counts differ.
    """
    if markers and not items:
        raise ModalityError(
            f"modality {spec.name!r}: the prompt holds {markers} {spec.token} marker(s), but no "
            f"{spec.name!r} item was given"
        )
    if markers and markers != items:
        raise ModalityError(
            f"modality {spec.name!r}: the prompt holds {markers} {spec.token} marker(s), but "
            f"{items} item(s) were given; write one marker per item, or none at all"
        )


def check_no_markers(token_ids: Iterable[int], specs: Mapping[str, ModalitySpec]) -> None:
    """Refuse a prompt without items that holds placeholder ids.

    Raises:
        ModalityError: a placeholder id is among `token_ids`.
    """
    by_id = {spec.token_id: spec for spec in specs.values() if spec.token_id is not None}
    token_ids = list(token_ids)
    if by_id.keys().isdisjoint(token_ids):
        return
    for token_id in by_id.keys() & set(token_ids):
        check_marker_count(by_id[token_id], token_ids.count(token_id), 0)
