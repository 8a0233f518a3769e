"""A GPU of the program's own for as long as a context lasts: torch's calls, streams, memory and NCCL."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.utils.checkpoint

from tests.pretend import streams
from tests.pretend.groups import Groups
from tests.pretend.tensors import Memory, Watch, WrongDevice

_HERE: Final = Path(__file__).resolve().parent
_LIBRARY: Final = Path(torch.__file__).resolve().parent
_PASSED_THROUGH: Final = "cuda_accelerator.py"
"""DeepSpeed's names for torch.cuda's calls."""
_MEMORY_BYTES: Final = 80 * 2**30


class Gpu:
    """What is pretended."""

    def __init__(self, index: int, count: int, capability: tuple[int, int]) -> None:
        self.device = torch.device("cuda", index)
        self.count, self.capability = count, capability
        self.memory = Memory(self.device)
        self.groups = Groups(self.memory, self.tell)
        self.waits: Counter[str] = Counter()
        """`file:function operation` → how often the host waited."""
        self._debug: str | int = "default"

    def tell(self, operation: str) -> None:
        """Count a wait of the host's, at the place of the program that is not torch's; warn as CUDA would."""
        frame = _caller()
        path = Path(frame.f_code.co_filename)
        self.waits[f"{path.parent.name}/{path.name}:{frame.f_code.co_name} {operation}"] += 1
        message = f"called a synchronizing CUDA operation: {operation}"
        if self._debug in ("warn", 1):
            warnings.warn_explicit(message, UserWarning, str(path), frame.f_lineno)
        elif self._debug in ("error", 2):
            raise RuntimeError(message)

    def watch(self) -> Watch:
        """What a thread that computes enters."""
        watch = Watch(self.memory, self.tell)
        watch.dispatch.check_group = self.groups.check
        return watch

    def calls(self) -> dict[str, Any]:
        """torch.cuda's, by name."""
        host = streams.HOST

        def set_device(device: Any) -> None:
            if self._index(device) != self.device.index:
                raise WrongDevice(f"{device} is not this process's, which is {self.device}")

        def set_debug_mode(mode: str | int) -> None:
            self._debug = mode

        properties = SimpleNamespace(
            name="NVIDIA H200", total_memory=_MEMORY_BYTES, major=self.capability[0], minor=self.capability[1]
        )
        properties.multi_processor_count = 132
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: self.count,
            "current_device": lambda: self.device.index,
            "set_device": set_device,
            "device": lambda device: nullcontext(set_device(device)),
            "Stream": streams.Stream,
            "Event": streams.Event,
            "stream": streams.On,
            "current_stream": lambda device=None: host.current,
            "default_stream": lambda device=None: host.default,
            "synchronize": lambda device=None: host.synchronize(device),
            "is_current_stream_capturing": lambda: False,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_properties": lambda device=None: properties,
            "is_bf16_supported": lambda *_: True,
            "mem_get_info": lambda device=None: (_MEMORY_BYTES, _MEMORY_BYTES),
            "memory_stats": lambda device=None: {"num_alloc_retries": 0},
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device=None: None,
            "set_sync_debug_mode": set_debug_mode,
            "cudart": lambda: SimpleNamespace(
                cudaHostRegister=self._register, cudaHostUnregister=self._unregister
            ),
            "check_error": _check_error,
            **{
                name: lambda device=None: 0
                for name in (
                    "memory_allocated",
                    "max_memory_allocated",
                    "memory_reserved",
                    "max_memory_reserved",
                )
            },
        }

    def _index(self, device: Any) -> int | None:
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.device.index if index is None else index

    def _register(self, address: int, size: int, _flags: int) -> int:
        self.memory.registered[address] = size
        return 0

    def _unregister(self, address: int) -> int:
        return 0 if self.memory.registered.pop(address, None) is not None else 713


def _check_error(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}")


def _caller() -> FrameType:
    """Whoever called torch: of this repository, or of another library."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        parents = path.resolve().parents
        pretends = _HERE in parents and not path.name.startswith("test_")
        if path.is_absolute() and not pretends and _LIBRARY not in parents and path.name != _PASSED_THROUGH:
            return frame
        frame = frame.f_back
    assert frame is not None
    return frame


@contextmanager
def pretended_gpu(index: int = 0, count: int = 1, capability: tuple[int, int] = (9, 0)) -> Iterator[Gpu]:
    """Let this program find GPUs, of which one is its own; this thread is watched.

    Args:
        index: of its own.
        count: how many it finds.
    """
    gpu = Gpu(index, count, capability)
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **gpu.calls()))
        no_range = SimpleNamespace(range_push=lambda *_: 0, range_pop=lambda: 0)
        stack.enter_context(patch.object(torch.cuda, "nvtx", no_range))
        stack.enter_context(patch.object(torch.cuda.nccl, "version", lambda: (2, 27, 5)))
        stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        by_device = torch._C._group_tensors_by_device_and_dtype

        def grouped(lists: Any, with_indices: bool = False) -> Any:
            """What optimisers step together; torch's own sees what is under the pretence."""
            found = {}
            for (device, dtype), value in by_device(lists, with_indices).items():
                there = {gpu.memory.holds(tensor) for tensor in value[0][0]}
                if len(there) > 1:
                    raise WrongDevice("tensors of two devices are stepped together")
                found[gpu.device if there == {True} else device, dtype] = value
            return found

        def metadata(tensor: torch.Tensor) -> dict[str, Any]:
            """What recomputed activations are compared by; torch looks at the first ones within its own calls."""
            device = gpu.device if gpu.memory.holds(tensor) else torch.device("cpu")
            return {"shape": tensor.shape, "dtype": tensor.dtype, "device": device}

        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(patch.dict(checks, {"default": metadata}))
        stack.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        stack.enter_context(patch.object(streams.Host, "told", staticmethod(gpu.tell)))
        stack.enter_context(gpu.groups.pretended())
        watch = gpu.watch()
        stack.enter_context(watch.calls.in_backward())
        stack.enter_context(watch)
        yield gpu


@contextmanager
def deepspeed_on_it() -> Iterator[None]:
    """Let DeepSpeed, which may have been imported without one, take the GPU for its accelerator."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    with patch.object(real_accelerator, "ds_accelerator", CUDA_Accelerator()):
        yield
