"""NCCL of a pretended GPU: gloo's groups, of which each knows which memory it can send."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests.pretend.tensors import Memory, WrongDevice

_OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")


class Groups:
    """The process groups of a program; `check` looks at what is sent in them."""

    def __init__(self, memory: Memory, tell: Callable[[str], None]) -> None:
        self._memory, self._tell = memory, tell
        self._nccl: set[str] = set()
        """Names of the groups that a GPU's memory is sent in."""
        self._of_objects = 0
        self.beginnings: list[dict[str, Any]] = []
        """What the program's own group was begun with."""

    @contextmanager
    def pretended(self) -> Iterator[None]:
        """In the place of torch's."""
        init, new, backend = dist.init_process_group, dist.new_group, dist.get_backend

        def init_process_group(name: str, *, device_id: torch.device | None = None, **more: Any) -> None:
            self.beginnings.append({"backend": name, "device_id": device_id, **more})
            init("gloo" if name == "nccl" else name, **more)
            if name == "nccl":
                if device_id != self._memory.device:
                    raise WrongDevice(f"NCCL is begun for {device_id}, expected {self._memory.device}")
                self._nccl.add(dist.group.WORLD.group_name)

        def new_group(ranks: Any = None, *args: Any, backend: str | None = None, **more: Any) -> Any:
            more.pop("device_id", None)
            own = dist.group.WORLD.group_name in self._nccl
            nccl = backend == "nccl" or (backend is None and own)
            group = new(ranks, *args, backend="gloo" if nccl else backend, **more)
            if nccl and hasattr(group, "group_name"):  # not for a rank outside of it
                self._nccl.add(group.group_name)
            return group

        def get_backend(group: Any = None) -> str:
            name = (group or dist.group.WORLD).group_name
            return "nccl" if name in self._nccl else str(backend(group))

        def of_objects(call: Callable[..., Any]) -> Callable[..., Any]:
            def told(*args: Any, **more: Any) -> Any:
                group = more.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
                if (group or dist.group.WORLD).group_name in self._nccl:
                    self._tell(call.__name__)
                self._of_objects += 1
                try:
                    return call(*args, **more)
                finally:
                    self._of_objects -= 1

            return told

        replaced: dict[str, Any] = {name: of_objects(getattr(dist, name)) for name in _OBJECTS}
        replaced |= {"init_process_group": init_process_group, "new_group": new_group, "get_backend": get_backend}
        with patch.multiple(dist, **replaced):
            yield

    def check(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        """WrongDevice where a group is given memory that it cannot send."""
        name = func.overloadpacket.__name__
        if self._of_objects or "barrier" in name:
            return
        group = next(
            dist.ProcessGroup.unbox(arg)
            for arg in args
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())  # type: ignore[attr-defined]
        )
        nccl = group.group_name in self._nccl
        if any(self._memory.holds(tensor) != nccl for tensor in tensors if not self._memory.of_either(tensor)):
            raise WrongDevice(f"{name} of {'host' if nccl else 'device'} memory by {'NCCL' if nccl else 'gloo'}")
