"""One update of the weights: the norm, clipping, and whether the step counts, without asking the device.

DeepSpeed computes norms that the host reads several times between the backward pass and the optimiser. Here the
square of the norm joins the sums of the step, which one all-reduce brings together; the factor that clips, and
whether loss and norm are finite, are tensors; and AdamW leaves a step out by itself where its `found_inf` says so:
then weights, moments and its count of steps keep their values.

It calls private parts of DeepSpeed 0.19 (`averaged_gradients`, `unscale_and_clip_grads`, `_get_norm_groups`,
`average_tensor`, `reduce_independent_p_g_buckets_and_remove_grads`, `GradPartitionBufferGroup`); tests/parallel
covers each stage.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ditmoe.parallel.engine.passes import Passes
from ditmoe.parallel.engine.step_totals import DeviceTotals
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.tensor.shards import shard_of

_CLIP_EPSILON = 1e-6
"""Added to the norm that is clipped, as DeepSpeed and torch do."""
_ROW = 256


def clipping_divisor(norm: Tensor, clip: float) -> Tensor:
    """What a gradient of this norm is divided by, so that its norm is at most `clip`; of no dims."""
    return ((norm + _CLIP_EPSILON) / clip).clamp(min=1.0)


def square_of_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all their numbers, float64 of no dims.

    On a CPU a norm in float64 takes 24 times as long as one in float32, which alone is vectorised. So short rows
    are summed in float32, and only their sums in float64: to seven digits or more.
    """
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum()
    total = torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        flat = gradient.reshape(-1)
        whole = len(flat) // _ROW * _ROW
        for rows in (flat[:whole].view(-1, _ROW), flat[whole:].view(1, -1)):
            if rows.numel():
                total += torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double().square().sum()
    return total


def hand_over_gradients(optimizer: Any) -> None:
    """Bring what ZeRO 1 or 2 is about to step with to where AdamW reads it, in its number type.

    DeepSpeed would join the gradients of a group in their own type and convert the whole: one more pass over them,
    and one more copy in memory. Where AdamW steps the network's own weights (`step_own_weights`), gradients stay
    where they are. So the norm, too, is taken of numbers that need no conversion.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

    for number, gradients in optimizer.averaged_gradients.items():
        flat = optimizer.single_partition_of_fp32_groups[number]
        stepped = optimizer.optimizer.param_groups[number]["params"]
        if all(weights is not flat for weights in stepped):
            _give(gradients, {weights.storage_offset() - flat.storage_offset(): weights for weights in stepped})
            # DeepSpeed gives one gradient of all to the partition, which nobody steps.
            optimizer.averaged_gradients[number] = GradPartitionBufferGroup(
                gradients, flat.new_zeros(1).expand_as(flat)
            )
        elif getattr(gradients, "flat_partition", None) is None:  # else fp32 sums of micro-steps in bf16 are there
            optimizer.averaged_gradients[number] = GradPartitionBufferGroup(*_joined(gradients, flat.dtype))


def _give(gradients: Sequence[Tensor], places: dict[int, Tensor]) -> None:
    """Give weights their gradients, which follow each other as the weights do from place 0 on, with fillings."""
    begins = accumulate((gradient.numel() for gradient in gradients), initial=0)
    for begin, gradient in zip(begins, gradients, strict=False):
        if begin in places:
            places[begin].grad = gradient.reshape(-1)
    assert all(weights.grad is not None for weights in places.values()), "a parameter has no gradient"


def _joined(gradients: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Any], Tensor]:
    """Copies of them as views of one tensor, and that."""
    numels = [gradient.numel() for gradient in gradients]
    flat = gradients[0].new_empty(sum(numels), dtype=dtype)
    places: list[Any] = [
        part.view(gradient.shape) for part, gradient in zip(torch.split(flat, numels), gradients, strict=True)
    ]
    torch._foreach_copy_(places, list(gradients))
    for place, gradient in zip(places, gradients, strict=True):
        if getattr(gradient, "_zero_padding", False):
            place._zero_padding = True
    return places, flat


def order_streams(optimizer: Any, accelerator: Any) -> None:
    """Let ZeRO order streams where DeepSpeed stops the host.

    It stops at the end of a backward pass for the gradients: ZeRO 1 and 2 for the whole device, ZeRO 3 for the
    stream that it reduces in. What comes next on the stream of the backward pass waits for them instead. ZeRO 3
    also stops after a step, once it has gathered small weights: by then that stream waits for the gather already.
    """
    of_zero_3 = getattr(optimizer, "reduce_and_partition_stream", None)
    stream = optimizer.reduction_stream if of_zero_3 is None else of_zero_3

    def replace_stop(method: str, stopping: Any, instead: Callable[..., None]) -> None:
        run = getattr(optimizer, method)

        def ordered(*arguments: Any) -> Any:
            stopping.synchronize = instead
            try:
                return run(*arguments)
            finally:
                del stopping.synchronize  # the class's own shows again

        setattr(optimizer, method, ordered)

    replace_stop(
        "overlapping_partition_gradients_reduce_epilogue",
        accelerator if of_zero_3 is None else stream,
        lambda *_: accelerator.current_stream().wait_stream(stream),
    )
    if of_zero_3 is not None:
        replace_stop("_post_step", accelerator, lambda *_: None)


class Update:
    """Steps the optimiser of an engine.

    Where the optimiser is in host memory, the host waits for the gradients in any case: DeepSpeed's own norm and
    clipping serve there, and the loss is looked at before the step.
    """

    def __init__(
        self, passes: Passes, network: nn.Module, layout: Layout, clip: float | None, device: torch.device
    ) -> None:
        self._passes, self._network, self._layout, self._clip = passes, network, layout, clip
        self._engine: Any = passes.engine
        self.on_device = not layout.offload
        """Whether a step that is not finite is left out on the device, rather than by the host."""
        self._left_out = torch.zeros((), device=device)
        """1 from the first step that is not finite until `forget`."""
        self._factor: Tensor | None = None
        """What clips the gradient of the step, float32 of no dims."""
        if not self.on_device:
            return
        self._engine.basic_optimizer.found_inf = self._left_out
        self._engine.basic_optimizer.register_step_pre_hook(lambda adam, *_: self._clip_stepped(adam))
        if layout.zero:
            self._engine.optimizer.unscale_and_clip_grads = lambda *_: None
        if layout.zero == 3:
            self._engine.optimizer._get_norm_groups = lambda: [torch.ones(())]  # of the host, and finite
        elif layout.zero:
            self._engine.basic_optimizer.register_step_post_hook(lambda adam, *_: _let_gradients_go(adam))
            if layout.data == 1 and not self._engine.optimizer.overlap_comm:
                # Gradients stay where autograd left them. DeepSpeed would copy them to a bucket, average that with
                # nobody's, and copy them to where they are kept. Overlapped, it orders streams besides.
                self._engine.optimizer.reduce_independent_p_g_buckets_and_remove_grads = lambda *_: None
                self._engine.optimizer.average_tensor = lambda *_: None
        if device.type == "cuda" and self._reduces_in_a_stream():
            from deepspeed.accelerator import get_accelerator

            order_streams(self._engine.optimizer, get_accelerator())

    def _reduces_in_a_stream(self) -> bool:
        """Whether gradients are averaged beside the backward pass, out of buffers that stay."""
        optimizer = self._engine.optimizer
        if self._layout.zero in (1, 2):
            return bool(optimizer.overlap_comm and optimizer.contiguous_gradients)
        return self._layout.zero == 3

    @torch.no_grad()
    def square(self) -> Tensor | None:
        """This rank's part of the square of the gradient's norm, after the gradients are averaged; float64."""
        if not self.on_device:
            return None
        if self._layout.zero in (1, 2):
            hand_over_gradients(self._engine.optimizer)
        total = torch.zeros((), dtype=torch.float64, device=self._left_out.device)
        by_copies: dict[int, list[Tensor]] = {}
        for gradient, copies in self._gradients():
            by_copies.setdefault(copies, []).append(gradient)
        for copies, gradients in by_copies.items():
            total += square_of_norm(gradients) / copies
        return total

    def _gradients(self) -> Iterator[tuple[Tensor, int]]:
        """What this rank steps with, in pieces, and on how many ranks each is."""
        layout, optimizer = self._layout, self._engine.optimizer
        if layout.zero == 0:
            for parameter in self._network.parameters():
                if parameter.grad is not None:
                    is_expert = not getattr(parameter, "allreduce", True)
                    copies = layout.expert_copies if is_expert else layout.data
                    yield parameter.grad, copies * self._tensor_copies(parameter)
            return
        parts = optimizer.fp16_groups if layout.zero == 3 else optimizer.params_in_partition
        for number, parameters in enumerate(parts):
            pieces = [g for g in optimizer.averaged_gradients[number] if not getattr(g, "_zero_padding", False)]
            for gradient, parameter in zip(pieces, parameters, strict=False):  # a filling may come at the end
                yield gradient, self._tensor_copies(parameter)

    def _tensor_copies(self, parameter: Tensor) -> int:
        return self._layout.tensor if shard_of(parameter) is None else 1

    def step(self, totals: DeviceTotals) -> None:
        """Step, unless the loss or the norm is not finite, or one before was not."""
        if self.on_device:
            torch.maximum(self._left_out, totals.not_finite(), out=self._left_out)
            if self._clip is not None:
                self._factor = (1.0 / clipping_divisor(totals.norm, self._clip)).float()
        self._passes.step()

    def keep(self, new: Tensor, old: Tensor) -> Tensor:
        """The new value where the step counted, otherwise the old one."""
        return torch.where(self._left_out > 0, old, new)

    def counted(self) -> Tensor | None:
        """1 where the step counted, otherwise 0, of no dims; None where the host has seen to that."""
        return 1 - self._left_out if self.on_device else None

    def forget(self) -> None:
        """Let steps count again."""
        self._left_out.zero_()

    def norm_of_host(self) -> float:
        """The norm of the step that was taken, where `on_device` is false."""
        return float(self._engine.get_global_grad_norm())

    def _clip_stepped(self, adam: torch.optim.Optimizer) -> None:
        """What AdamW is about to step with: all of it, or of a group or subgroup of ZeRO's."""
        if self._factor is not None:
            torch._foreach_mul_([t.grad for t in _stepped(adam) if t.grad is not None], self._factor)


def _let_gradients_go(adam: torch.optim.Optimizer) -> None:
    for weights in _stepped(adam):
        weights.grad = None


def _stepped(adam: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (tensor for group in adam.param_groups for tensor in group["params"])
