"""Where a served model's projectors come from: its checkpoint, or a file of `hf_overrides`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from vllm.config import VllmConfig

from mmqwen.checkpoint.projector_files import complete_specs
from mmqwen.checkpoint.projector_record import check_recorded
from mmqwen.checkpoint.trained import projector_file, read_trained, untrained
from mmqwen.modalities import ModalitySpec
from mmqwen.vllm_plugin.modality_table import modality_table, text_config_of


class ProjectorOrigin:
    """The checkpoint that an engine started from, or its `projector: FILE`."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._model_config = vllm_config.model_config
        self._config = self._model_config.hf_config
        self._cache = vllm_config.load_config.download_dir
        self._started_from = self._model_config.model
        self._file = getattr(self._config, "projector", None)

    @property
    def _hidden_size(self) -> int:
        size: int = text_config_of(self._config).hidden_size
        return size

    def specs(self) -> dict[str, ModalitySpec]:
        """The modalities, with what `projector: FILE` tells of them.

        Raises:
            ValueError: the config and the file of projectors, the checkpoint's or that one, differ.
        """
        model_config = self._model_config
        specs = modality_table(model_config)
        if self._file is not None:
            told = complete_specs(self._file, modality_table(model_config, settle=False))
            return {name: spec.settled(self._hidden_size) for name, spec in told.items()}
        check_recorded(
            projector_file(model_config.model, revision=model_config.revision, cache=self._cache),
            specs,
        )
        return specs

    def untrained(self, specs: Mapping[str, ModalitySpec]) -> list[str]:
        """Modalities whose projectors are known to be a random start."""
        model_config = self._model_config
        trained = read_trained(
            self._file or model_config.model,
            self._config,
            revision=model_config.revision,
            cache=self._cache,
        )
        return untrained(trained, specs)

    def weights(
        self, specs: Mapping[str, ModalitySpec], keep: Collection[str]
    ) -> dict[str, torch.Tensor]:
        """The weights of `projector: FILE`; {} without one.

        Args:
            specs: the modalities.
            keep: names that another checkpoint than the engine's own has given.
        """
        if self._file is None:
            return {}
        from mmqwen.checkpoint import load_projectors

        found = load_projectors(self._file, specs, self._hidden_size)
        if self._model_config.model == self._started_from:
            return found
        return {name: tensor for name, tensor in found.items() if name not in keep}
