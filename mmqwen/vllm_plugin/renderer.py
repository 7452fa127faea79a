"""vLLM's HF renderer, plus what this package's models need; other models see no difference."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from mmqwen.banks import BankCatalog, BankChange, UnknownBankError
from mmqwen.banks.catalog import Life
from mmqwen.banks.rows import BankRows
from mmqwen.chat import check_parts_kept
from mmqwen.messages import MessageError, read_messages, wire_characters
from mmqwen.misplaced import misplaced_rows
from mmqwen.modalities import ModalityError, ModalitySpec, check_no_markers
from mmqwen.references import ChatRows, RowsMissing, Signer, read_secret
from mmqwen.tokens import add_placeholder_tokens
from mmqwen.transport import EmbeddingError
from mmqwen.vllm_plugin import compat
from mmqwen.vllm_plugin.bank_updates import BankUpdates
from mmqwen.vllm_plugin.compat import processor_cache
from mmqwen.vllm_plugin.compat.bank_engines import OfflineEngine, run_offline
from mmqwen.vllm_plugin.compat.renderer import HookedRenderer
from mmqwen.vllm_plugin.engine_config import settle_references
from mmqwen.vllm_plugin.held_packs import HeldPacks
from mmqwen.vllm_plugin.limits import wire_limits
from mmqwen.vllm_plugin.metrics import count_accepted, count_refusal, prepare
from mmqwen.vllm_plugin.modality_table import is_ours, modality_table
from mmqwen.vllm_plugin.processing import Accepted
from mmqwen.vllm_plugin.references import LEDGER, LOST, References
from mmqwen_kernels.native import select_native

logger = init_logger("vllm.mmqwen.renderer")

DECODE_INLINE = 256 * 1024
"""Most characters of base64 that are decoded on the server's event loop, which they hold up for
about 0.1 ms (benchmarks/bench_server.py); longer ones go to a thread."""

RENDER_INLINE = 256 * 1024
"""Most bytes of rows that are packed on the server's event loop; more go to vLLM's one thread for
items, where copying and hashing let the loop go on. The way to a thread and back alone took 90 to
120 us of CPU time on a busy two-core machine (2026-11-26); benchmarks/bench_inline.py measures
both ways by size."""

_FROM_CHAT = "_mmqwen_chat"
"""Key of a rendered prompt whose markers all stand for parts."""


class MultimodalQwen3Renderer(HookedRenderer):
    """Takes rows as chat parts, and refuses placeholders without items.

    vLLM would take a placeholder without items for plain text.
    """

    def __init__(self, config: Any, tokenizer: Any) -> None:
        self._specs: dict[str, ModalitySpec] = {}
        self._other_kinds: set[str] = set()
        self._references: References | None = None
        self.bank_updates: BankUpdates | None = None
        if is_ours(config.model_config):
            self._specs = modality_table(config.model_config)
            self._limits = wire_limits()
            if getattr(config.model_config, "enable_prompt_embeds", False):
                self._other_kinds.add("prompt_embeds")
            if tokenizer is not None:
                add_placeholder_tokens(tokenizer, self._specs)
            helper = select_native()
            state = "in use" if helper.in_use else "not in use, Python packs rows"
            logger.info("Native helper: %s (%s)", state, helper.reason)
            prepare(self._specs, helper.in_use)
            compat.guard_batch(partial(_look_at_line, self._specs))
        super().__init__(config, tokenizer)
        if self._specs and self.mm_processor is not None:  # None: --language-model-only
            self._start_references(config)
            named = self._references is not None
            self.mm_processor.hash_content = named or reuses_rows(config)
            info = self.mm_processor.info
            self.bank_updates = BankUpdates(
                lambda: info.banks, partial(setattr, info, "banks"), self._forget_bank
            )

    def _start_references(self, config: Any) -> None:
        settled = settle_references(config)
        if not settled["capacity"]:
            return
        held = HeldPacks(settled["capacity"], keep=not settled["engine_half"])
        if settled["engine_half"]:
            half = processor_cache.SenderHalf(held)
            processor_cache.use_sender_half(self, half)
            processor_cache.raise_lost(LOST)
        self._references = References(
            self._specs,
            Signer(self._specs, read_secret()),
            held,
            config.model_config.max_model_len,
        )
        logger.info(
            "Rows by reference: up to %d bytes of rows are kept in the %s",
            held.capacity,
            "front end" if held.keep else "engine",
        )

    def update_bank(self, llm: Any, name: str, file: Any) -> BankChange:
        """See `mmqwen.banks.update_bank`; of the `vllm.LLM` whose renderer this is."""
        if self.bank_updates is None:
            raise UnknownBankError(f"unknown bank {name!r:.80}, this model serves no rows")
        change: BankChange = run_offline(self.bank_updates.update(OfflineEngine(llm), name, file))
        return change

    def let_banks_go(self, llm: Any) -> None:
        """Drop replaced versions of banks that nothing names any more."""
        if self.bank_updates is not None and self.bank_updates.leaving:
            run_offline(self.bank_updates.let_go(OfflineEngine(llm)))

    def _forget_bank(self, life: Life) -> None:
        """No token stands for rows of a version that is replaced: they are asked for again."""
        if self._references is not None:
            self._references.held.forget(life)

    def clear_mm_cache(self) -> None:
        super().clear_mm_cache()
        if self._references is not None:
            self._references.held.clear()

    # -- chat -----------------------------------------------------------------------------------

    def render_messages(self, messages: Any, params: Any) -> Any:
        if not self._specs:
            return super().render_messages(messages, params)
        with _refusals_counted():
            plain, items = self._read([compat.parts_of(message) for message in messages])
        conversation, prompt = super().render_messages(plain, params)
        return conversation, _with_items(prompt, items)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        if not self._specs:
            return await super().render_messages_async(messages, params)
        with _refusals_counted():
            parts = [compat.parts_of(message) for message in messages]
            if wire_characters(parts) <= DECODE_INLINE:
                plain, items = self._read(parts)
            else:
                plain, items = await self.in_a_thread(self._read, parts)
        conversation, prompt = await super().render_messages_async(plain, params)
        return conversation, _with_items(prompt, items)

    def _read(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], ChatRows]:
        plain, items = read_messages(
            messages,
            self._specs,
            self._limits,
            other_kinds=self._other_kinds,
            references=self._references is not None,
        )
        for name, members in items.items():
            for item in members:
                if item is None and items.tokens:
                    continue  # `_PartReader` lets none through but those that a token stands for
                if not isinstance(item, (torch.Tensor, np.ndarray, BankRows)):
                    raise MessageError(
                        f"a part of type {name!r} holds a tensor, an array or BankRows, got "
                        f"{type(item).__name__}; over HTTP send {name + '_embeds'!r} parts",
                        "part",
                    )
        return plain, items

    # -- prompts as users hand them over --------------------------------------------------------

    def render_prompts(self, prompts: Any) -> Any:
        self._check_fields(prompts)
        return super().render_prompts(prompts)

    async def render_prompts_async(self, prompts: Any) -> Any:
        self._check_fields(prompts)
        return await super().render_prompts_async(prompts)

    def _check_fields(self, prompts: Any) -> None:
        """Refuse rows where vLLM would not look for them."""
        if not self._specs:
            return
        with _refusals_counted():
            for prompt in prompts:
                if isinstance(prompt, Mapping):
                    check_prompt_fields(prompt, self._specs)

    def check_embeds(self, prompt: Any) -> None:
        """Refuse rows beside embeddings of text, of which vLLM serves one."""
        if self._specs and prompt.get("multi_modal_data"):
            with _refusals_counted():
                raise MessageError(
                    "one prompt has both rows and 'prompt_embeds', of which vLLM serves one; "
                    "send rows for all, or put the embeddings of text into text",
                    "misplaced",
                )

    def is_small(self, prompt: Any) -> bool:
        """Whether packing takes less than handing it to a thread; see `RENDER_INLINE`."""
        if not self._specs:
            return False
        return _bytes_of(prompt.get("multi_modal_data") or {}) <= RENDER_INLINE

    # -- every prompt ---------------------------------------------------------------------------

    def tokens_looked_at(self, prompt: Any) -> AbstractContextManager[None]:
        """Check the prompt first; count what is refused then and after."""
        if not self._specs:
            return nullcontext()
        counted = _refusals_counted()
        with counted:
            self._check(prompt)
        return counted

    def pack(self, prompt: Any, mm_data: Any, dry: bool = False) -> Any:
        """Packs, without what serves other processors: ids, timing, cache statistics.

        A client's `multi_modal_uuids` are not looked at: they could name another client's rows.
        """
        if not self._specs or isinstance(prompt, str):
            return None
        accepted: list[Accepted] = []
        pack = partial(self._pack_rows, accepted, banks=self.get_mm_processor().info.banks)
        if self._references is not None and isinstance(mm_data, ChatRows) and mm_data.turns:
            processed = self._references.render(prompt, mm_data, pack, dry=dry)
        else:
            processed = pack(prompt, mm_data)
        count_accepted(accepted)
        return processed

    def _pack_rows(
        self, accepted: list[Accepted], prompt: Any, mm_data: Any, banks: BankCatalog | None = None
    ) -> Any:
        """A prompt, or a stretch of one, whose rows came with it; what is accepted is noted."""
        processed, found = self.get_mm_processor().process(prompt, mm_data, banks)
        accepted += found
        return processed

    def _check(self, prompt: Any) -> None:
        """Refuse placeholders without items, and parts whose marker the chat template left out."""
        if prompt.get("mm_processor_kwargs"):
            raise MessageError(
                f"mm_processor_kwargs {sorted(prompt['mm_processor_kwargs'])!r:.60}: rows have no "
                "processor that takes options; give items as 'multi_modal_data', and no options",
                "misplaced",
            )
        items: Mapping[str, Any] = prompt.get("multi_modal_data") or {}
        if isinstance(items, ChatRows):
            items.tenant = prompt.get("cache_salt")
        token_ids = prompt["prompt_token_ids"]
        if not items:
            check_no_markers(token_ids, self._specs)
        elif prompt.pop(_FROM_CHAT, False):
            counts = {name: len(members) for name, members in items.items()}
            check_parts_kept(token_ids, self._specs, counts)


def _look_at_line(specs: Mapping[str, ModalitySpec], line: Any) -> MessageError | None:
    from mmqwen.vllm_plugin.door import look_at_line  # with FastAPI, which batches load anyway

    return look_at_line(line, specs)


def check_prompt_fields(prompt: Mapping[str, Any], specs: Mapping[str, ModalitySpec]) -> None:
    """Refuse a prompt dict whose rows vLLM would pass over.

    Raises:
        MessageError: a field that seems to hold rows and is none of vLLM's; `multi_modal_data` that
            is no dict; `multi_modal_uuids` in the place of rows.
    """
    found = misplaced_rows(prompt, specs, compat.prompt_fields())
    data = prompt.get("multi_modal_data")
    if found is not None:
        problem = f"{found!r:.60} is no field of a prompt, what it holds would be dropped"
    elif data is not None and not isinstance(data, Mapping):
        problem = f"'multi_modal_data' is a dict from modality to items, got {type(data).__name__}"
    elif not data and prompt.get("multi_modal_uuids"):
        problem = "'multi_modal_uuids' without items: rows are not looked up by uuid"
    else:
        return
    raise MessageError(
        f"{problem}; give items as {{'prompt': ..., 'multi_modal_data': {{{next(iter(specs))!r}: "
        "[...]}}",
        "misplaced",
    )


def reuses_rows(config: Any) -> bool:
    """Whether anything in vLLM looks for a pack of an earlier request, or of another engine."""
    return bool(config.cache_config.enable_prefix_caching or config.kv_transfer_config is not None)


def _with_items(prompt: Any, items: ChatRows) -> Any:
    if items:
        for name, members in (prompt.get("multi_modal_data") or {}).items():
            items.setdefault(name, members)
        prompt["multi_modal_data"] = items
        prompt[_FROM_CHAT] = True
        ledger = LEDGER.get()
        if ledger is not None:
            ledger.conversations.append(items)
    return prompt


def _bytes_of(items: Mapping[str, Any]) -> int:
    """Bytes of the rows that a prompt brings, where its items are a list of tensors or arrays."""
    total = 0
    for members in items.values():
        if not isinstance(members, list):
            return sys.maxsize
        for item in members:
            total += 0 if item is None else getattr(item, "nbytes", sys.maxsize)
    return total


class _RefusalsCounted(AbstractContextManager[None]):
    """Log and count refusals. Messages repeat at most some characters of a caller's own text."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, RowsMissing):  # part of the protocol, and counted where it is found
            logger.info("Asked for rows again: %s", error)
        elif isinstance(error, (EmbeddingError, ModalityError)):
            count_refusal(getattr(error, "reason", "markers"))
            logger.warning("Refused a request: %s", error)


@cache
def _refusals_counted() -> _RefusalsCounted:
    """One for all: it keeps nothing, and a generator's context costs a request 1.5 us each."""
    return _RefusalsCounted()
