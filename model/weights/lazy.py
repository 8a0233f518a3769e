"""Tensors by name that are read or joined when they are asked for, so that a network is never held as a whole."""

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


class JoinedTensors(Mapping[str, Tensor]):
    """Named tensors that lie in parts, one after the other along dim 0; joined when asked for, each time anew."""

    def __init__(self, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Join nothing yet.

        Args:
            parts: of each tensor, at least one.

        Raises:
            ValueError: the parts of a tensor do not fit together; names it.
        """
        self.parts = {name: tuple(found) for name, found in parts.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, found in self.parts.items():
            first, *others = (tuple(part.shape) for part in found)
            if others and (not first or any(shape[1:] != first[1:] or not shape for shape in others)):
                raise ValueError(f"{name} cannot be joined from {', '.join(map(str, (first, *others)))}")
            self.shapes[name] = (sum(part.shape[0] for part in found), *first[1:]) if others else first

    def __getitem__(self, name: str) -> Tensor:
        parts = self.parts[name]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def parts_of(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """A tensor as it lies, in parts that follow each other along dim 0; nothing is joined."""
    return state.parts[name] if isinstance(state, JoinedTensors) else (state[name],)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor; nothing is read."""
    if isinstance(state, LazyTensors | JoinedTensors):
        return state.shapes
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of each tensor; nothing is read."""
    if isinstance(state, LazyTensors):
        return {name: state.dtype.itemsize * math.prod(shape) for name, shape in state.shapes.items()}
    return {name: sum(part.nbytes for part in parts_of(state, name)) for name in state}


def type_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """The widest type of the tensors; nothing is read."""
    if isinstance(state, LazyTensors):
        return state.dtype
    return max((part.dtype for name in state for part in parts_of(state, name)), key=lambda dtype: dtype.itemsize)


def read(state: Mapping[str, Tensor], names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The named tensors, or all."""
    names = list(state) if names is None else names
    if isinstance(state, LazyTensors):
        return dict(state.read(names))
    return {name: state[name] for name in names}
