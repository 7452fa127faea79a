"""Text and items to `input_ids` and packed rows, for the transformers model."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from transformers import BatchFeature, PretrainedConfig, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmqwen.banks import BankCatalog, BankChange, parse_banks
from mmqwen.chat import check_parts_kept, shape_messages
from mmqwen.checkpoint.names import MODEL_TYPE
from mmqwen.hf.configuration import MultimodalQwen3Config
from mmqwen.inputs import EMBEDDINGS_KEY, check_ids, check_unicode, read_ids, read_prompt
from mmqwen.messages import read_messages
from mmqwen.modalities import expand_markers, parse_modalities
from mmqwen.tokens import add_placeholder_tokens
from mmqwen.transport import check_items


class MultimodalBatch(BatchFeature):
    """`input_ids`, `attention_mask`, and `embeddings`: a dict from modality to its rows `[R, d]`.

    `to(device_or_dtype)` moves the rows too; a dtype is applied to floating tensors only.
    """

    def to(self, *args: Any, **kwargs: Any) -> MultimodalBatch:
        rows = self.data.get("embeddings")
        super().to(*args, **kwargs)
        if rows:
            self.data["embeddings"] = BatchFeature(dict(rows)).to(*args, **kwargs).data
        return self


class MultimodalQwen3Processor(ProcessorMixin):
    """Turns text with items of other modalities into what the model takes.

    Args:
        tokenizer: tokenizer of the text model. Placeholder tokens that it lacks are added to it.
        modalities: as in `MultimodalQwen3Config`, with `token_id`s assigned.
        chat_template: used by `apply_chat_template` instead of the tokenizer's.
        vocab_size: rows of the model's token table; ids beyond it are refused. Left out, ids beyond
            the tokenizer's are.
        banks: files of rows that prompts may name, by the banks' names; see `parse_banks`. Opened
            when a prompt first has items.

    `from_pretrained` reads the modalities, `vocab_size` and banks from a composite checkpoint's
    `config.json`; from `processor_config.json` where the processor was saved alone.

    Raises:
        ModalityError: a modality has no token id, or one that the tokenizer cannot give its token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        modalities: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        vocab_size: int | None = None,
        banks: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer is None:
            raise ValueError("a tokenizer is required")
        super().__init__(tokenizer, chat_template=chat_template)
        self.specs = parse_modalities(modalities or {})
        self.modalities = {name: spec.to_dict() for name, spec in self.specs.items()}
        self.banks = {name: bank.to_dict() for name, bank in parse_banks(banks).items()}
        add_placeholder_tokens(tokenizer, self.specs)
        self.vocab_size = vocab_size or max(tokenizer.get_vocab().values()) + 1

    @cached_property
    def bank_catalog(self) -> BankCatalog:
        """The banks, opened.

        Raises:
            BankError: as `BankCatalog`.
        """
        return BankCatalog(parse_banks(self.banks), self.specs)

    def update_bank(self, name: str, file: str | os.PathLike[str]) -> BankChange:
        """Read rows of a bank from another file; see `mmqwen.banks.update_bank`.

        Raises:
            BankError: as `BankCatalog.open_another`; nothing has changed.
        """
        began, catalog = time.monotonic(), self.bank_catalog
        new = catalog.open_another(name, file, 0)  # no pack calls it by a number
        old = catalog.banks[name].bank.version
        self.bank_catalog = catalog.replaced(new)
        self.banks = {**self.banks, name: replace(new.spec, version=None).to_dict()}
        seconds = time.monotonic() - began
        return BankChange(name, old, new.bank.version, new.bank.num_rows, seconds)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of `__init__`; a composite `config.json` is the authority on what it holds."""
        hub = ("cache_dir", "local_files_only", "revision", "token", "subfolder")
        fields, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        try:
            raw, _ = PretrainedConfig.get_config_dict(
                pretrained_model_name_or_path, **{k: kwargs[k] for k in hub if k in kwargs}
            )
        except OSError:  # a processor saved alone
            return fields, unused
        if raw.get("model_type") == MODEL_TYPE:
            config = MultimodalQwen3Config.from_dict(raw)
            fields["modalities"], fields["vocab_size"] = config.modalities, config.vocab_size
            banks = parse_banks(getattr(config, "banks", None), pretrained_model_name_or_path)
            fields["banks"] = {name: bank.to_dict() for name, bank in banks.items()}
        return fields, unused

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that `__call__` returns."""
        return ["input_ids", "attention_mask", "embeddings"]

    def __call__(  # type: ignore[override]
        self,
        text: Any = None,
        multimodal_data: Any = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> MultimodalBatch:
        """Tokenize, put one placeholder per row, and pack the rows of the batch.

        Args:
            text: one prompt or a list of them. A prompt is a str, a list of token ids, or a dict
                `{"text": ..., "multimodal_data": {"multimodal_embeddings": {"m1": [...]}}}`
                (vLLM's `prompt` and `multi_modal_data` are taken as well).
            multimodal_data: for each prompt, its items by modality: `{"m1": [item, ...]}`, with or
                without the `multimodal_embeddings` level around it. An item is a `[d]` vector or
                an `[n, d]` matrix: torch, numpy or nested lists; or `BankRows`. A list if `text` is
                a list.
            return_tensors: "pt", or None for lists of ids.
            padding: True or "longest", "max_length", or False.
            padding_side: "left" (for generation) or "right".
            max_length: length to pad to with `padding="max_length"`.
            dtype: floating dtype of the rows.
            **kwargs: passed on to the tokenizer (`add_special_tokens`, ...).

        Returns:
            `input_ids` and `attention_mask`, `[B, T]` int64; `embeddings`, for each modality that
            has items, its rows `[R, d]` in the order of prompt, then position.

        Raises:
            EmbeddingError: an item that cannot be used, or of an unknown modality.
            ModalityError: more or fewer markers than items, or markers without items.
            ValueError: no text, or text that is no Unicode; an id that is no integer, or for which
                the model has no embedding; as many data as prompts were not given; truncation was
                asked for; prompts of different lengths without padding.
        """
        if kwargs.pop("truncation", False):
            raise ValueError("truncation would cut items; shorten the text instead")
        single = isinstance(text, (str, Mapping)) or _is_ids(text)
        if text is None or not (single or isinstance(text, (list, tuple))):
            raise ValueError(f"text: expected a prompt or a list, got {type(text).__name__}")
        prompts = [text] if single else list(text)
        if single or multimodal_data is None:
            data = [multimodal_data] * len(prompts)
        elif isinstance(multimodal_data, Mapping):
            raise ValueError("text is a list, so multimodal_data must be a list, one per prompt")
        else:
            data = list(multimodal_data)
        if len(data) != len(prompts):
            raise ValueError(f"multimodal_data: got {len(data)} for {len(prompts)} prompt(s)")

        expanded = []
        for prompt, own in zip(prompts, data, strict=True):
            body, own = _open_prompt(prompt, own)
            expanded.append(self.expand(self._ids(body, kwargs), _items_of(own), dtype))
        batch = self.join(
            expanded,
            return_tensors=return_tensors,
            padding=padding,
            padding_side=padding_side,
            max_length=max_length,
        )
        if return_tensors is None and single:
            for name in ("input_ids", "attention_mask"):
                batch[name] = batch[name][0]
        return batch

    def expand(
        self, token_ids: Sequence[int], items: Mapping[str, Any], dtype: torch.dtype
    ) -> tuple[list[int], dict[str, list[torch.Tensor]]]:
        """Check one prompt's items and put one placeholder per row.

        Returns:
            The expanded ids, and each item's rows `[n, d]` by modality.

        Raises:
            EmbeddingError, ModalityError: as for `__call__`.
        """
        if isinstance(items, Mapping):
            items = self.bank_catalog.by_value(items)
        rows = check_items(items, self.specs, dtype=dtype)
        counts = {name: [len(item) for item in members] for name, members in rows.items()}
        counts = {name: lengths for name, lengths in counts.items() if lengths}
        return expand_markers(token_ids, self.specs, counts).token_ids, rows

    def join(
        self,
        expanded: Sequence[tuple[list[int], Mapping[str, Sequence[torch.Tensor]]]],
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> MultimodalBatch:
        """Make a batch of prompts that `expand` checked.

        Args:
            expanded: ids and rows of each prompt.
            return_tensors, padding, padding_side, max_length: as for `__call__`.

        Raises:
            ValueError: as for `__call__`.
        """
        packed = {
            name: [item for _, rows in expanded for item in rows.get(name, ())]
            for name in self.specs
        }
        embeddings = {name: torch.cat(items) for name, items in packed.items() if items}
        batch = self._pad([ids for ids, _ in expanded], padding, padding_side, max_length)
        if return_tensors is None:
            return MultimodalBatch({**batch, "embeddings": embeddings})
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: expected 'pt' or None, got {return_tensors!r}")
        lengths = {len(row) for row in batch["input_ids"]}
        if len(lengths) > 1:
            raise ValueError(
                f"prompts have lengths {sorted(lengths)}; pass padding=True or return_tensors=None"
            )
        tensors = {k: torch.tensor(v, dtype=torch.long) for k, v in batch.items()}
        return MultimodalBatch({**tensors, "embeddings": embeddings})

    def _ids(self, prompt: Any, kwargs: Mapping[str, Any]) -> list[int]:
        if isinstance(prompt, str):
            check_unicode(prompt)
            return self.tokenizer(prompt, return_attention_mask=False, **kwargs)["input_ids"]
        if isinstance(prompt, (list, tuple)):
            ids = read_ids(prompt)
            check_ids(ids, self.vocab_size)
            return ids
        raise ValueError(
            f"prompt: expected a str or a list of token ids, got {type(prompt).__name__}"
        )

    def _pad(
        self, sequences: list[list[int]], padding: bool | str, side: str, max_length: int | None
    ) -> dict[str, list[list[int]]]:
        if side not in ("left", "right"):
            raise ValueError(f"padding_side: expected 'left' or 'right', got {side!r}")
        if padding in (False, "do_not_pad"):
            return {"input_ids": sequences, "attention_mask": [[1] * len(s) for s in sequences]}
        width = max((len(s) for s in sequences), default=0)
        if padding == "max_length":
            if max_length is None or max_length < width:
                raise ValueError(f"max_length is {max_length}, but the longest prompt is {width}")
            width = max_length
        elif padding not in (True, "longest"):
            raise ValueError(
                f"padding: expected True, False, 'longest' or 'max_length', got {padding!r}"
            )
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id or 0  # masked out, so any id of text will do
        ids, mask = [], []
        for s in sequences:
            gap = width - len(s)
            left, right = (gap, 0) if side == "left" else (0, gap)
            ids.append([pad] * left + s + [pad] * right)
            mask.append([0] * left + [1] * len(s) + [0] * right)
        return {"input_ids": ids, "attention_mask": mask}

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """The text of one conversation or several, through the chat template.

        Args:
            conversation: messages as for `MultimodalQwen3Pipeline.chat`, or a list of such lists. A
                part `{"type": "m1", "m1": item}` becomes a marker; so does `{"type": "m1"}`, whose
                item is then given to `__call__`, and so do markers that the text spells.
            chat_template: used instead of the processor's and the tokenizer's.
            **kwargs: as for the tokenizer's `apply_chat_template`.

        Returns:
            A str, or a list for a list: items are given to `__call__` beside it. With
            `tokenize=True`, what the tokenizer returns; where parts bring their items, what
            `__call__` returns.

        Raises:
            MessageError: a part of another type, or messages that the template refuses.
            ValueError: text that is no Unicode.
            EmbeddingError, ModalityError: with `tokenize=True`, as for `__call__`.
        """
        tokenize = kwargs.pop("tokenize", False)
        template = chat_template or self.chat_template
        tools = kwargs.get("tools")
        single = not (
            isinstance(conversation, (list, tuple))
            and conversation
            and isinstance(conversation[0], (list, tuple))
        )
        shaped, items = [], []
        for messages in [conversation] if single else conversation:
            plain, own = read_messages(messages, self.specs, rows_apart=True)
            shaped.append(
                shape_messages(self.tokenizer, plain, chat_template=template, tools=tools)
            )
            items.append(own)
        if not (tokenize and any(items)):
            given = shaped[0] if single else shaped
            return self.tokenizer.apply_chat_template(
                given, chat_template=template, tokenize=tokenize, **kwargs
            )
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask is not given for messages with items")
        return_dict = kwargs.pop("return_dict", True)
        names = ("padding", "padding_side", "max_length", "truncation", "return_tensors", "dtype")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        options = {"return_tensors": None, "padding": False, **options}
        texts = self.tokenizer.apply_chat_template(
            shaped, chat_template=template, tokenize=False, **kwargs
        )
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        for sequence, own in zip(ids, items, strict=True):
            check_parts_kept(
                sequence, self.specs, {name: len(members) for name, members in own.items()}
            )
        given, data = (ids[0], items[0]) if single else (ids, items)
        batch = self(given, data, **options)
        return batch if return_dict else batch["input_ids"]


def _is_ids(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(t, Integral) and not isinstance(t, bool) for t in prompt)
    )


def _open_prompt(prompt: Any, data: Any) -> tuple[Any, Any]:
    """Split a dict into its text (or ids) and its items."""
    if not isinstance(prompt, Mapping):
        return prompt, data
    read = read_prompt(prompt)
    if read.items and data is not None:
        raise ValueError("items were given twice: in the prompt's dict and in multimodal_data")
    return (read.text if read.token_ids is None else list(read.token_ids)), read.items or data


def _items_of(data: Any) -> Mapping[str, Any]:
    if data is None:
        return {}
    if isinstance(data, Mapping) and set(data) == {EMBEDDINGS_KEY}:
        return data[EMBEDDINGS_KEY] or {}
    return data
