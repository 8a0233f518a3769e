"""Matrix products of float32 on x86 CPUs by oneDNN, and linear layers that use them.

torch gives float32 products to MKL, and lets oneDNN compute them in compiled networks alone. oneDNN's are 6 to 15%
faster (docs/performance.md), and a row's result has the same bits among any number of rows, from two on: with MKL
it depends on the number where that is small or odd.

oneDNN makes a kernel for each shape and keeps it. So these are for layers, whose shapes come again, and not for
experts, which have another number of rows each time: there kernels took more time and memory than they saved.

In a compiled region a layer's product is one operator, which computes what the layer computes without a compiler:
the same bits, and oneDNN's speed.
"""

import platform
from collections.abc import Callable
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_AVAILABLE: Final = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def in_onednn(*tensors: Tensor | None) -> bool:
    """Whether products of these are oneDNN's; its switch is torch's (`torch.backends.mkldnn.flags`)."""
    return (
        _AVAILABLE
        and not torch.compiler.is_compiling()  # a compiler cannot ask; `linear_operator` does
        and bool(torch.backends.mkldnn.enabled)
        and all(
            tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0
            for tensor in tensors
            if tensor is not None
        )
    )


def product(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, then: Literal["none", "swish"] = "none"
) -> Tensor:
    """x·weightᵀ + bias, and SiLU of that if asked for: `[..., I]` → `[..., O]`, by oneDNN and without a gradient.

    The weight may be a transposed view. One row takes another kernel, which rounds otherwise; so it is computed
    twice.
    """
    if x.numel() == x.shape[-1]:
        twice = product(x.reshape(1, -1).expand(2, -1), weight_OI, bias_O, then)
        return twice[0].view(*x.shape[:-1], len(weight_OI))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, then, [], "")
    return result


def gated(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(SiLU(gate(x))·up(x)), `[..., D]` → `[..., D]`, by oneDNN and without a gradient: activation and gating
    happen in the products."""
    if x.numel() == x.shape[-1]:
        return gated(x.reshape(1, -1).expand(2, -1), gate_FD, up_FD, down_DF)[0].view_as(x)
    opened = product(x, gate_FD, then="swish")
    return product(torch.ops.mkldnn._linear_pointwise.binary(x, opened, up_FD, None, "mul"), down_DF)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that is faster."""
    if torch.compiler.is_compiling():
        in_operator = x.device.type == "cpu" and x.dtype == torch.float32
        return linear_operator(x, weight_OI, bias_O) if in_operator else F.linear(x, weight_OI, bias_O)
    if not in_onednn(x, weight_OI, bias_O):
        return F.linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight_OI, bias_O)
    ):
        result: Tensor = _Linear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
        return result
    return product(x, weight_OI, bias_O)


class Linear(nn.Linear):
    """torch's linear layer with `linear`'s products."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`."""
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, gradient, product)


def _gradients(ctx: Any, gradient: Tensor, times: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor | None, ...]:
    """Of a product's factors and its bias. The weight's is MKL's, which is the faster one there."""
    x, weight_OI = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    flat = gradient.reshape(-1, len(weight_OI))
    return (
        times(gradient, weight_OI.t()) if of_x else None,
        flat.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
        flat.sum(0) if of_bias else None,
    )


@torch.library.custom_op("ditmoe::linear", mutates_args=())
def linear_operator(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`linear` as one operator, into which a compiler does not look."""
    with torch.no_grad():
        return linear(x, weight_OI, bias_O)


@linear_operator.register_fake
def _(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight_OI))


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight_OI, _ = inputs
    ctx.save_for_backward(x, weight_OI)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, gradient, linear_operator)


linear_operator.register_autograd(_backward, setup_context=_keep_factors)
