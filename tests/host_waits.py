"""Counts where a program makes the host wait for a GPU, on a machine without one.

On a CPU the same calls return at once, so they are told by what they are: a value is read (`.item()`, `bool`,
`.tolist()`), the shape of a result depends on values, or memory that is not pinned is copied to the device
(`torch.tensor(…, device=…)`). Each is found by its place in this repository and, inside a library, there.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
READS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    # On a GPU the value, a tensor, is read by the host.
    _aten.masked_fill_.Tensor,
    _aten.masked_fill.Tensor,
}
SHAPED_BY_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.bincount.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
}
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_)
_LIBRARY = Path(torch.__file__).resolve().parent
_HERE = Path(__file__).resolve()


class HostWaits(TorchDispatchMode):
    """A context manager that counts; it may be used several times in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        """`file:function operation` → how often."""
        self._functions = _Functions(self)

    def __enter__(self) -> Self:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._functions.__exit__(kind, error, trace)

    @property
    def total(self) -> int:
        """All of them."""
        return self.places.total()

    def of(self, *parts: str) -> int:
        """Those whose place contains one of these parts."""
        return sum(count for place, count in self.places.items() if any(part in place for part in parts))

    def note(self, operation: str) -> None:
        """Count one at the caller's place."""
        self.places[f"{_place()} {operation}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS or func in SHAPED_BY_VALUES:
            self.note(func.overloadpacket.__name__)
        elif func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.note("repeat_interleave")
        elif func.overloadpacket in _INDEXED and any(is_mask(index) for index in args[1]):
            self.note("mask as an index")
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """What the dispatcher does not see."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self._waits.note(name)
        elif func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self._waits.note(f"{name} to the device")
        return func(*args, **kwargs)


def is_mask(index: Tensor | None) -> bool:
    """Whether an index selects by truth."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _place() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_absolute() and path.resolve() != _HERE and _LIBRARY not in path.resolve().parents:
            return f"{path.parent.name}/{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
