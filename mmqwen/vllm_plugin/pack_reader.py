"""A worker's packs: where their rows lie, and rows of zeros for what is no pack of its model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from vllm.logger import init_logger

from mmqwen.modalities import ModalitySpec
from mmqwen.pack_slices import find_rows
from mmqwen.packs import PackError, blank_directory, open_pack
from mmqwen.vllm_plugin.banks import ResidentBanks
from mmqwen_kernels import HostRows

logger = init_logger(__name__)


class PackReader:
    """Reads the packs that reach a worker.

    What is no pack of this model's rows can only come through a door that bypasses the processor.
    It is logged and read as rows of zeros: raising here would end the engine, and with it every
    other request.

    Args:
        specs: the model's modalities.
        banks: the worker's.
        dtype: the model's.
        max_model_len: rows of zeros for a pack that does not tell its own number.
    """

    def __init__(
        self,
        specs: Mapping[str, ModalitySpec],
        banks: ResidentBanks,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        self._names = list(specs)
        self.widths = [spec.dim for spec in specs.values()]
        """Of each modality's rows, by its index."""
        self._banks = banks
        self._dtype = dtype
        self._max_model_len = max_model_len

    def open(self, pack: object) -> torch.Tensor:
        """The directory `[rows, 2]` of a pack, int64, on the host."""
        if isinstance(pack, (list, tuple)) and len(pack) == 1:
            pack = pack[0]
        try:
            if not isinstance(pack, torch.Tensor):
                raise PackError(f"expected a tensor, got {type(pack).__name__}")
            rows, kinds = open_pack(pack)
            for group in kinds:
                modality, width = group.modality, group.width
                if not 0 <= modality < len(self.widths):
                    raise PackError(f"modality index {modality} is unknown")
                if width != self.widths[modality]:
                    raise PackError(
                        f"modality {self._names[modality]!r}: rows are {width} wide, "
                        f"expected {self.widths[modality]}"
                    )
                if group.bank is not None:
                    self._banks.check(group)
            return rows
        except PackError as error:
            logger.error("A request bypassed the processor and sent no pack of rows: %s", error)
            return self._zeros(self._max_model_len, self._dtype)

    def find(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> HostRows:
        """Where the rows of a step's slices of directories lie.

        Args:
            parts: slices of what `open` returned.
            dtype: of the projectors, and of rows.
        """
        try:
            return find_rows(parts, self.widths, dtype, self._banks)
        except ValueError as error:
            # `open` looks at a pack's header; here its directory is wrong.
            logger.error("A request bypassed the processor and sent a broken pack: %s", error)
        read = []
        for part in parts:
            try:
                find_rows([part], self.widths, dtype, self._banks)
                read.append(part)
            except ValueError:
                read.append(self._zeros(part.shape[0], dtype))
        return find_rows(read, self.widths, dtype, self._banks)

    def _zeros(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        return blank_directory(rows, self.widths[0], dtype)
