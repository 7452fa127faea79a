"""The high-level door: prompts with embeddings in, text out."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, overload

from mmqwen.attempts import Attempt, add_widths, attempts, joined, listed, only
from mmqwen.banks import BankChange, parse_banks
from mmqwen.checkpoint.trained import read_trained, warn_untrained
from mmqwen.engines import VllmEngine
from mmqwen.inputs import Prompt, read_prompt
from mmqwen.modalities import ModalitySpec
from mmqwen.prompt_checks import PromptChecker
from mmqwen.reference_engine import TransformersEngine
from mmqwen.sampling import check_limits
from mmqwen.scoring import Ask, Ready, Score

Engine = Literal["vllm", "transformers"]
OnError = Literal["raise", "return"]


class MultimodalQwen3Pipeline:
    """Generate text from prompts that mix text with rows of embeddings.

    Several threads may use one pipeline, and several streams may be open at once.

    Args:
        model_name: a composite checkpoint (`mmqwen build`, `mmqwen train`), or a text model
            (folder or hub id), to which projectors are added.
        device: `"auto"`, `"cpu"`, `"cuda"` (or `"cuda:N"` for the transformers engine).
        modalities: for a text model, `{"m1": 768, "m2": {"dim": 512, "max_rows": 64}}`. Left out,
            names and widths are read off the first inputs that have items, and the engine starts
            then.
        projector: for a text model, a safetensors file of trained projectors. Without one they
            are random, and a warning says so.
        banks: files of rows that inputs may name, by the banks' names, beside or in the place of
            the checkpoint's own: `{"items": FILE}` or `{"items": {"file": FILE, "placement":
            "host"}}`; see docs/banks.md.
        engine: `"vllm"` (default) or `"transformers"`.
        dtype: `"auto"`, `"float32"`, `"float16"` or `"bfloat16"`.
        row_references: with the vLLM engine, name the rows of a conversation's earlier messages
            instead of packing and sending them at each turn (`chat`); `mm_processor_cache_gb` says
            how much is kept.
        **engine_options: passed on to `vllm.LLM` (`max_model_len`, `tensor_parallel_size`, ...) or
            to `from_pretrained` (`device_map`, in the place of `device`, ...).

    Raises:
        ValueError: an unknown engine, a device that the engine cannot use, or a bank that cannot
            be served.
        FileNotFoundError: the model is not found.
    """

    def __init__(
        self,
        model_name: str | os.PathLike[str],
        device: str = "auto",
        modalities: Mapping[str, Any] | None = None,
        projector: str | os.PathLike[str] | None = None,
        *,
        banks: Mapping[str, Any] | None = None,
        engine: Engine = "vllm",
        dtype: str = "auto",
        row_references: bool = False,
        **engine_options: Any,
    ) -> None:
        if engine not in ("vllm", "transformers"):
            raise ValueError(f"engine {engine!r}, expected 'vllm' or 'transformers'")
        if row_references:
            if engine != "vllm":
                raise ValueError("row_references: vLLM keeps rows, engine='transformers' does not")
            engine_options["row_references"] = True
        self.model_name = os.fspath(model_name)
        self._device = device
        self._projector = None if projector is None else os.fspath(projector)
        self._engine_name = engine
        self._options = {"dtype": dtype, **engine_options}
        self._banks = {
            name: replace(bank, file=os.path.abspath(bank.file)).to_dict()
            for name, bank in parse_banks(banks).items()
        }
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._checker: PromptChecker | None = None
        self._closed = False
        self._reading = Lock()  # the engine starts once, and tokenizers are for one thread
        self.specs: dict[str, ModalitySpec] = {}
        self.banks: dict[str, Any] = {}
        from mmqwen.hf.configuration import is_composite

        if is_composite(self.model_name):
            if modalities is not None or projector is not None:
                raise ValueError(
                    f"{self.model_name} is a composite checkpoint with modalities and projectors "
                    "of its own; give modalities and projector for plain text models only"
                )
            self._start(self.model_name)
            warn_untrained(read_trained(self.model_name), self.specs, stacklevel=2)
        elif modalities is not None:
            self._start_built(modalities)
        elif projector is not None or self._banks:
            given = "banks are" if projector is None else "projector is"
            raise ValueError(f"{given} given without modalities; name them and their widths")

    @property
    def engine(self) -> str:
        """`"vllm"` or `"transformers"`."""
        return self._engine_name

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with the placeholder tokens.

        Raises:
            ValueError: no modalities are known yet, so that no engine has started.
        """
        return self._require().engine.tokenizer

    # -- generate -------------------------------------------------------------------------------

    @overload
    def generate(
        self, inputs: Any, *, return_full: Literal[True], **sampling: Any
    ) -> list[Any]: ...
    @overload
    def generate(
        self, inputs: str | Mapping[str, Any], *, stream: Literal[False] = ..., **sampling: Any
    ) -> str: ...
    @overload
    def generate(
        self, inputs: Sequence[Any], *, stream: Literal[False] = ..., **sampling: Any
    ) -> list[str]: ...
    @overload
    def generate(self, inputs: Any, *, stream: Literal[True], **sampling: Any) -> Iterator[Any]: ...

    def generate(
        self,
        inputs: Any,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        stream: bool = False,
        return_full: bool = False,
        on_error: OnError = "raise",
        **sampling: Any,
    ) -> Any:
        """Continue one prompt or many.

        Args:
            inputs: a str, a dict (see `mmqwen.inputs.read_prompt`), or a list of these. Text is
                taken as it is; `chat` applies the chat template.
            max_tokens: most tokens to generate.
            temperature: 0 is greedy.
            stream: yield pieces of text as they come. A stream that is closed, or collected as
                garbage, ends what it had running.
            return_full: give all that is known of each text, and `n` of them for each input.
            on_error: what to do with an input that cannot be served: `"raise"` before anything
                runs, or `"return"` the exception in its place and serve the others.
            **sampling: further fields of `vllm.SamplingParams` (and `lora_request`), or of
                transformers' `generate`; with `return_full` also `n` on either engine. Those that
                ask for what would be lost (`logprobs`, `num_return_sequences`, ...) are refused.

        Returns:
            A str for one input, a list for a list. With `return_full`, in the place of a str a
            list of `n` `mmqwen.scoring.Completion`s: text, token ids, finish reason and
            log-probabilities. With `stream`, an iterator of str for one input, of (index, str) for
            a list; exceptions that are returned come first.

        Raises:
            ValueError: an input cannot be served (`EmbeddingError`, `ModalityError`); the message
                names the modality, what was got and what was expected. Also a sampling field that
                is unknown, refused or out of range.
        """
        single, values = listed(inputs)
        fields = {"max_tokens": max_tokens, "temperature": temperature, **sampling}
        fields |= {"stream": stream, "return_full": return_full, "on_error": on_error}
        return self._serve(values, read_prompt, single, **fields)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Answer a conversation, through the model's chat template.

        Args:
            messages: `[{"role": "user", "content": [{"type": "text", "text": "What is it?"},
                {"type": "m1", "m1": rows}]}]`; content may also be a str.
            chat_template_kwargs: passed on to the template (`tools`, `enable_thinking`, ...).
            **options: as for `generate`.

        Returns:
            The answer; an iterator of pieces with `stream=True`, a list of `n` completions with
            `return_full=True`.

        Raises:
            ValueError: as for `generate`; also text that spells a placeholder token.
        """
        if not self.specs:
            raise ValueError("chat needs modalities: give them to the pipeline, or generate first")
        template = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        taken = {"tokenize", "return_dict", "return_tensors"} & template.keys()
        if taken:
            raise ValueError(f"chat_template_kwargs: {sorted(taken)} are set by the pipeline")

        def read(value: Any) -> Prompt:
            return self._require().read_chat(value, template)

        limits = {"max_tokens": 256, "temperature": 0.0}
        return self._serve([messages], read, True, **{**limits, **options})

    def score(
        self,
        inputs: Any,
        continuations: Sequence[Any],
        *,
        on_error: OnError = "raise",
        lora_request: Any = None,
    ) -> Any:
        """How probable each of some given continuations of a prompt is, for one prompt or many.

        Nothing is sampled. Continuations of one prompt share it: it is computed once.

        Args:
            inputs: as for `generate`; also `{"messages": [...]}`, a conversation as for `chat`.
            continuations: for one input a list of what may follow it, each a str or a list of
                token ids; for a list of inputs, such a list for each. A str is tokenized by itself,
                so write its leading space.
            on_error: as for `generate`.
            lora_request: vLLM's, for all inputs.

        Returns:
            For one input a list of `mmqwen.scoring.Score`s, one for each continuation, in their
            order: `logprob`, and `per_token`, which does not favour short ones. For a list of
            inputs, a list of such lists.

        Raises:
            ValueError: as for `generate`; also a continuation that is empty, holds a placeholder,
                or is too long for the model.
        """
        single, values = listed(inputs)
        asked = [continuations] if single else list(continuations)
        if len(asked) != len(values):
            raise ValueError(
                f"got {len(asked)} lists of continuations for {len(values)} inputs, expected one "
                "for each"
            )
        attempt = attempts(on_error, single)
        with self._reading:
            results = self._read(values, self._read_any, attempt)
            if all(isinstance(result, Exception) for result in results):
                return only(results, single)
            checker = self._require()
            engine = checker.engine
            lora = engine.check_lora(lora_request)
            pairs = [
                prompt if isinstance(prompt, Exception) else (prompt, after)
                for prompt, after in zip(results, asked, strict=True)
            ]
            results = attempt(lambda pair: checker.ask(*pair), pairs)
        good = [index for index, result in enumerate(results) if isinstance(result, Ask)]
        asks = [results[index] for index in good]
        for index, found in zip(good, engine.score(asks, lora), strict=True):
            results[index] = [
                Score(tokens, logprobs)
                for tokens, logprobs in zip(results[index].continuations, found, strict=True)
            ]
        return only(results, single)

    def update_bank(self, name: str, file: str | os.PathLike[str]) -> BankChange:
        """Serve another file as a bank, for all inputs that are read after this.

        Others, running ones too, finish on the rows that they began with.

        Args:
            name: the bank's.
            file: of its modality and width, a new one: not written over one that is served.

        Raises:
            BankError: there is no such bank, or the file cannot be served in its place; nothing has
                changed.
        """
        path = os.path.abspath(os.path.expanduser(file))
        return self._require().engine.update_bank(name, path)

    def close(self) -> None:
        """Free the engine and the temporary checkpoint; the pipeline cannot be used again.

        Waits for an engine that another thread is starting, which would outlive it otherwise.
        """
        self._closed = True
        with self._reading:
            self._checker = None
            self._drop_folder()

    def __enter__(self) -> MultimodalQwen3Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------

    def _serve(
        self,
        values: Sequence[Any],
        read: Callable[[Any], Prompt],
        single: bool,
        /,
        stream: bool = False,
        return_full: bool = False,
        on_error: str = "raise",
        **fields: Any,
    ) -> Any:
        """Check everything, then run what can be served."""
        if stream and return_full:
            raise ValueError("return_full gives texts when they are whole; leave stream out")
        attempt = attempts(on_error, single)
        max_tokens, temperature = check_limits(fields["max_tokens"], fields["temperature"])
        fields |= {"max_tokens": max_tokens, "temperature": temperature}
        with self._reading:
            results = self._read(values, read, attempt)
            if all(isinstance(result, Exception) for result in results):  # also: no input at all
                return joined(results, [], iter(()), single) if stream else only(results, single)
            checker = self._require()
            engine = checker.engine
            options = engine.options(fields, stream=stream, full=return_full)
            results = attempt(checker.prepare, results)
        good = [index for index, result in enumerate(results) if isinstance(result, Ready)]
        ready = [results[index] for index in good]
        if stream:
            return joined(results, good, engine.stream(ready, options), single)
        done = engine.complete(ready, options) if return_full else engine.generate(ready, options)
        for index, answer in zip(good, done, strict=True):
            results[index] = answer
        return only(results, single)

    def _read(
        self, values: Sequence[Any], read: Callable[[Any], Prompt], attempt: Attempt
    ) -> list[Any]:
        """Prompts, or why there is none; the first ones start an engine that waits for widths."""
        results = attempt(read, values)
        if self._checker is None and not self._closed:
            widths: dict[str, int] = {}
            results = attempt(lambda prompt: add_widths(prompt, widths), results)
            if widths:
                self._start_built(widths)
                warnings.warn(
                    f"modalities {widths} were read off the first inputs; their projectors "
                    "are untrained",
                    stacklevel=4,
                )
        return results

    def _read_any(self, value: Any) -> Prompt:
        """A prompt as `generate` takes it, or a conversation in a dict."""
        if isinstance(value, Mapping) and set(value) == {"messages"}:
            template = {"add_generation_prompt": True}
            return self._require().read_chat(value["messages"], template)
        return read_prompt(value)

    @property
    def _engine(self) -> VllmEngine | TransformersEngine | None:
        return None if self._checker is None else self._checker.engine

    def _require(self) -> PromptChecker:
        if self._closed:
            raise ValueError("the pipeline is closed; make a new one")
        if self._checker is None:
            raise ValueError(
                "no modalities are known yet: give modalities={...} to the pipeline, or an input "
                "that has items first"
            )
        return self._checker

    def _start_built(self, modalities: Mapping[str, Any]) -> None:
        from mmqwen.checkpoint import build_checkpoint

        self._folder = tempfile.TemporaryDirectory(prefix="mmqwen-")
        target = Path(self._folder.name) / "checkpoint"
        try:
            build_checkpoint(self.model_name, modalities, target, projector=self._projector)
            self._start(str(target))
        except BaseException:
            self._drop_folder()
            raise

    def _drop_folder(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self, checkpoint: str) -> None:
        from mmqwen.hf.configuration import MultimodalQwen3Config

        config = MultimodalQwen3Config.from_pretrained(checkpoint)
        kind = VllmEngine if self._engine_name == "vllm" else TransformersEngine
        own = parse_banks(getattr(config, "banks", None), checkpoint)
        banks = {**{name: bank.to_dict() for name, bank in own.items()}, **self._banks}
        engine = kind(checkpoint, self._device, self._options, banks)
        self.banks = banks
        self.specs = config.modality_specs
        self._checker = PromptChecker(engine, self.specs, config.vocab_size)
