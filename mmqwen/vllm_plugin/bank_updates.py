"""Banks changed while they are served: a new version beside the old, which goes when it is unused.

No worker ever swaps rows. A version has a number of its own, by which packs call it: the new one is
loaded under a free number while requests go on with the old, then the front end names the new one
in all requests to come. See docs/adr/0009-banks.md.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from threading import Lock
from typing import Any, Protocol

from vllm.logger import init_logger

from mmqwen.banks.catalog import BankCatalog, Life, ServedBank
from mmqwen.banks.file import BankBusyError, BankError
from mmqwen.banks.update import BankChange
from mmqwen.vllm_plugin.bank_worker import BankWorker
from mmqwen.vllm_plugin.engine_config import BANK_WORKER
from mmqwen.vllm_plugin.metrics import count_bank_update

logger = init_logger("vllm.mmqwen.banks")


class Engine(Protocol):
    """The engine, or engines, behind a front end; see `compat/bank_engines.py`.

    Attributes:
        settle_seconds: after which an engine has heard of the end of a request that is no longer
            live here.
    """

    settle_seconds: float

    @property
    def worker_extension(self) -> str:
        """What vLLM mixes into its workers, or ""."""

    async def call(self, method: str, *args: Any) -> list[Any]:
        """What a method returns in each worker of each engine, run between two steps."""

    async def in_a_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function returns, without holding up requests."""

    def live(self) -> set[str]:
        """Requests that the engine has, by name."""


@dataclass
class _Leaving:
    """A version that no new request names.

    Attributes:
        number: by which packs call it.
        name: of the bank.
        life: of the version: there as long as this process may hand over a pack that names it.
        waiting: once it is not, those of the requests that were live then, and still are.
        quiet: since when there have been none.
        dropping: whether workers are being told.
    """

    number: int
    name: str
    life: weakref.ref[Life]
    waiting: set[str] | None = None
    quiet: float | None = None
    dropping: bool = False


class BankUpdates:
    """The banks of one front end.

    Args:
        get: the catalog by which prompts are read.
        put: puts another in its place.
        forget: is told of a version that stays no more: what is kept of it goes.
    """

    def __init__(
        self,
        get: Callable[[], BankCatalog],
        put: Callable[[BankCatalog], None],
        forget: Callable[[Life], None],
    ) -> None:
        self._get = get
        self._put = put
        self._forget = forget
        self._leaving: list[_Leaving] = []
        self._busy = Lock()

    @property
    def catalog(self) -> BankCatalog:
        """The banks as requests see them now."""
        return self._get()

    @property
    def leaving(self) -> int:
        """How many versions that new requests do not name are still loaded."""
        return len(self._leaving)

    async def update(self, engine: Engine, name: str, file: str | os.PathLike[str]) -> BankChange:
        """Serve another file as a bank: for all requests that are read after this.

        Those read before finish on the version that they began with.

        Raises:
            UnknownBankError: there is no such bank.
            BankBusyError: a bank is being updated.
            BankError: the file cannot be served in the bank's place; nothing has changed.
        """
        if not self._busy.acquire(blocking=False):
            raise BankBusyError(
                f"bank {name!r:.80}: an update of a bank is running, expected one at a time; ask "
                "again when it is done"
            )
        try:
            began = time.monotonic()
            await self.let_go(engine)
            try:
                old, new = await self._load(engine, name, file)
            except BankError:
                count_bank_update("refused")
                raise
            seconds = time.monotonic() - began
            await self.let_go(engine)
        finally:
            self._busy.release()
        count_bank_update("done")
        change = BankChange(name, old, new.bank.version, new.bank.num_rows, seconds)
        logger.info(
            "Bank %r: version %.16s -> %.16s, %d rows, %.2f s",
            name, change.old, change.new, change.rows, seconds,
        )  # fmt: skip
        return change

    async def _load(
        self, engine: Engine, name: str, file: str | os.PathLike[str]
    ) -> tuple[str, ServedBank]:
        catalog = self._get()
        if catalog.banks and not _loads_banks(engine.worker_extension):
            raise BankError(
                f"bank {name!r:.80}: got worker_extension_cls {engine.worker_extension!r}, by "
                "which no worker loads banks; expected none, or a class that inherits from "
                f"{BANK_WORKER}"
            )
        taken = {served.number for served in catalog.banks.values()}
        taken |= {version.number for version in self._leaving}
        number = min(set(range(len(taken) + 1)) - taken)
        new = await engine.in_a_thread(catalog.open_another, name, file, number)
        old = catalog.banks[name]
        version = old.bank.version
        if new.bank.version == version:  # the same rows; its keys may be others
            new = replace(old, spec=new.spec, bank=new.bank)
            self._put(catalog.replaced(new))
            return version, new
        try:
            await self._load_everywhere(engine, new)
        except BaseException:
            await engine.call("mmqwen_drop_bank", number)
            raise
        self._put(catalog.replaced(new))
        self._leaving.append(_Leaving(old.number, name, weakref.ref(old.life)))
        return version, new

    async def _load_everywhere(self, engine: Engine, new: ServedBank) -> None:
        """Load a version in all workers, some rows between two steps.

        Raises:
            BankError: one of them cannot.
        """
        fields = {"name": new.spec.name, **new.spec.to_dict()}
        while True:
            answers = await engine.call("mmqwen_load_bank", new.number, fields)
            wrong = dict.fromkeys(error for _, error in answers if error)
            if wrong:
                told = f"bank {new.spec.name!r}: "
                raise BankError(told + "; ".join(text.removeprefix(told) for text in wrong))
            if all(done for done, _ in answers):
                return

    async def let_go(self, engine: Engine) -> None:
        """Drop the versions that no request can name any more, beside an update too."""
        for version in list(self._leaving):
            if version.dropping:
                continue
            life = version.life()
            if life is not None:
                self._forget(life)
                del life
            if version.life() is not None:
                version.waiting = version.quiet = None
                continue
            # What was handed over while it was alive is live now, or was.
            live = engine.live()
            version.waiting = live if version.waiting is None else version.waiting & live
            if version.waiting:
                continue
            now = time.monotonic()
            version.quiet = now if version.quiet is None else version.quiet
            if now - version.quiet >= engine.settle_seconds:
                version.dropping = True  # its number is not free before the call is done
                try:
                    await engine.call("mmqwen_drop_bank", version.number)
                except BaseException:
                    version.dropping = False
                    raise
                self._leaving.remove(version)
                logger.info("Bank %r: a version that no request names was let go", version.name)


def _loads_banks(worker_extension: str) -> bool:
    """Whether a class that vLLM mixes into its workers is `BankWorker`, or inherits from it."""
    module, _, name = worker_extension.rpartition(".")
    return bool(module) and issubclass(getattr(import_module(module), name), BankWorker)
