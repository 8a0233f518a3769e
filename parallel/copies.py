"""Copies between the host and a device, for which the host waits only when it wants what has come."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host, from a GPU through pinned memory while the device computes on."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> Tensor:
        """Wait for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor


class Arrival:
    """Tensors on their way to a device, in the order in which they were brought."""

    def __init__(self, device: torch.device, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._tensors: list[Tensor] = []
        self._arrived: Any = None

    def bring(self, tensor: Tensor) -> Tensor:
        """The same on the device: on a GPU through pinned memory, which torch keeps until the copy is done."""
        if self._stream is None:
            return tensor
        there = tensor.pin_memory().to(self._device, non_blocking=True)
        self._tensors.append(there)
        return there

    def end(self) -> None:
        """All are brought."""
        if self._stream is not None:
            self._arrived = self._stream.record_event()

    def precede(self) -> None:
        """Let what the current stream computes from now on come after the copies; the host waits for nothing."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._arrived)
        for tensor in self._tensors:
            tensor.record_stream(current)  # its memory is the copies' stream's, which knows nothing of this one


class DeviceCopies:
    """A stream of a device's for copies; on a CPU nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def begin(self) -> Iterator[Arrival]:
        """What is brought within goes to the device in this stream, whichever thread brings it."""
        arrival = Arrival(self._device, self._stream)
        if self._stream is None:
            yield arrival
            return
        # This makes the device the thread's own too: otherwise each rank's thread would use the first one.
        with torch.cuda.stream(self._stream):
            yield arrival
            arrival.end()
