"""Projectors inside vLLM: their hidden units split over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import nn

from mmqwen.checkpoint.names import PROJECTOR_PREFIX, projector_shapes, projector_tensor
from mmqwen.modalities import ModalitySpec
from mmqwen_kernels import NORM_EPS, Norm, Projector


class _Part(nn.Module):
    """Weight and bias alone, of a layer or a norm: the fusion op computes. Not an `nn.Linear`, so
    LoRA leaves it be.

    Each parameter says which share of the checkpoint's tensor it holds, and loads it through
    vLLM's `weight_loader`: a weight update counts, defers and redirects what passes there.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def split(self, name: str, shape: tuple[int, ...], dim: int | None, begin: int) -> None:
        """Say that `name` holds the checkpoint's tensor of `shape`, cut from `begin` along `dim`.

        Args:
            name: "weight" or "bias".
            shape: of the whole tensor.
            dim: the dimension that is cut; None: none is.
            begin: index of the first row or column of this rank.
        """
        # vLLM makes stand-ins of a parameter while it loads; they keep its attributes. A function
        # of the module, not a method of ours: vLLM keeps loaders, and they would keep the module.
        parameter: Any = getattr(self, name)
        parameter.checkpoint_shape = shape
        parameter.split_dim = dim
        parameter.split_begin = begin
        parameter.weight_loader = load_share


def load_share(param: Any, loaded_weight: torch.Tensor, is_share: bool = False) -> None:
    """Copy this rank's share of a checkpoint's tensor, as one copy of the parameter's whole size.

    vLLM counts the elements that are copied, and makes what was not written from uninitialised
    memory. So the units that a rank lacks are written as well: with zeros, which add nothing.

    Args:
        param: a parameter of `_Part`, or vLLM's stand-in for it.
        loaded_weight: the whole tensor.
        is_share: `loaded_weight` is the share already, missing units included.
    """
    share = loaded_weight
    if not is_share and param.split_dim is not None:
        dim, size = param.split_dim, param.shape[param.split_dim]
        length = max(0, min(size, loaded_weight.shape[dim] - param.split_begin))
        share = loaded_weight.narrow(dim, param.split_begin if length else 0, length)
        if length < size:
            missing = [0, 0] * (param.ndim - 1 - dim) + [0, size - length]
            share = nn.functional.pad(share, missing)
    param.data.copy_(share)


class ShardedProjector(nn.Module):
    """`linear_2(act(linear_1(norm(x))))`, or one rank's share of its hidden units.

    Ranks hold `ceil(H / ranks)` hidden units; missing ones are zero and add nothing. Rank 0 alone
    adds the last bias, so that the sum over ranks is the projection. Each rank normalises rows for
    itself. A projector of one layer has no hidden units to split: it is rank 0's, and zero
    elsewhere. The others would only wait for a share to be added.

    Args:
        spec: the modality, `hidden_dim` settled.
        hidden_size: width of a token embedding.
        rank: this rank.
        ranks: how many ranks share the projector.
        dtype: dtype of the weights.
    """

    norm: _Part
    linear_1: _Part
    linear_2: _Part

    def __init__(
        self, spec: ModalitySpec, hidden_size: int, *, rank: int, ranks: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._kind = spec.projector
        if spec.hidden_dim is None and self._kind.layers == 2:
            raise ValueError(f"modality {spec.name!r}: hidden_dim is not settled")
        self.spec = spec
        self._rank = rank
        shapes = projector_shapes(spec, hidden_size)
        whole = spec.hidden_dim or hidden_size  # rows of linear_1
        units = whole if self._kind.layers == 1 else -(-whole // ranks)
        # The dimension of each part's weight and bias that is cut, and into pieces of what size.
        cuts = {"linear_1": (0, 0), "linear_2": (1, None), "norm": (None, None)}
        if self._kind.layers == 1:
            cuts["linear_1"] = (0, None)
        for part in dict.fromkeys(name.split(".")[0] for name in shapes):
            held: list[torch.Tensor | None] = []
            for kind, dim in zip(("weight", "bias"), cuts[part], strict=True):
                shape = list(shapes.get(f"{part}.{kind}", ()))
                if dim is not None and shape:
                    shape[dim] = units
                # Zeros: a rank's missing units add nothing.
                held.append(torch.zeros(shape, dtype=dtype) if shape else None)
            module = _Part(cast(torch.Tensor, held[0]), held[1])
            setattr(self, part, module)
            for kind, dim in zip(("weight", "bias"), cuts[part], strict=True):
                if f"{part}.{kind}" in shapes:
                    begin = 0 if dim is None else rank * units
                    module.split(kind, shapes[f"{part}.{kind}"], dim, begin)
        # The storage that the kernels and vLLM's own bookkeeping know; see `load`.
        self._live: dict[str, torch.Tensor] = dict(self.named_parameters())

    def check(self, name: str, loaded: torch.Tensor) -> None:
        """Refuse what `load` could not take.

        Raises:
            ValueError: `name` is no weight of a projector, or its shape or dtype is wrong.
        """
        full = projector_tensor(self.spec.name, name)
        if name not in self._live:
            raise ValueError(f"{full}: not a weight of a projector; expected {list(self._live)}")
        expected = self._parameter(name).checkpoint_shape
        if tuple(loaded.shape) != expected:
            raise ValueError(
                f"modality {self.spec.name!r}: {full} has shape {list(loaded.shape)}, expected "
                f"{list(expected)}"
            )
        if not loaded.dtype.is_floating_point:
            raise ValueError(
                f"modality {self.spec.name!r}: {full} is {loaded.dtype}, expected floating point"
            )

    def load(self, name: str, loaded: torch.Tensor) -> None:
        """Load this rank's share of one weight, in place; other weights keep their values.

        While vLLM reloads weights layer by layer, it has put tensors without storage in the place
        of a layer's own, and fills what an update left out with uninitialised memory. A layer of
        ours is therefore given all that it held first: it is complete at once, vLLM puts its own
        tensors back, and the weight is copied into them, in whatever order and however few come.

        Raises:
            ValueError: as `check`.
        """
        self.check(name, loaded)
        layer = name.split(".")[0]
        with torch.no_grad():
            names = [other for other in self._live if other.startswith(f"{layer}.")]
            if any(self._parameter(other).is_meta for other in names):
                for other in names:
                    parameter = self._parameter(other)
                    parameter.weight_loader(parameter, self._live[other].detach(), is_share=True)
            parameter = self._parameter(name)
            parameter.weight_loader(parameter, loaded)
        for other in names:
            if not self._parameter(other).is_meta:
                self._live[other] = self._parameter(other)

    def _parameter(self, name: str) -> Any:
        return self.get_parameter(name)

    def weights(self) -> Projector:
        """The weights as the fusion op takes them."""
        kind, norm = self._kind, None
        if kind.norm != "none":
            eps = NORM_EPS[kind.norm] if kind.norm_eps is None else kind.norm_eps
            norm = Norm(kind.norm, self.norm.weight, self.norm.bias, eps)
        first = self.linear_1
        if kind.layers == 1:
            last_bias = first.bias if self._rank == 0 else None
            return Projector(None, None, first.weight, last_bias, kind.activation, norm)
        last = self.linear_2
        last_bias = last.bias if self._rank == 0 else None
        return Projector(first.weight, first.bias, last.weight, last_bias, kind.activation, norm)

    @property
    def parts(self) -> list[str]:
        """Names of its weights, without the modality's."""
        return list(self._live)


class ModalityProjectors(nn.ModuleDict):
    """A `ShardedProjector` for each of `specs`, by name; none on ranks that do not `place` rows."""

    def __init__(
        self,
        specs: Mapping[str, ModalitySpec],
        hidden_size: int,
        *,
        rank: int,
        ranks: int,
        dtype: torch.dtype,
        place: bool,
    ) -> None:
        super().__init__()
        self._names = sorted(specs)
        self.changed = set(specs)
        """Modalities whose weights are others than when this was emptied last."""
        for name, spec in specs.items() if place else ():
            self[name] = ShardedProjector(spec, hidden_size, rank=rank, ranks=ranks, dtype=dtype)

    def weights(self) -> list[Projector]:
        """The weights as the fusion op takes them."""
        return [cast(ShardedProjector, projector).weights() for projector in self.values()]

    def _find(self, full: str) -> tuple[ShardedProjector | None, str]:
        modality, _, weight = full.removeprefix(PROJECTOR_PREFIX).partition(".")
        if modality not in self._names:
            raise ValueError(
                f"{full}: the config has no modality {modality!r}, expected one of {self._names}"
            )
        return cast(ShardedProjector, self[modality]) if modality in self else None, weight

    def check(self, full: str, loaded: torch.Tensor) -> None:
        """Refuse what `load` could not take.

        Raises:
            ValueError: a weight of an unknown modality; or as `ShardedProjector.check`.
        """
        projector, weight = self._find(full)
        if projector is not None:
            projector.check(weight, loaded)

    def load(self, full: str, loaded: torch.Tensor) -> None:
        """Load this rank's share of the weight of this full name; see `ShardedProjector.load`.

        Raises:
            ValueError: as `check`.
        """
        projector, weight = self._find(full)
        if projector is not None:
            projector.load(weight, loaded)
            self.changed.add(projector.spec.name)

    def refuse_missing(self, loaded: Collection[str]) -> None:
        """Refuse a checkpoint without a weight that is needed here.

        Raises:
            ValueError: `loaded` lacks one.
        """
        expected = {
            projector_tensor(name, part)
            for name, projector in self.items()
            for part in cast(ShardedProjector, projector).parts
        }
        missing = sorted(expected.difference(loaded))
        if missing:
            names = sorted({name.split(".")[1] for name in missing})
            raise ValueError(
                f"modalities {names}: the checkpoint lacks projector weights {missing}; expected "
                f"{len(expected)} of them, got {len(loaded)}"
            )
