"""Counts what a piece of a program sends to other ranks, and the most memory that its tensors hold at once.

It watches torch's dispatcher, where DeepSpeed's collectives and ours end as well: with gloo and NCCL, and under
fake tensors with the `fake` process group. So the same counter serves a run of real processes and a dry run.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS: Final = ("all-to-all", "all-reduce", "reduce-scatter", "all-gather", "point-to-point")
"""What training sends. DeepSpeed also broadcasts while it starts."""

_SENT: Final = {
    "alltoall_base_": ("all-to-all", 1),
    "allreduce_": ("all-reduce", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "send": ("point-to-point", 0),
    "broadcast_": ("broadcast", 0),
}
"""Operation of torch's `c10d` library → its kind, and which argument is counted.

Counted is the larger of the tensors that go in and come out, whole: what is sent of it depends on the algorithm.
"""

_SILENT: Final = ("recv_", "barrier", "monitored_barrier_")
"""Operations that send no payload of their own."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within its context, counts collectives by kind and follows the storages of all tensors made in it.

    Collectives in groups of one rank send nothing and are not counted.
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        """Begin with the storages of some tensors as already held.

        Args:
            tensors: made before, and counted in `held` and `peak`.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Counter[str] = Counter()
        """Kind of collective → bytes of the payloads of all calls."""
        self.calls: Counter[str] = Counter()
        """Kind of collective → calls."""
        self.held = 0
        """Bytes of all storages that are alive now."""
        self.peak = 0
        """Largest `held` since the beginning, or since it was set."""
        self._seen: dict[int, Any] = {}
        for tensor in tensors:
            self._follow(tensor)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, and note what it sends or makes."""
        if operation.namespace == "c10d":
            self._count(operation, args)
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _count(self, operation: Any, args: tuple[Any, ...]) -> None:
        name = operation.__name__.partition(".")[0]
        if name in _SILENT:
            return
        kind, place = _SENT.get(name, (name, 0))  # one that nobody planned is seen by its name
        if any(_group_size(argument) == 1 for argument in args):
            return
        self.calls[kind] += 1
        self.sent[kind] += sum(
            leaf.numel() * leaf.element_size() for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor)
        )

    def _follow(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now until it is freed."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.finalize(storage, self._freed, key, size)
        self._seen[key].atexit = False
        self.held += size
        self.peak = max(self.peak, self.held)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors, whatever is made of them."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def _freed(self, key: int, size: int) -> None:
        del self._seen[key]
        self.held -= size


def _group_size(argument: Any) -> int | None:
    """Ranks of the group, if the argument of an operation is one."""
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return dist.ProcessGroup.unbox(argument).size()
    return None
