"""vLLM behind the pipeline: prepare a prompt, run prepared ones.

It may be used by several threads, and by several streams at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from threading import Lock
from typing import Any

from mmqwen.banks import BankChange, update_bank
from mmqwen.named_rows import NamedRows, is_lost
from mmqwen.references import ChatRows
from mmqwen.sampling import check_count, check_fields
from mmqwen.scoring import Ask, Completion, Ready, score_by_vllm
from mmqwen.vllm_plugin import compat, register
from mmqwen.vllm_plugin.engine_config import REFERENCES_SWITCH


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
        self._named: NamedRows | None = None
        if options.pop("row_references", False):
            self._named = NamedRows()
            switch = {REFERENCES_SWITCH: True}
            options["additional_config"] = {**(options.get("additional_config") or {}), **switch}
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
        if self._named is not None and isinstance(items, ChatRows) and items.turns:
            rendered, again = self._named.render(items, lambda rows: self._render(token_ids, rows))
            return Ready(rendered, len(rendered["prompt_token_ids"]), again)
        rendered = self._render(token_ids, dict(items))
        return Ready(rendered, len(rendered["prompt_token_ids"]))

    def _render(self, token_ids: list[int], items: Mapping[str, Any]) -> Any:
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if items:
            prompt["multi_modal_data"] = items
        try:
            return compat.render(self.llm, prompt)
        except compat.refusal() as error:
            raise ValueError(str(error)) from error

    def options(self, fields: Mapping[str, Any], *, stream: bool, full: bool = False) -> Any:
        """Sampling parameters, and the LoRA request or None.

        Args:
            fields: by name.
            stream: pieces are wanted, not the whole.
            full: `complete` is called, not `generate` or `stream`; `n` may be given.

        Raises:
            ValueError: a field is unknown, out of range, or asks for more than a text.
        """
        import msgspec
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        fields = dict(fields)
        lora = self.check_lora(fields.pop("lora_request", None))
        more: dict[str, Any] = {}
        if full:
            more = {"n": check_count(fields), "logprobs": 0}
            fields.pop("n", None)
        known = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
        check_fields(fields, known - {"output_kind"}, self._ONE_TEXT, "vLLM's SamplingParams")
        fields.pop("best_of", None)
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        try:
            params = SamplingParams(**fields, **more, output_kind=kind)
            # A value of a wrong type would end vLLM's engine process, which reads them this way.
            sent = msgspec.msgpack.encode(params, enc_hook=lambda _: None)
            msgspec.msgpack.decode(sent, type=SamplingParams)
        except (TypeError, msgspec.ValidationError, compat.refusal()) as error:
            raise ValueError(f"sampling fields: {error}") from error
        return params, lora

    def check_lora(self, lora: Any) -> Any:
        """The LoRA request, which goes to vLLM as it is.

        Raises:
            ValueError: the engine was started without LoRA.
        """
        if lora is not None and self.llm.llm_engine.vllm_config.lora_config is None:
            raise ValueError("lora_request: start the pipeline with enable_lora=True")
        return lora

    def generate(self, prompts: Sequence[Ready], options: Any) -> list[str]:
        """The text of each prompt."""
        texts = [""] * len(prompts)
        for index, text in self.stream(prompts, options):
            texts[index] += text
        return texts

    def stream(self, prompts: Sequence[Ready], options: Any) -> Iterator[tuple[int, str]]:
        """Pieces of text, each with its prompt's index, as they come."""
        params, lora = options
        for index, output in self.outputs([(r.prompt, params, r.with_rows) for r in prompts], lora):
            if output.outputs[0].text:
                yield index, output.outputs[0].text

    def complete(self, prompts: Sequence[Ready], options: Any) -> list[list[Completion]]:
        """All that is known of the texts of each prompt."""
        params, lora = options
        found: list[list[Completion]] = [[] for _ in prompts]
        for index, output in self.outputs([(r.prompt, params, r.with_rows) for r in prompts], lora):
            for one in output.outputs:
                ids = list(one.token_ids)
                logprobs = [
                    row[token].logprob for row, token in zip(one.logprobs, ids, strict=True)
                ]
                found[index].append(Completion(one.text, ids, one.finish_reason, logprobs))
        return found

    def score(self, asks: Sequence[Ask], lora: Any = None) -> list[list[list[float]]]:
        """For each prompt, the log-probabilities of the tokens of each of its continuations."""
        return score_by_vllm(self, asks, lora)

    def outputs(
        self, requests: Sequence[tuple[Any, Any, Any]], lora: Any
    ) -> Iterator[tuple[int, Any]]:
        """vLLM's outputs, each with its request's index, as they come.

        Args:
            requests: prompts as `prepare` renders them, each with its sampling parameters, and what
                makes it with all rows, or None.
            lora: LoRA request of all of them, or None.
        """
        inbox: deque[Any] = deque()
        running: dict[str, int] = {}
        try:
            with self._turn() as engine:
                for index, (prompt, params, _) in enumerate(requests):
                    name = next(self._names)
                    self._add(engine, name, prompt, params.clone(), lora)
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
                    again = requests[index][2]
                    if again is not None and is_lost(output):
                        with self._turn() as engine:
                            name = next(self._names)
                            self._add(engine, name, again(), requests[index][1].clone(), lora)
                            self._inboxes[name] = inbox
                            running[name] = index
                        continue
                    yield index, output
        finally:
            for name in running:  # the caller stopped early, or the engine failed
                self._inboxes.pop(name, None)
            self._left.extend(running)
            self._abort_left()

    def update_bank(self, name: str, file: str) -> BankChange:
        """Serve another file as a bank; see `mmqwen.banks.update_bank`."""
        with self._turn():
            return update_bank(self.llm, name, file)

    @contextmanager
    def _turn(self) -> Iterator[Any]:
        """The engine, for one thread at a time, in the order in which they ask."""
        with self._next:
            self._using.acquire()
        try:
            self._abort(self.llm.llm_engine)
            self.llm.llm_engine.renderer.let_banks_go(self.llm)
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
