"""vLLM and the reference model behind the pipeline: prepare a prompt, run prepared ones.

Both engines may be used by several threads, and by several streams at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from threading import Lock, Thread, current_thread, main_thread
from typing import Any

from mmqwen.sampling import check_fields
from mmqwen.vllm_plugin import compat, register


@dataclass(frozen=True)
class Ready:
    """A checked prompt.

    Attributes:
        prompt: what the engine takes.
        length: its tokens, with one per row.
    """

    prompt: Any
    length: int


class VllmEngine:
    """`vllm.LLM` behind the pipeline.

    Whoever waits for a text drives the engine for all: a step's outputs are put into the inboxes of
    the calls to which they belong. What was left early is aborted by the next one who has the
    engine, because a stream may be collected as garbage in the middle of a step.
    """

    _ONE_TEXT: Mapping[str, Any] = {
        "n": 1,
        "best_of": 1,
        "logprobs": None,
        "prompt_logprobs": None,
        "logprob_token_ids": None,
        "prompt_logprob_token_ids": None,
        "detokenize": True,
    }

    def __init__(
        self,
        checkpoint: str,
        device: str,
        options: Mapping[str, Any],
        banks: Mapping[str, Any] | None = None,
    ) -> None:
        kind = compat.device_type()
        if device not in ("auto", kind):
            raise ValueError(
                f"device {device!r}: the vLLM that is installed runs on {kind!r}; choose "
                "engine='transformers', or install vLLM for that device (one of several GPUs is "
                "chosen by CUDA_VISIBLE_DEVICES)"
            )
        compat.leave_memory()
        from vllm import LLM

        register()
        options = dict(options)
        if banks:
            options["hf_overrides"] = {**_overrides(options), "banks": dict(banks)}
        self.llm = LLM(model=checkpoint, **options)
        self.tokenizer = self.llm.get_tokenizer()
        self.max_model_len = self.llm.model_config.max_model_len
        self._names = (f"mmqwen-{number}" for number in count())
        self._inboxes: dict[str, deque[Any]] = {}
        self._left: deque[str] = deque()
        self._using = Lock()
        self._next = Lock()  # held while waiting, so that a loop cannot overtake who waits

    def prepare(self, token_ids: list[int], items: Mapping[str, Any]) -> Ready:
        """Check a prompt and pack its rows.

        Raises:
            ValueError: it cannot be served.
        """
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if items:
            prompt["multi_modal_data"] = dict(items)
        try:
            rendered = compat.render(self.llm, prompt)
        except compat.refusal() as error:
            raise ValueError(str(error)) from error
        return Ready(rendered, len(rendered["prompt_token_ids"]))

    def options(self, fields: Mapping[str, Any], *, stream: bool) -> Any:
        """Sampling parameters, and the LoRA request or None.

        Raises:
            ValueError: a field is unknown, out of range, or asks for more than a text.
        """
        import msgspec
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        fields = dict(fields)
        lora = fields.pop("lora_request", None)
        if lora is not None and self.llm.llm_engine.vllm_config.lora_config is None:
            raise ValueError("lora_request: start the pipeline with enable_lora=True")
        known = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
        check_fields(fields, known - {"output_kind"}, self._ONE_TEXT, "vLLM's SamplingParams")
        fields.pop("best_of", None)
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        try:
            params = SamplingParams(**fields, output_kind=kind)
            # A value of a wrong type would end vLLM's engine process, which reads them this way.
            sent = msgspec.msgpack.encode(params, enc_hook=lambda _: None)
            msgspec.msgpack.decode(sent, type=SamplingParams)
        except (TypeError, msgspec.ValidationError, compat.refusal()) as error:
            raise ValueError(f"sampling fields: {error}") from error
        return params, lora

    def generate(self, prompts: Sequence[Ready], options: Any) -> list[str]:
        """The text of each prompt."""
        texts = [""] * len(prompts)
        for index, text in self.stream(prompts, options):
            texts[index] += text
        return texts

    def stream(self, prompts: Sequence[Ready], options: Any) -> Iterator[tuple[int, str]]:
        """Pieces of text, each with its prompt's index, as they come."""
        params, lora = options
        inbox: deque[Any] = deque()
        running: dict[str, int] = {}
        try:
            with self._turn() as engine:
                for index, ready in enumerate(prompts):
                    name = next(self._names)
                    self._add(engine, name, ready.prompt, params.clone(), lora)
                    self._inboxes[name] = inbox
                    running[name] = index
            while running:
                with self._turn() as engine:
                    if not inbox:
                        self._step(engine)
                    came = [inbox.popleft() for _ in range(len(inbox))]
                for output in came:
                    index = running[output.request_id]
                    if output.finished:
                        del running[output.request_id]
                    if output.outputs[0].text:
                        yield index, output.outputs[0].text
        finally:
            for name in running:  # the caller stopped early, or the engine failed
                self._inboxes.pop(name, None)
            self._left.extend(running)
            self._abort_left()

    @contextmanager
    def _turn(self) -> Iterator[Any]:
        """The engine, for one thread at a time, in the order in which they ask."""
        with self._next:
            self._using.acquire()
        try:
            self._abort(self.llm.llm_engine)
            yield self.llm.llm_engine
        finally:
            self._using.release()
            self._abort_left()

    def _abort_left(self) -> None:
        """Abort what was left early, unless someone has the engine, who will do it when done."""
        while self._left and self._using.acquire(blocking=False):
            try:
                self._abort(self.llm.llm_engine)
            finally:
                self._using.release()

    def _abort(self, engine: Any) -> None:
        names = [self._left.popleft() for _ in range(len(self._left))]
        if names:
            engine.abort_request(names)

    @staticmethod
    def _add(engine: Any, name: str, prompt: Any, params: Any, lora: Any) -> None:
        try:
            engine.add_request(name, prompt, params, lora_request=lora)
        except compat.refusal() as error:
            raise ValueError(str(error)) from error

    def _step(self, engine: Any) -> None:
        """Run one step, for all; what belongs to no call of the pipeline is dropped."""
        if not engine.has_unfinished_requests():
            raise RuntimeError("vLLM dropped a request of the pipeline: it was aborted elsewhere")
        for output in engine.step():
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.append(output)
                if output.finished:
                    del self._inboxes[output.request_id]


def _overrides(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """`hf_overrides` as a dict.

    Raises:
        ValueError: it is a function, which cannot be added to.
    """
    found = options.get("hf_overrides") or {}
    if not isinstance(found, Mapping):
        raise ValueError(
            f"hf_overrides is a {type(found).__name__}, expected a dict where banks are given; or "
            "let it set config.banks itself"
        )
    return found


class TransformersEngine:
    """The reference model behind the pipeline: one call of its `generate` at a time."""

    _ONE_TEXT: Mapping[str, Any] = {
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

    def options(self, fields: Mapping[str, Any], *, stream: bool) -> Any:
        """Arguments of transformers' `generate`.

        Raises:
            ValueError: a field is unknown, or asks for more than a text.
        """
        from transformers import GenerationConfig

        fields = dict(fields)
        max_tokens, temperature = fields.pop("max_tokens"), fields.pop("temperature")
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
        return fields

    def generate(self, prompts: Sequence[Ready], options: Any) -> list[str]:
        """The text of each prompt."""
        if not prompts:
            return []
        with self._using:
            new = self._run(prompts, options)
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

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
