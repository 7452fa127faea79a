"""What the pipeline gives to an engine, checked: prompts, conversations, continuations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmqwen.chat import check_parts_kept, render_chat
from mmqwen.engines import VllmEngine
from mmqwen.inputs import Prompt, check_ids, check_unicode, read_ids
from mmqwen.messages import read_messages
from mmqwen.modalities import ModalitySpec
from mmqwen.reference_engine import TransformersEngine
from mmqwen.scoring import Ask, Ready


class PromptChecker:
    """Checks all of an input, so that a bad one never reaches the engine.

    For one thread at a time, as tokenizers are.

    Args:
        engine: whose tokenizer and limits are meant.
        specs: the modalities.
        vocab_size: of the model.
    """

    def __init__(
        self,
        engine: VllmEngine | TransformersEngine,
        specs: Mapping[str, ModalitySpec],
        vocab_size: int,
    ) -> None:
        self.engine = engine
        self._specs = specs
        self._vocab_size = vocab_size

    def read_chat(self, messages: Any, template: Mapping[str, Any]) -> Prompt:
        """A conversation as a prompt, through the chat template with these arguments.

        Raises:
            ValueError: as `read_messages` and `render_chat`; or the template has left rows out.
        """
        plain, items = read_messages(messages, self._specs)
        text = check_unicode(render_chat(self.engine.tokenizer, plain, **template))
        ids = self.engine.tokenizer.encode(text, add_special_tokens=False)
        check_parts_kept(ids, self._specs, {name: len(members) for name, members in items.items()})
        return Prompt(token_ids=ids, items=items)

    def prepare(self, prompt: Prompt) -> Ready:
        """A prompt as the engine takes it.

        Raises:
            ValueError: it is empty, too long, or cannot be served.
        """
        from mmqwen.transport import as_items

        ids = prompt.token_ids
        if ids is None:
            ids = self.engine.tokenizer.encode(prompt.text)
        check_ids(ids, self._vocab_size)
        if not ids and not any(len(as_items(value, name)) for name, value in prompt.items.items()):
            raise ValueError("the prompt is empty; give text, token ids or items")
        ready = self.engine.prepare(list(ids), prompt.items)
        if ready.length >= self.engine.max_model_len:
            raise ValueError(
                f"the prompt is {ready.length} tokens long with its rows, expected fewer than "
                f"{self.engine.max_model_len} (max_model_len)"
            )
        return ready

    def ask(self, prompt: Prompt, continuations: Any) -> Ask:
        """A prompt and what may follow it.

        Raises:
            ValueError: as `prepare`; or a continuation is empty, holds a placeholder, or is too
                long for the model.
        """
        if isinstance(continuations, (str, bytes)) or not isinstance(continuations, Iterable):
            raise ValueError(
                "continuations of an input are a list of str, or of lists of token ids, got "
                f"{type(continuations).__name__}"
            )
        ready, asked = self.prepare(prompt), []
        for at, one in enumerate(continuations):
            try:
                asked.append(self._read_continuation(one, ready.length))
            except ValueError as error:
                raise ValueError(f"continuation {at}: {error}") from None
        if not asked:
            raise ValueError("no continuations of an input; give at least one")
        return Ask(ready, asked)

    def _read_continuation(self, value: Any, before: int) -> list[int]:
        if isinstance(value, str):
            ids = self.engine.tokenizer.encode(check_unicode(value), add_special_tokens=False)
        elif hasattr(value, "__len__"):
            ids = read_ids(value)
        else:
            raise ValueError(f"got {type(value).__name__}, expected a str or a list of token ids")
        check_ids(ids, self._vocab_size)
        if not ids:
            raise ValueError("it is empty; give text or token ids")
        for spec in self._specs.values():
            if spec.token_id in ids:
                raise ValueError(f"it holds {spec.token}, but rows are never said")
        if before + len(ids) >= self.engine.max_model_len:
            raise ValueError(
                f"it is {len(ids)} tokens long after {before} of the prompt, expected fewer than "
                f"{self.engine.max_model_len} in all (max_model_len)"
            )
        return list(ids)
