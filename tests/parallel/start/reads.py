"""What a thread reads of tensors that are mapped from files, and how much it holds beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten


class Reads(TorchDispatchMode):
    """Counts, in the thread that enters it, the bytes that torch reads of memory which it did not make meanwhile,
    and the most bytes of memory made meanwhile that were held at once.

    A view reads nothing, and neither do a single number and what `copy_` writes over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = 0
        self.most_held = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = _tensors((args, kwargs))
        known = {_place(tensor) for tensor in given}
        result = func(*args, **(kwargs or {}))
        new = [tensor for tensor in _tensors(result) if _place(tensor) not in known]
        self._made = {place: held for place, held in self._made.items() if not held[0].expired()}
        is_view = not func._schema.is_mutable and result is not None and _tensors(result) and not new
        if not is_view and func.overloadpacket not in (_aten.set_, _aten._local_scalar_dense):
            sources = given[1:] if func.overloadpacket is _aten.copy_ else given
            self.read += sum(tensor.nbytes for tensor in sources if _place(tensor) not in self._made)
        for tensor in [] if func._schema.is_mutable else new:
            storage = tensor.untyped_storage()
            self._made[_place(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self.most_held = max(self.most_held, sum(size for _, size in self._made.values()))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    """Tensors with memory."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.device.type == "cpu" and leaf.untyped_storage().nbytes()]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
