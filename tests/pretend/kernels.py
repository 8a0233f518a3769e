"""Triton on a pretended GPU: DeepSpeed's code around its kernels runs, and each launch computes in plain torch."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.pretend.streams import HOST
from tests.pretend.tensors import Memory, WrongDevice

_RELOADED: Final = (
    "deepspeed.moe.ep_kernels",
    "deepspeed.ops.triton_ops.autoep_fused_token_ops",
    "deepspeed.ops.triton_ops.swiglu_triton",
    "deepspeed.ops.triton_ops.group_gemm_triton",
)
"""What looks for Triton when it is imported."""


def _fill_indices_kernel(
    counts: Tensor, starts: Tensor, offsets: Tensor, out: Tensor, experts: int, ranks: int, **_: Any
) -> None:
    for expert in range(experts):
        at = int(offsets[expert])
        for group in range(expert, ranks * experts, experts):
            length, start = int(counts[group]), int(starts[group])
            out[at : at + length] = torch.arange(start, start + length)
            at += length


def _gather_rows_kernel(
    source: Tensor, index: Tensor, out: Tensor, rows: int, source_rows: int, hidden: int, **_: Any
) -> None:
    assert out.shape == (rows, hidden) and source.shape == (source_rows, hidden)
    valid = (index >= 0) & (index < source_rows)
    out.zero_()
    out[valid] = source[index[valid].long()]


def _invert_index_kernel(index: Tensor, inverse: Tensor, count: int, rows: int, **_: Any) -> None:
    assert index.shape == (count,) and inverse.shape == (rows,)
    inverse[index] = torch.arange(count, dtype=inverse.dtype)


def _weighted_restore_forward_kernel(
    rows: Tensor, inverse: Tensor, scores: Tensor, out: Tensor, *_: int, TOP_K: int, **__: Any
) -> None:
    weighed = rows[inverse.long()].float().view(-1, TOP_K, rows.shape[1]) * scores.float().unsqueeze(2)
    out.copy_(weighed.sum(1))


def _weighted_restore_backward_kernel(
    gradient: Tensor,
    rows: Tensor,
    inverse: Tensor,
    scores: Tensor,
    of_rows: Tensor,
    of_scores: Tensor,
    *_: int,
    TOP_K: int,
    **__: Any,
) -> None:
    taken = rows[inverse.long()].float().view(-1, TOP_K, rows.shape[1])
    upstream = gradient.float().unsqueeze(1)
    of_scores.copy_((taken * upstream).sum(2))
    of_rows[inverse.long()] = (upstream * scores.float().unsqueeze(2)).flatten(0, 1).to(of_rows.dtype)


def _swiglu_fwd_kernel(gate: Tensor, up: Tensor, out: Tensor, elements: int, **_: Any) -> None:
    assert gate.numel() == up.numel() == out.numel() == elements
    out.copy_(F.silu(gate.float()) * up.float())


def _swiglu_bwd_kernel(
    gradient: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor, elements: int, **_: Any
) -> None:
    assert gradient.numel() == gate.numel() == up.numel() == elements
    through_gate, through_up = _through_swiglu(gradient.float(), gate.float(), up.float())
    of_gate.copy_(through_gate)
    of_up.copy_(through_up)


def _through_swiglu(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up of silu(gate)·up."""
    open_ = torch.sigmoid(gate)
    return gradient * up * open_ * (1 + gate * (1 - open_)), gradient * gate * open_


def _swiglu_packed_fwd_kernel(both: Tensor, out: Tensor, elements: int, **_: Any) -> None:
    assert out.numel() == elements
    gate, up = both.float().chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def _swiglu_packed_bwd_kernel(gradient: Tensor, both: Tensor, of_both: Tensor, elements: int, **_: Any) -> None:
    assert gradient.numel() == elements
    gate, up = both.float().chunk(2, -1)
    of_both.copy_(torch.cat(_through_swiglu(gradient.float(), gate, up), -1))


_COMPUTED: Final[dict[str, Callable[..., None]]] = {
    compute.__name__: compute
    for compute in (
        _fill_indices_kernel,
        _gather_rows_kernel,
        _invert_index_kernel,
        _weighted_restore_forward_kernel,
        _weighted_restore_backward_kernel,
        _swiglu_fwd_kernel,
        _swiglu_bwd_kernel,
        _swiglu_packed_fwd_kernel,
        _swiglu_packed_bwd_kernel,
    )
}


class _Kernel:
    """One kernel, which is launched as `kernel[grid](…)`."""

    def __init__(self, name: str, memory: Memory, launched: Counter[str]) -> None:
        self._name, self._memory, self._launched = name, memory, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) and size > 0 for size in grid), f"{self._name}: grid {grid}"
        return self._launch

    def _launch(self, *args: Any, **options: Any) -> None:
        for number, arg in enumerate(args):
            if isinstance(arg, Tensor) and not self._memory.holds(arg):
                raise WrongDevice(f"{self._name}: argument {number} is memory of the host")
        HOST.current.issue()
        self._launched[self._name] += 1
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            _COMPUTED[self._name](*args, **options)


@contextmanager
def pretended_triton(memory: Memory, launched: Counter[str]) -> Iterator[None]:
    """Let DeepSpeed find Triton.

    Args:
        launched: counts the kernels by their names.
    """
    from deepspeed.ops.triton_ops import _triton

    found = SimpleNamespace(
        jit=lambda function: _Kernel(function.__name__, memory, launched),
        cdiv=lambda of, by: -(-of // by),
        next_power_of_2=lambda number: 1 << (number - 1).bit_length(),
        Config=lambda *_, **__: None,
        autotune=lambda *_, **__: lambda kernel: kernel,
    )
    language = SimpleNamespace(constexpr=int)
    modules = [importlib.import_module(name) for name in _RELOADED]
    try:
        with patch.multiple(_triton, _TRITON_AVAILABLE=True, triton=found, tl=language):
            for module in modules:
                importlib.reload(module)
            yield
    finally:
        for module in modules:
            importlib.reload(module)
