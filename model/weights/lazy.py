"""Tensors by name that are read when they are asked for, so that no more are held than one file takes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors of one type, some of which are read at a time; each time anew."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[Sequence[str]], Mapping[str, Tensor]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Read nothing yet.

        Args:
            shapes: of all tensors, in their order.
            read: gives the named ones.
        """
        self.shapes, self.read, self.dtype = dict(shapes), read, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor; nothing is read."""
    if isinstance(state, LazyTensors):
        return state.shapes
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of each tensor; nothing is read."""
    if isinstance(state, LazyTensors):
        return {name: state.dtype.itemsize * math.prod(shape) for name, shape in state.shapes.items()}
    return {name: tensor.nbytes for name, tensor in state.items()}


def type_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """The widest type of the tensors; nothing is read."""
    if isinstance(state, LazyTensors):
        return state.dtype
    return max((tensor.dtype for tensor in state.values()), key=lambda dtype: dtype.itemsize)


def read(state: Mapping[str, Tensor], names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The named tensors, or all."""
    names = list(state) if names is None else names
    if isinstance(state, LazyTensors):
        return dict(state.read(names))
    return {name: state[name] for name in names}
