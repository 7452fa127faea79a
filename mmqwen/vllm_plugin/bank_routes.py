"""Routes that list banks and change them, where `mmqwen serve --bank-updates FOLDER` asks for it.

`GET /v1/banks`, and `POST /v1/banks/NAME` with `{"file": PATH}`. Both demand the server's API key,
as vLLM does below /v1; they look themselves, because what they do must not depend on that.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from mmqwen.banks import BankBusyError, BankError, UnknownBankError
from mmqwen.banks.file import facts_file, keys_file
from mmqwen.vllm_plugin.bank_updates import BankUpdates
from mmqwen.vllm_plugin.compat.bank_engines import ServedEngine
from mmqwen.vllm_plugin.limits import bank_folder

TIDY_SECONDS = 0.5
"""How often it is looked whether a version that was replaced is still in use."""


def keys_of(args: Namespace) -> list[str]:
    """The API keys of a server with these flags."""
    given = [key for key in (getattr(args, "api_key", None) or ()) if key]
    variable = os.environ.get("VLLM_API_KEY")
    return given or ([variable] if variable else [])


class BankRoutes:
    """The routes, for one server.

    Args:
        folder: whose files may be served.
        keys: the server's API keys.
        client: vLLM's engine client.
        updates: the banks of its renderer.

    Raises:
        ValueError: there is no key.
    """

    def __init__(self, folder: Path, keys: list[str], client: Any, updates: BankUpdates) -> None:
        if not keys:
            raise ValueError(
                "updates of banks without an API key: whoever reaches the server could change what "
                "it serves; add --api-key, or leave --bank-updates out"
            )
        self._folder = folder
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._engine = ServedEngine(client)
        self._updates = updates
        self._tasks: set[asyncio.Task[Any]] = set()

    def attach(self, app: FastAPI) -> None:
        """Add the routes to a server's app."""
        app.add_api_route("/v1/banks", self.show, methods=["GET"])
        app.add_api_route("/v1/banks/{name}", self.update, methods=["POST"])

    async def show(self, raw_request: Request) -> dict[str, Any]:
        """The banks, with the versions that requests name now."""
        self._check_key(raw_request)
        data = [
            {
                "id": name,
                "object": "bank",
                "version": served.bank.version,
                "modality": served.spec.modality,
                "placement": served.spec.placement,
                "rows": served.bank.num_rows,
                "width": served.bank.width,
            }
            for name, served in self._updates.catalog.banks.items()
        ]
        return {"object": "list", "data": data, "replaced_in_use": self._updates.leaving}

    async def update(self, name: str, raw_request: Request) -> dict[str, Any]:
        """Serve another file as a bank, and answer when requests name it."""
        self._check_key(raw_request)
        known = self._updates.catalog.banks
        if name not in known:
            raise HTTPException(404, f"unknown bank {name!r:.80}, expected one of {sorted(known)}")
        file = self._file(await _body(raw_request))
        # A client that leaves does not end half an update.
        change = await asyncio.shield(self._start(self._run(name, file)))
        if self._updates.leaving:
            self._start(self._tidy())
        return {"object": "bank.update", **change._asdict()}

    async def _run(self, name: str, file: Path) -> Any:
        try:
            return await self._updates.update(self._engine, name, file)
        except BankBusyError as error:
            raise HTTPException(409, str(error)) from None
        except UnknownBankError as error:
            raise HTTPException(404, str(error)) from None
        except BankError as error:
            raise HTTPException(400, str(error)) from None

    async def _tidy(self) -> None:
        while self._updates.leaving:
            await asyncio.sleep(TIDY_SECONDS)
            await self._updates.let_go(self._engine)

    def _start(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)  # the event loop itself keeps none alive
        task.add_done_callback(self._tasks.discard)
        return task

    def _check_key(self, request: Request) -> None:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        same = [secrets.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(same):
            raise HTTPException(401, "banks are changed with the server's API key alone")

    def _file(self, body: Any) -> Path:
        """A file that a body names.

        Raises:
            HTTPException: another body (400); a file, or what stands beside it, that does not lie
                in the folder, wherever links lead (403); no file (400).
        """
        given = body.get("file") if isinstance(body, dict) and len(body) == 1 else None
        if not isinstance(given, str) or not given or "\0" in given:
            raise HTTPException(400, 'expected {"file": PATH}, of a file in the folder for updates')
        try:
            file = Path(self._folder, given).resolve()
            self._require_inside(file, given)
            if not file.is_file():
                raise HTTPException(400, f"{given!r:.200} is no file in the folder for updates")
            for beside in (facts_file(file), keys_file(file)):
                self._require_inside(beside.resolve(), given)
        except (OSError, RuntimeError, ValueError):
            raise HTTPException(400, f"{given!r:.200} is no path of a file") from None
        return file

    def _require_inside(self, file: Path, given: str) -> None:
        if not file.is_relative_to(self._folder):
            raise HTTPException(
                403, f"{given!r:.200} lies outside the folder of --bank-updates; put it there"
            )


async def _body(request: Request) -> Any:
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is no JSON") from None


def attach(app: FastAPI, client: Any, args: Namespace) -> None:
    """Add the routes to a server that serves our model, where its environment asks for them.

    Raises:
        ValueError: the folder is none, or the server has no API key, or reads no rows.
    """
    folder = bank_folder()
    if folder is None:
        return
    updates = getattr(getattr(client, "renderer", None), "bank_updates", None)
    if updates is None:
        raise ValueError("updates of banks: this server reads no rows; leave --bank-updates out")
    BankRoutes(folder, keys_of(args), client, updates).attach(app)
