"""Pinned memory that is used again, and the stream that brings a step's tables and rows over.

Where the current stream still has work, copies run on one of their own beside it: a copy of 4 KiB
takes 9 us of the stream that it stands in, one of 1 MiB 32, one of 8 MiB 260, and none of it where
it stands in another (H100, PCIe, 2026-11-24). Where it has none, there is nothing to run beside,
and the second stream would only cost the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

SMALLEST_BYTES = 1 << 13
WHOLE_BYTES = 1 << 16
"""Up to this size a buffer is copied whole: a slice of it costs the host more than the bytes."""


class Staging:
    """One pinned buffer of `nbytes` bytes. `bytes` is its memory as numpy sees it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.bytes: np.ndarray = self.pinned.numpy()
        self.copied = torch.cuda.Event()


class Uploader:
    """Lends staging buffers and copies them to one device.

    A buffer is lent again once its copy has run. Buffers have sizes of powers of two, so that those
    of earlier steps serve later ones; as many are kept as were ever in flight at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._idle: dict[int, deque[Staging]] = {}
        self._streams: dict[Any, torch.cuda.Stream] = {}

    def lend(self, nbytes: int) -> Staging:
        """A buffer of at least `nbytes` bytes.

        Raises:
            RuntimeError: the current stream is being captured; what the host plans cannot be.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("rows are planned on the host: call plan_rows before capturing")
        size = max(SMALLEST_BYTES, 1 << (nbytes - 1).bit_length())
        idle = self._idle.setdefault(size, deque())
        try:
            staging = idle.popleft()
        except IndexError:
            return Staging(size)
        if staging.copied.query():
            return staging
        idle.appendleft(staging)
        return Staging(size)

    def upload(
        self, staging: Staging, nbytes: int, complete: Callable[[int], None]
    ) -> torch.Tensor:
        """The first `nbytes` bytes on the device, uint8, safe to read on the current stream.

        Args:
            staging: what `lend` gave; it goes back.
            nbytes: how many of its bytes to copy, at least.
            complete: called with the device address of the copy, to write what depends on it.
        """
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self.upload(staging, nbytes, complete)
        current = self._current_stream()
        source = staging.pinned
        if staging.nbytes > WHOLE_BYTES:
            source = source[:nbytes]
        beside = not current.query()
        if beside:
            torch.cuda.set_stream(self._stream)
        try:
            # Allocated on the copying stream: memory freed by the current one may still be in use.
            moved = torch.empty(source.numel(), dtype=torch.uint8, device=self._device)
            complete(moved.data_ptr())
            moved.copy_(source, non_blocking=True)
            staging.copied.record(self._stream if beside else current)
        finally:
            if beside:
                torch.cuda.set_stream(current)
        if beside:
            current.wait_event(staging.copied)
            moved.record_stream(current)
        self._idle[staging.nbytes].append(staging)
        return moved

    def _current_stream(self) -> torch.cuda.Stream:
        """`torch.cuda.current_stream`, which makes a new object each time: 6 us on a slow CPU."""
        key = torch._C._cuda_getCurrentStream(self._device.index)
        found = self._streams.get(key)
        if found is None:
            found = self._streams[key] = torch.cuda.current_stream(self._device)
        return found


uploader = cache(Uploader)
"""A device's own."""
