"""One modality's projector inside vLLM: its hidden units split over the tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn

from mmqwen.modalities import ModalitySpec
from mmqwen_kernels import Projector


class _Linear(nn.Module):
    """Weight and bias alone: the fusion op multiplies. Not an `nn.Linear`, so LoRA leaves it be."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)


class ShardedProjector(nn.Module):
    """`linear_2(relu(linear_1(x)))`, or one rank's share of its hidden units.

    Ranks hold `ceil(H / ranks)` hidden units; missing ones are zero and add nothing. Rank 0 alone
    holds the last bias, so that the sum over ranks is the projection.

    Args:
        spec: the modality, `hidden_dim` settled.
        hidden_size: width of a token embedding.
        rank: this rank.
        ranks: how many ranks share the projector.
        dtype: dtype of the weights.
    """

    def __init__(
        self, spec: ModalitySpec, hidden_size: int, *, rank: int, ranks: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        if spec.hidden_dim is None:
            raise ValueError(f"modality {spec.name!r}: hidden_dim is not settled")
        self.spec = spec
        self._rank = rank
        self._units = -(-spec.hidden_dim // ranks)
        # Zeros: a rank's missing units must stay zero whatever is loaded.
        self.linear_1 = _Linear(
            torch.zeros(self._units, spec.dim, dtype=dtype), torch.zeros(self._units, dtype=dtype)
        )
        self.linear_2 = _Linear(
            torch.zeros(hidden_size, self._units, dtype=dtype),
            torch.zeros(hidden_size, dtype=dtype),
        )
        self._shapes = {
            "linear_1.weight": (spec.hidden_dim, spec.dim),
            "linear_1.bias": (spec.hidden_dim,),
            "linear_2.weight": (hidden_size, spec.hidden_dim),
            "linear_2.bias": (hidden_size,),
        }

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the weights that a checkpoint must hold for this projector."""
        return tuple(self._shapes)

    def load(self, name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's share of one weight.

        Raises:
            ValueError: `name` is no weight of a projector, or its shape is wrong.
        """
        full = f"projectors.{self.spec.name}.{name}"
        if name not in self._shapes:
            raise ValueError(f"{full}: not a weight of a projector; expected {list(self._shapes)}")
        if tuple(loaded.shape) != self._shapes[name]:
            raise ValueError(
                f"modality {self.spec.name!r}: {full} has shape {list(loaded.shape)}, expected "
                f"{list(self._shapes[name])}"
            )
        layer, kind = name.split(".")
        parameter: torch.Tensor = getattr(getattr(self, layer), kind)
        begin = self._rank * self._units
        if name == "linear_2.bias":
            share = loaded
        elif name == "linear_2.weight":
            share = loaded[:, begin : begin + self._units]
        else:
            share = loaded[begin : begin + self._units]
        with torch.no_grad():
            parameter[tuple(slice(0, size) for size in share.shape)].copy_(share)

    def weights(self) -> Projector:
        """The weights as the fusion op takes them."""
        return Projector(
            self.linear_1.weight,
            self.linear_1.bias,
            self.linear_2.weight,
            self.linear_2.bias if self._rank == 0 else None,
        )
