"""A modality's projector as a module, for the reference model and for training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmqwen.modalities import ModalitySpec, ProjectorSpec
from mmqwen_kernels import ACTIVATIONS, NORM_EPS, Norm
from mmqwen_kernels.reference import normalise_torch

_GAIN = {"relu": 2.0, "gelu": 2.353, "gelu_tanh": 2.353, "silu": 2.814, "none": 1.0}
"""By how much an activation lessens the second moment of a standard normal number, inverted."""


class RowNorm(nn.Module):
    """A layer or RMS norm over rows `[..., dim]`, computed in float32 and rounded once.

    Args:
        kind: "layer" or "rms".
        dim: width of a row.
        eps: added under the root; None: the usual one of its kind.
    """

    def __init__(self, kind: str, dim: int, eps: float | None = None) -> None:
        super().__init__()
        self.kind, self.eps = kind, NORM_EPS[kind] if eps is None else eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == "layer" else None

    def forward(self, rows: Tensor) -> Tensor:
        """The norm of each row."""
        return normalise_torch(rows, Norm(self.kind, self.weight, self.bias, self.eps))


class MultiModalProjector(nn.Module):
    """`linear_2(act(linear_1(norm(x))))`: rows `[R, dim]` of a modality to `[R, out_dim]`.

    Linear, ReLU, linear unless `kind` tells otherwise; `linear_1(norm(x))` of one layer.

    Args:
        dim: width of a row.
        hidden_dim: hidden units; of one layer it does not matter.
        out_dim: width of a token embedding.
        output_std: spread of the outputs of a fresh projector, for rows of unit variance.
        kind: activation, norm, biases, layers.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None,
        out_dim: int,
        *,
        output_std: float = 0.02,
        kind: ProjectorSpec | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind = ProjectorSpec() if kind is None else kind
        self.norm = None if kind.norm == "none" else RowNorm(kind.norm, dim, kind.norm_eps)
        width = out_dim if kind.layers == 1 or hidden_dim is None else hidden_dim
        self.linear_1 = nn.Linear(dim, width, bias=kind.bias)
        self.linear_2: nn.Linear | None = None
        if kind.layers == 1:
            vars(self.linear_1)["init_std"] = output_std / math.sqrt(dim)
            return
        self.linear_2 = nn.Linear(width, out_dim, bias=kind.bias)
        # He's initialisation (arXiv:1502.01852) keeps the second moment of the input;
        # linear_2 then scales it to that of the token embeddings, so that untrained rows neither
        # drown the text nor vanish in it.
        vars(self.linear_1)["init_std"] = math.sqrt(_GAIN[kind.activation] / dim)
        vars(self.linear_2)["init_std"] = output_std / math.sqrt(width)

    @classmethod
    def of(
        cls, spec: ModalitySpec, out_dim: int, *, output_std: float = 0.02
    ) -> MultiModalProjector:
        """The projector of a modality; `hidden_dim` is `out_dim` where it is not settled."""
        return cls(spec.dim, spec.hidden_dim, out_dim, output_std=output_std, kind=spec.projector)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: rows of unit variance come out with the spread `output_std`.

        Weights are normal, biases zero; a norm scales by one. `generator` makes the draw
        repeatable.
        """
        if self.norm is not None:
            self.norm.weight.fill_(1)
            if self.norm.bias is not None:
                self.norm.bias.zero_()
        for linear in (self.linear_1, self.linear_2):
            if linear is not None:
                linear.weight.normal_(0.0, vars(linear)["init_std"], generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()

    def forward(self, rows: Tensor) -> Tensor:
        """Project `[..., dim]` to `[..., out_dim]`, in the weights' dtype."""
        hidden = self.linear_1(rows if self.norm is None else self.norm(rows))
        if self.linear_2 is None:
            return hidden
        return self.linear_2(ACTIVATIONS[self.kind.activation](hidden))
