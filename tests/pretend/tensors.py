"""Tensors of a pretended GPU: CPU tensors whose memory is on record as the device's.

The program is shown `cuda` as their device, and computes with true values. What would be an error on a GPU is one:
operands on different devices, a value that the host reads before its copy has arrived, another GPU than the
process's own. What would make the host wait is told: a value is read, a shape depends on values, memory that is
not pinned is copied to the device or from it.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.host_waits import READS, SHAPED_BY_VALUES, is_mask
from tests.pretend.streams import HOST, Stream

_aten = torch.ops.aten
_COPIES: Final = (_aten.copy_, _aten._foreach_copy_)
_INDEXED: Final = (_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_)


class WrongDevice(Exception):
    """A GPU would refuse this."""


class Memory:
    """Which memory is the device's, which is pinned, and what is still on its way to the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._device: dict[int, StorageWeakRef] = {}
        self._neither: dict[int, StorageWeakRef] = {}
        """Made by autograd itself, of no device that could be told."""
        self._pinned: dict[int, StorageWeakRef] = {}
        self.registered: dict[int, int] = {}
        """Address → bytes of memory that was pinned where it is."""
        self._arriving: dict[int, tuple[StorageWeakRef, tuple[Stream, int]]] = {}
        """What a copy is on its way to, and the stream's work that brings it."""
        self._purge_at = 10_000

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.untyped_storage()._cdata in self._device

    def of_either(self, tensor: Tensor) -> bool:
        """Whether it may stand beside tensors of any device."""
        return tensor.untyped_storage()._cdata in self._neither

    def place(self, tensor: Tensor, on_device: bool) -> None:
        """Put a tensor's memory on record."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._neither.pop(key, None)
        if not on_device:
            self._device.pop(key, None)
        elif key not in self._device:
            self._device[key] = StorageWeakRef(storage)
            self._purge()

    def leave_open(self, tensor: Tensor) -> None:
        """Take a tensor for one of either device."""
        storage = tensor.untyped_storage()
        self._neither[storage._cdata] = StorageWeakRef(storage)

    def _purge(self) -> None:
        """Forget memory that is free: as long as its record is there, its number is not used anew."""
        if len(self._device) < self._purge_at:
            return
        for record in (self._device, self._neither, self._pinned):
            for key in [key for key, reference in record.items() if reference.expired()]:
                del record[key]
        for key in [key for key, (reference, _) in self._arriving.items() if reference.expired()]:
            del self._arriving[key]
        self._purge_at = 2 * len(self._device) + 10_000

    def pin(self, tensor: Tensor) -> None:
        """Make a tensor's memory pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether it is."""
        storage = tensor.untyped_storage()
        return storage._cdata in self._pinned or storage.data_ptr() in self.registered

    def arrives(self, tensor: Tensor) -> None:
        """Note that a copy to this tensor's memory was started on the current stream."""
        storage = tensor.untyped_storage()
        self._arriving[storage._cdata] = StorageWeakRef(storage), HOST.current.issue()

    def check_arrived(self, tensor: Tensor) -> None:
        """WrongDevice where the host, or the current stream, uses a tensor before it has waited for the copy."""
        if not self._arriving:
            return
        key = tensor.untyped_storage()._cdata
        reference, work = self._arriving.get(key, (None, None))
        if reference is None or work is None:
            return
        if key in self._device:
            if HOST.current.known.get(work[0], 0) < work[1]:
                raise WrongDevice("a stream uses a copy of the host's before it has waited for it")
            return
        if not HOST.knows(work):
            raise WrongDevice("the host reads a copy of the device's before it has waited for it")
        del self._arriving[key]


def _is_view(func: Any) -> bool:
    """Whether an operation touches no number of the memory that it is given."""
    return func.is_view or func in _OF_SHAPES


_OF_SHAPES: Final = (
    _aten.detach.default,
    _aten.empty_like.default,
    _aten._has_compatible_shallow_copy_type.default,
)


def _ends_collective() -> bool:
    """Whether a collective is at work: some of gloo end with a copy, as those of NCCL do not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        if frame.f_code.co_filename.endswith("/distributed_c10d.py"):
            return True
        frame = frame.f_back
    return False


Told = Callable[[str], None]


class Dispatch(TorchDispatchMode):
    """Watches each operation of torch, those of autograd's backward passes too."""

    def __init__(self, memory: Memory, tell: Told, calls: "Calls") -> None:
        super().__init__()
        self._memory, self._tell, self._calls = memory, tell, calls
        self.check_group: Callable[[Any, Any, list[Tensor]], None] = lambda func, args, tensors: None
        """Checks the tensors of a collective."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        memory, packet = self._memory, func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if memory.holds(tensor)]
        if packet in _COPIES:
            if not _ends_collective():
                self._copy(args, kwargs)
        elif func.namespace == "c10d":
            self.check_group(func, args, tensors)
        elif there and func not in _OF_SHAPES:
            self._check_together(func, packet, args, tensors)
            self._tell_waits(func, packet, args, kwargs)
        if packet not in _COPIES and not _is_view(func):
            for tensor in tensors:
                memory.check_arrived(tensor)
        out = func(*args, **kwargs)
        if there and packet not in _COPIES:
            HOST.current.issue()
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    memory.place(leaf, True)
        elif not tensors and not self._calls.depth:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    memory.leave_open(leaf)
        return out

    def _check_together(self, func: Any, packet: Any, args: Any, tensors: list[Tensor]) -> None:
        """A number may come from the host, and an index, for which the host then waits."""
        memory = self._memory
        here = [t for t in tensors if not memory.holds(t) and not memory.of_either(t)]
        lists = any(isinstance(each, list | tuple) for each in args)
        strangers = [tensor for tensor in here if tensor.dim() or lists]
        if packet in _INDEXED and memory.holds(args[0]) and strangers:
            assert all(any(stranger is index for index in args[1]) for stranger in strangers), func
            self._tell("an index from the host")
        elif strangers:
            shapes = [(tuple(t.shape), "device" if memory.holds(t) else "host") for t in tensors]
            raise WrongDevice(f"{func} of tensors on different devices: {shapes}")
        if func._schema.is_mutable and isinstance(args[0], Tensor) and any(args[0] is tensor for tensor in here):
            raise WrongDevice(f"{func} writes what is the device's into memory of the host")

    def _tell_waits(self, func: Any, packet: Any, args: Any, kwargs: Any) -> None:
        if func in READS or func in SHAPED_BY_VALUES:
            self._tell(packet.__name__)
        elif func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self._tell("repeat_interleave")
        elif packet in _INDEXED and any(is_mask(index) for index in args[1]):
            self._tell("a mask as an index")

    def _copy(self, args: Any, kwargs: Any) -> None:
        """Into memory that is there."""
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        pairs = zip(args[0], args[1], strict=True) if isinstance(args[0], list | tuple) else [args[:2]]
        for target, source in pairs:
            self.crosses(target, source, non_blocking)

    def crosses(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        """Look at a copy."""
        memory = self._memory
        to, of = memory.holds(target), memory.holds(source)
        memory.check_arrived(source)
        if memory.of_either(source) or to == of:
            return
        host = source if to else target
        if not (non_blocking and memory.is_pinned(host)):
            self._tell("copy to the device" if to else "copy to the host")
            HOST.learn(HOST.current.known)
        else:
            memory.arrives(target)


class Calls(TorchFunctionMode):
    """Shows the program the devices, and watches what the dispatcher does not see."""

    def __init__(self, memory: Memory, tell: Told) -> None:
        super().__init__()
        self._memory, self._tell = memory, tell
        self._local = threading.local()
        tensor = torch.Tensor
        self._handlers: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: self._device,  # type: ignore[attr-defined]
            tensor.is_cuda.__get__: lambda t: memory.holds(t),  # type: ignore[attr-defined]
            tensor.is_cpu.__get__: lambda t: not memory.holds(t),  # type: ignore[attr-defined]
            tensor.get_device: lambda t: memory.device.index if memory.holds(t) else -1,
            tensor.to: self._to,
            tensor.cpu: lambda t, **more: self._to(t, "cpu", **more),
            tensor.cuda: lambda t, device=None, non_blocking=False: self._to(
                t, device or memory.device, non_blocking=non_blocking
            ),
            tensor.pin_memory: self._pin,
            tensor.is_pinned: lambda t, *_: memory.is_pinned(t),
            tensor.tolist: self._read,
            tensor.numpy: self._in_place,
            tensor.__array__: self._in_place,
            tensor.__deepcopy__: self._deep_copy,
        }
        self._names = {tensor.tolist: "tolist", tensor.numpy: "numpy", tensor.__array__: "__array__"}

    @property
    def depth(self) -> int:
        """How many calls of Python's are under way; 0 in what autograd does by itself."""
        return getattr(self._local, "depth", 0)

    @contextmanager
    def _within(self, depth: int) -> Iterator[None]:
        before, self._local.depth = self.depth, depth
        try:
            yield
        finally:
            self._local.depth = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self._within(self.depth + 1):
            handler = self._handlers.get(func)
            if handler in (self._read, self._in_place):
                return handler(func, *args, **kwargs)
            if handler is not None:
                return handler(*args, **kwargs)
            if kwargs.get("device") is not None or kwargs.get("pin_memory"):
                return self._make(func, args, kwargs)
            return func(*args, **kwargs)

    def _device(self, tensor: Tensor) -> torch.device:
        return self._memory.device if self._memory.holds(tensor) else tensor.device

    def on_device(self, device: Any) -> bool:
        """Whether a device is the GPU. WrongDevice where it is another one."""
        if isinstance(device, int):
            device = torch.device("cuda", device)
        device = torch.device(device)
        if device.type == "cuda" and device.index not in (None, self._memory.device.index):
            raise WrongDevice(f"{device} is not this process's, which is {self._memory.device}")
        return bool(device.type == "cuda")

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A new tensor, on a device that is named or in pinned memory."""
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        there = device is not None and self.on_device(device)
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        out = func(*args, **kwargs)
        given = args[0] if args and isinstance(args[0], Tensor) else None
        converts = func in (torch.tensor, torch.as_tensor, torch.asarray)
        if there and converts and (given is None or not self._memory.holds(given)):
            self._tell(f"{func.__name__} to the device")
            out = out.clone()
        if device is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._memory.place(leaf, there)
        if pinned:
            assert not there, f"{func}: only memory of the host is pinned"
            self._memory.pin(out)
        return out

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        memory, copy = self._memory, kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            device: Any = self._device(args[0])
            dtype, non_blocking, layout = args[0].dtype, kwargs.get("non_blocking", False), None
        else:
            if args and isinstance(args[0], int):
                args = (torch.device("cuda", args[0]), *args[1:])
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        of = memory.holds(tensor)
        to = of if device is None else self.on_device(device)
        more = {} if layout is None else {"memory_format": layout}
        if device is not None and device.type not in ("cpu", "cuda"):
            return tensor.to(device, dtype, **more)
        if to == of or memory.of_either(tensor):
            out = tensor.to(dtype=dtype or tensor.dtype, copy=copy, **more)
            if memory.of_either(tensor) and device is not None:
                memory.place(out, to)
            return out
        memory.check_arrived(tensor)
        if to and not (non_blocking and memory.is_pinned(tensor)):
            self._tell("to the device, of memory that is not pinned" if non_blocking else "to the device")
        elif not to:
            if non_blocking:
                raise WrongDevice("a copy to the host that nothing waits for")
            self._tell("to the host")
            HOST.learn(HOST.current.known)
        moved: Tensor = _Moved.apply(tensor, memory, to, dtype, more)  # type: ignore[no-untyped-call]
        if to and non_blocking:
            memory.arrives(moved)
        return moved

    def _pin(self, tensor: Tensor, *_: Any) -> Tensor:
        if self._memory.holds(tensor):
            raise WrongDevice("only memory of the host is pinned")
        if self._memory.is_pinned(tensor):
            return tensor
        out = tensor.clone()
        self._memory.pin(out)
        return out

    def _read(self, func: Any, tensor: Tensor, *args: Any) -> Any:
        if self._memory.holds(tensor):
            self._tell(self._names[func])
            HOST.learn(HOST.current.known)
        else:
            self._memory.check_arrived(tensor)
        return func(tensor, *args)

    def _in_place(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._memory.holds(tensor):
            raise WrongDevice(f"{self._names[func]} of a tensor on the device")
        self._memory.check_arrived(tensor)
        return func(tensor, *args, **kwargs)

    def _deep_copy(self, tensor: Tensor, memo: Any) -> Tensor:
        out: Tensor = tensor.__deepcopy__(memo)
        self._memory.place(out, self._memory.holds(tensor))
        return out

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Around a backward pass: this mode is left for a function of torch's, and hooks run within one."""
        run = torch.autograd._engine_run_backward

        def again(*args: Any, **kwargs: Any) -> Any:
            with self, self._within(0):
                return run(*args, **kwargs)

        with patch.object(torch.autograd, "_engine_run_backward", again):
            yield


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, memory: Memory, to: bool, dtype: Any, more: dict[str, Any]) -> Tensor:
        ctx.memory, ctx.to, ctx.dtype = memory, to, tensor.dtype
        out = tensor.detach().to(dtype=dtype or tensor.dtype, copy=True, **more)
        memory.place(out, to)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back = gradient.to(dtype=ctx.dtype, copy=True)
        ctx.memory.place(back, not ctx.to)
        return back, None, None, None, None


class Watch:
    """Both modes together; each thread that computes enters its own."""

    def __init__(self, memory: Memory, tell: Told) -> None:
        self.calls = Calls(memory, tell)
        self.dispatch = Dispatch(memory, tell, self.calls)

    def __enter__(self) -> Self:
        self.calls.__enter__()
        self.dispatch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.dispatch.__exit__(*error)
        self.calls.__exit__(*error)
