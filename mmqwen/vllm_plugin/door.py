"""A look at each request's fields: rows where nothing reads them are refused, not dropped.

vLLM's request models accept fields that they do not know, and skip them. Over HTTP `Door` looks, in
the file of a batch `look_at_line`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from fastapi import FastAPI, HTTPException, Request
from vllm.logger import init_logger

from mmqwen.messages import MessageError
from mmqwen.misplaced import misplaced_rows
from mmqwen.modalities import ModalitySpec
from mmqwen.vllm_plugin import bank_routes, compat
from mmqwen.vllm_plugin.metrics import count_refusal
from mmqwen.vllm_plugin.modality_table import is_ours, modality_table

logger = init_logger("vllm.mmqwen.door")

READ = frozenset({"messages", "prompt", "input", "multi_modal_uuids"})
"""Fields that are left to whoever reads them. `multi_modal_uuids` name rows and hold none: what a
client calls its rows is never looked at."""

OPTIONS = frozenset({"mm_processor_kwargs", "media_io_kwargs"})
"""Fields of vLLM's for processors that we do not have: read, but never for rows."""


class Door:
    """An endpoint plugin of vLLM's: it puts a check into the routes that are there.

    It adds none of its own but those of banks, where they are asked for.
    """

    name = "mmqwen"
    required_tasks = None

    def __init__(self) -> None:
        self._specs: dict[str, ModalitySpec] = {}
        self._declared: dict[str, frozenset[str]] = {}
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Run the check where vLLM checks that a request is JSON."""
        self._app = app
        self._declared = {
            path: frozenset(_fields_of(_body_of(route)))
            for route in app.routes
            if (path := getattr(route, "path", None)) is not None
        }
        vllms = compat.json_request_check()

        async def check_json(raw_request: Request) -> None:
            await vllms(raw_request)
            if self._specs:
                await self._check(raw_request)

        app.dependency_overrides[vllms] = check_json

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Learn which model is served; other models see no difference."""
        config = getattr(engine_client, "model_config", None)
        if config is not None and is_ours(config):
            self._specs = modality_table(config)
            if self._app is not None:
                bank_routes.attach(self._app, engine_client, args)

    async def _check(self, request: Request) -> None:
        try:
            body = await request.json()  # read already, and kept by the request
        except (ValueError, RecursionError):
            return  # not JSON, which the route says better
        if not isinstance(body, dict):
            return
        path = getattr(request.scope.get("route"), "path", request.url.path)
        # A route that takes any body (/invocations) hands it to one of the others.
        declared = self._declared.get(path) or frozenset().union(*self._declared.values())
        message = _misplaced(body, self._specs, declared, f"a request to {path}")
        if message is not None:
            raise HTTPException(400, message)


def look_at_line(line: Any, specs: Mapping[str, ModalitySpec]) -> MessageError | None:
    """Why a line of `vllm run-batch` is refused; None where no rows are misplaced in it.

    Args:
        line: vLLM's model of it, with `url` and `body`.
        specs: the modalities.
    """
    message = None
    for model, where in ((line, "a line of a batch"), (line.body, f"a batch's {line.url}")):
        fields = {**vars(model), **(getattr(model, "model_extra", None) or {})}
        message = message or _misplaced(fields, specs, _fields_of(type(model)), where)
    return None if message is None else MessageError(message, "misplaced")


def _misplaced(
    fields: Mapping[str, Any],
    specs: Mapping[str, ModalitySpec],
    declared: Iterable[str],
    where: str,
) -> str | None:
    """What to answer to rows in a field that is not `declared`, counted and logged."""
    found = misplaced_rows(fields, specs, READ.union(declared) - OPTIONS)
    if found is None:
        return None
    part = next(iter(specs)) + "_embeds"
    message = (
        f"{found!r:.60} in {where}: nothing reads rows there, what it holds would be dropped; send "
        "each item to /v1/chat/completions as a part of a message's content, "
        f"{{'type': {part!r}, {part!r}: {{'data': ..., 'dtype': ..., 'shape': ...}}}}"
    )
    count_refusal("misplaced")
    logger.warning("Refused a request: %s", message)
    return message


def _body_of(route: Any) -> Any:
    """What a route's body is read as."""
    field = getattr(route, "body_field", None)
    return getattr(getattr(field, "field_info", None), "annotation", None)


def _fields_of(body: Any) -> Iterable[str]:
    """Names of what a body may hold, for a union those of each of its models."""
    pending = [body]
    while pending:
        annotation = pending.pop()
        pending.extend(get_args(annotation))
        for name, field in getattr(annotation, "model_fields", {}).items():
            yield name
            if field.alias:
                yield field.alias
