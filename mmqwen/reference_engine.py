"""The reference model behind the pipeline: prepare a prompt, run prepared ones.

It may be used by several threads, and by several streams at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from threading import Lock, Thread, current_thread, main_thread
from typing import Any

from mmqwen.banks import BankChange
from mmqwen.sampling import check_count, check_fields
from mmqwen.scoring import Ask, Completion, Ready, score_by_transformers


class TransformersEngine:
    """The reference model behind the pipeline: one call of its `generate` at a time."""

    _ONE_TEXT: Mapping[str, Any] = {
        "n": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "output_scores": False,
        "output_logits": False,
        "output_attentions": False,
        "output_hidden_states": False,
    }
    _OBJECTS = frozenset({"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"})
    """Arguments of `generate` that are no fields of its config."""

    def __init__(
        self,
        checkpoint: str,
        device: str,
        options: Mapping[str, Any],
        banks: Mapping[str, Any] | None = None,
    ) -> None:
        import torch

        from mmqwen.hf import MultimodalQwen3ForConditionalGeneration, MultimodalQwen3Processor

        fields = dict(options)
        limit = fields.pop("max_model_len", None)
        placed = fields.get("device_map")
        if placed is not None and device != "auto":
            raise ValueError(
                f"device {device!r} beside device_map={placed!r}: the map says where each part of "
                "the model lies; leave one of them out"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if placed is None:
            check_device(device)
        self.model = MultimodalQwen3ForConditionalGeneration.from_pretrained(checkpoint, **fields)
        # Loading places what it quantises, too; accelerate refuses to move what it has placed.
        if placed is None and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)
        self.model.eval()
        self._device = _input_device(self.model)
        self.processor = MultimodalQwen3Processor.from_pretrained(checkpoint)
        if banks:
            self.processor.banks = dict(banks)
            _ = self.processor.bank_catalog  # opened now: a bad one is refused at the start
        self.tokenizer = self.processor.tokenizer
        self.max_model_len = limit or self.model.config.text_config.max_position_embeddings
        self._using = Lock()

    def prepare(self, token_ids: list[int], items: Mapping[str, Any]) -> Ready:
        """Check a prompt and expand its markers.

        Raises:
            ValueError: it cannot be served.
        """
        ids, rows = self.processor.expand(token_ids, items, self.model.dtype)
        return Ready((ids, rows), len(ids))

    def update_bank(self, name: str, file: str) -> BankChange:
        """Serve another file as a bank: prompts that were prepared have their rows already."""
        return self.processor.update_bank(name, file)

    def options(self, fields: Mapping[str, Any], *, stream: bool, full: bool = False) -> Any:
        """Arguments of transformers' `generate`.

        Args: as for `VllmEngine.options`.

        Raises:
            ValueError: a field is unknown, or asks for more than a text.
        """
        from transformers import GenerationConfig

        fields = dict(fields)
        max_tokens, temperature = fields.pop("max_tokens"), fields.pop("temperature")
        more: dict[str, Any] = {}
        if full:
            more = {"num_return_sequences": check_count({**fields, "temperature": temperature})}
            fields.pop("n", None)
        known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
        known -= {"max_new_tokens", "max_length", "do_sample"}
        check_fields(fields, known | self._OBJECTS, self._ONE_TEXT, "transformers' generate")
        if stream and (fields.get("num_beams") or 1) != 1:
            raise ValueError(
                f"num_beams={fields['num_beams']!r}: beams have no text before they end; leave "
                "stream out"
            )
        if fields.get("stop_strings"):
            fields["tokenizer"] = self.tokenizer
        fields["max_new_tokens"] = max_tokens
        fields["do_sample"] = temperature > 0
        if temperature > 0:
            fields["temperature"] = temperature
        fields.pop("n", None)
        return fields | more

    def check_lora(self, lora: Any) -> None:
        """Refuse a LoRA request, which is vLLM's.

        Raises:
            ValueError: there is one.
        """
        if lora is not None:
            raise ValueError(
                "lora_request goes with engine='vllm'; load the adapter with peft here"
            )

    def generate(self, prompts: Sequence[Ready], options: Any) -> list[str]:
        """The text of each prompt."""
        if not prompts:
            return []
        with self._using:
            new = self._run(prompts, options)
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def complete(self, prompts: Sequence[Ready], options: Any) -> list[list[Completion]]:
        """All that is known of the texts of each prompt."""
        if not prompts:
            return []
        with self._using:
            new = self._run(prompts, options).tolist()
        count = len(new) // len(prompts)
        own = [
            [self._cut(ids, options) for ids in new[at : at + count]]
            for at in range(0, len(new), count)
        ]
        asks = [
            Ask(ready, [ids for ids, _ in group]) for ready, group in zip(prompts, own, strict=True)
        ]
        return [
            [
                Completion(self.tokenizer.decode(ids, skip_special_tokens=True), ids, why, logprobs)
                for (ids, why), logprobs in zip(group, scores, strict=True)
            ]
            for group, scores in zip(own, self.score(asks), strict=True)
        ]

    def score(self, asks: Sequence[Ask], lora: None = None) -> list[list[list[float]]]:
        """For each prompt, the log-probabilities of the tokens of each of its continuations."""
        found = []
        for ask in asks:
            with self._using:
                batch = self.processor.join([ask.ready.prompt]).to(self._device)
                found.append(score_by_transformers(self.model, batch, ask.continuations))
        return found

    def _cut(self, ids: list[int], options: Mapping[str, Any]) -> tuple[list[int], str]:
        """A row of `generate`'s without what pads it, and why it ended."""
        own = self.model.generation_config
        ends = options.get("eos_token_id", own.eos_token_id)
        ends = set() if ends is None else set(ends) if isinstance(ends, list) else {ends}
        for at, token in enumerate(ids):
            if token in ends:
                return ids[: at + 1], "stop"
        pad = options.get("pad_token_id", own.pad_token_id)
        kept = len(ids)
        while kept > 1 and ids[kept - 1] == pad:
            kept -= 1
        return ids[:kept], "length" if kept == options["max_new_tokens"] else "stop"

    def stream(self, prompts: Sequence[Ready], options: Any) -> Iterator[tuple[int, str]]:
        """Pieces of text, each with its prompt's index; one prompt after the other."""
        for index, ready in enumerate(prompts):
            pieces = _pieces(self.tokenizer)
            thread = Thread(target=self._fill, args=(pieces, ready, options))
            thread.start()
            try:
                while (piece := pieces.queue.get()) is not None:
                    if isinstance(piece, BaseException):
                        raise piece
                    yield index, piece
            finally:
                pieces.closed = True
                if thread is not current_thread():  # garbage is collected in any thread
                    thread.join()

    def _fill(self, pieces: Any, ready: Ready, options: Mapping[str, Any]) -> None:
        """Generate into a streamer's queue; None ends it, after the error if there is one."""
        try:
            # In turns: who closes a stream may have the model, and waits for this thread.
            while not self._using.acquire(timeout=0.05):
                pieces.check_open()
            try:
                self._run([ready], {**options, "streamer": pieces})
            finally:
                self._using.release()
        except _StreamClosed:
            pass
        except BaseException as error:
            pieces.queue.put(error)
        finally:
            pieces.queue.put(None)

    def _run(self, prompts: Sequence[Ready], options: Mapping[str, Any]) -> Any:
        batch = self.processor.join([ready.prompt for ready in prompts]).to(self._device)
        return self.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def _input_device(model: Any) -> Any:
    """Where a model takes token ids: accelerate brings weights that it keeps elsewhere there."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else device


class _StreamClosed(Exception):
    """Nobody reads the stream any more."""


def _pieces(tokenizer: Any) -> Any:
    """A streamer of transformers' that puts text into a queue until it is closed."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        queue: SimpleQueue[Any]
        closed = False

        def check_open(self) -> None:
            # The main thread's end, too: threads that are waited for at exit would hold it up.
            if self.closed or not main_thread().is_alive():
                raise _StreamClosed

        def put(self, value: Any) -> None:
            self.check_open()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                self.queue.put(text)

    pieces = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pieces.queue = SimpleQueue()
    return pieces


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        ValueError: no such kind, none of this number, or torch was built without it.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except Exception as error:  # AssertionError, RuntimeError, ...: each backend raises its own
        raise ValueError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); choose 'auto' "
            f"or 'cpu'; torch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s)"
        ) from error
