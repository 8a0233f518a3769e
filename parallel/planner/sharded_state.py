"""What DeepSpeed's ZeRO does around the passes of a dry run: the tensors it holds and the collectives it sends.

DeepSpeed itself asks tensors for their addresses, which fake ones do not have. This makes the same tensors from
the rank's real parameters (stages 0 to 3 of DeepSpeed 0.19), frees and gathers them at the same places.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe.parallel.planner.ledger import Ledger
from ditmoe.parallel.planner.zero import ZeroSettings, optimizer_bytes, steps_own_weights


class Replicated:
    """Parameters that the same ranks hold, and what ZeRO makes of them on one of these ranks."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: int, rank: int, group: Any) -> None:
        """Args:
        rank: this rank's number among those that hold the same.
        """
        self.parameters = list(parameters)
        self.ranks, self.rank, self.group = ranks, rank, group

    @property
    def elements(self) -> int:
        """Of all its parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def flat(self) -> int:
        """Elements of the flattened parameters as ZeRO 1 and 2 pad them."""
        return _padded(self.elements, 2 * self.ranks)

    def touched(self) -> int:
        """Elements of the parameters that this rank's flat part overlaps."""
        size = self.flat() // self.ranks
        begin, end, place, total = self.rank * size, (self.rank + 1) * size, 0, 0
        for parameter in self.parameters:
            total += parameter.numel() if place < end and place + parameter.numel() > begin else 0
            place += parameter.numel()
        return total


class ShardedState:
    """The training state of a rank, and ZeRO's part in a step."""

    def __init__(self, parts: Sequence[Replicated], zero: int, settings: ZeroSettings, offload: bool) -> None:
        self.parts, self.zero, self.settings = list(parts), zero, settings
        self.dtype = self.parts[0].parameters[0].dtype
        self.sums = self.dtype if settings.sums_in_bf16 else torch.float32
        """Number type in which gradients are averaged."""
        self.kept: list[Tensor] = []
        """What gradients are averaged into (ZeRO 2 and 3)."""
        self.bucket: Tensor | None = None
        self.partition: list[Tensor] = []
        """ZeRO 3: this rank's part of the weights."""
        numels = [self._owned(part) for part in self.parts]
        size = self.dtype.itemsize
        self._own_weights = steps_own_weights(zero, size, offload=offload)
        here = [] if offload else numels
        self.optimizer = [torch.empty(numel) for numel in here for _ in range(optimizer_bytes(zero, size) // 4)]
        self.ema = [torch.empty(numel) for numel in here]
        self._waiting = [0 for _ in self.parts]
        if zero == 3:
            self.partition = [torch.empty(numel, dtype=self.dtype) for numel in numels]
            self.kept = [torch.empty(numel, dtype=self.dtype) for numel in numels]
            self.bucket = self._new_bucket()

    def _owned(self, part: Replicated) -> int:
        if self.zero == 0:
            return part.elements
        if self.zero < 3:
            return part.flat() // part.ranks
        return sum(_padded(p.numel(), part.ranks) // part.ranks for p in part.parameters)

    def _new_bucket(self) -> Tensor:
        return torch.empty(self.settings.reduce_bucket, dtype=self.dtype)

    def stays_whole(self, parameter: nn.Parameter, part: Replicated) -> bool:
        """ZeRO 3: whether a small parameter is never let go."""
        return part.ranks > 1 and parameter.numel() <= self.settings.persistence_threshold

    def watch(self, network: nn.Module, ledger: Ledger) -> None:
        """Hook into the passes: gradients are taken away as they come, and with ZeRO 3 weights are gathered."""
        if self.zero >= 2:
            for number, part in enumerate(self.parts):
                for parameter in part.parameters:
                    parameter.register_post_accumulate_grad_hook(self._taking(number))  # type: ignore[no-untyped-call]
        if self.zero == 3:
            whole = {id(p) for part in self.parts for p in part.parameters if self.stays_whole(p, part)}
            ledger.leave_out(p for p in network.parameters() if id(p) not in whole)
            self._gatherers = list(self._gather_around(network, whole))

    def _taking(self, number: int) -> Any:
        """A hook that moves a gradient into the bucket."""

        def take(parameter: Tensor) -> None:
            if self.bucket is None:
                self.bucket = self._new_bucket()
            part = self.parts[number]
            count = _padded(parameter.numel(), part.ranks) if self.zero == 3 else parameter.numel()
            if sum(self._waiting) + count > self.settings.reduce_bucket:
                self._reduce()
            self._waiting[number] += count
            parameter.grad = None

        return take

    def _reduce(self) -> None:
        """Average what is in the bucket (a tensor larger than the bucket goes by itself)."""
        for number, part in enumerate(self.parts):
            count, self._waiting[number] = self._waiting[number], 0
            if not count:
                continue
            # Where the number type of the sum is the bucket's, the bucket itself.
            buffer = torch.empty(count, dtype=self.sums, device="meta" if self.sums == self.dtype else None)
            if self.zero == 3:
                dist.reduce_scatter_tensor(buffer[: count // part.ranks], buffer, group=part.group)
            else:
                dist.all_reduce(buffer, group=part.group)

    def end_micro_step(self) -> None:
        """After a backward pass."""
        if self.zero < 2:
            return
        self._reduce()
        if self.zero == 2:
            self.bucket = None
            if not self.kept:
                self.kept = [torch.empty(part.touched(), dtype=self.dtype) for part in self.parts]

    def step(self) -> None:
        """Average the gradients where that is still to do, step, and gather the weights."""
        together: object = None
        if self.zero == 0:
            total = sum(part.elements for part in self.parts)
            together = torch.empty(min(total, self.settings.reduce_bucket), dtype=self.dtype)
        elif self.zero == 1:
            together = self._new_bucket()
            if self.sums != self.dtype:
                total = min(sum(part.elements for part in self.parts), self.settings.reduce_bucket)
                together = [together, torch.empty(total, dtype=self.sums)]
        elif not self._own_weights:
            together = torch.empty(sum(map(self._owned, self.parts)))  # the fp32 gradient of this rank's part
        for part in self.parts:
            if self.zero < 2:
                dist.all_reduce(torch.empty(part.elements, dtype=self.sums, device="meta"), group=part.group)
            if self.zero in (1, 2):
                flat = torch.empty(part.flat(), dtype=self.dtype, device="meta")
                dist.all_gather_into_tensor(flat, flat[: part.flat() // part.ranks], group=part.group)
            if self.zero == 3:
                small = [p for p in part.parameters if self.stays_whole(p, part)]
                self._gather(sum(_padded(p.numel(), part.ranks) for p in small), part, device="meta")
        del together

    def _gather(self, padded: int, part: Replicated, device: str | None = None) -> Tensor | None:
        if not padded:
            return None
        whole = torch.empty(padded, dtype=self.dtype, device=device)
        dist.all_gather_into_tensor(whole, whole[: padded // part.ranks], group=part.group)
        return whole

    def _gather_around(self, network: nn.Module, whole: set[int]) -> Iterator["_Gathered"]:
        """Gather each module's large weights before it needs them; the last ones stay for the backward pass."""
        owners: list[tuple[nn.Module, list[tuple[int, Replicated]]]] = []
        part_of = {id(p): part for part in self.parts for p in part.parameters}
        for module in network.modules():
            own = [p for p in module.parameters(recurse=False) if id(p) not in whole]
            if own:
                owners.append((module, [(_padded(p.numel(), part_of[id(p)].ranks), part_of[id(p)]) for p in own]))
        later = 0
        for module, sizes in reversed(owners):
            later += sum(size for size, _ in sizes)
            yield _Gathered(self, module, sizes, stays=later <= self.settings.reuse_distance // 2)


class _Gathered:
    """The gathered weights of one module while they are needed."""

    def __init__(
        self, state: ShardedState, module: nn.Module, sizes: list[tuple[int, Replicated]], stays: bool
    ) -> None:
        self._state, self._sizes, self._stays = state, sizes, stays
        self._here: list[Tensor | None] = []
        module.register_forward_pre_hook(lambda *_: self._bring())
        module.register_forward_hook(lambda *_: None if stays else self._let_go())
        module.register_full_backward_pre_hook(lambda *_: self._bring())
        module.register_full_backward_hook(lambda *_: self._let_go())

    def _bring(self) -> None:
        if not self._here:
            self._here = [self._state._gather(size, part) for size, part in self._sizes]

    def _let_go(self) -> None:
        self._here = []


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
