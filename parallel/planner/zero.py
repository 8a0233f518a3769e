"""How DeepSpeed's ZeRO cuts the training state of a rank, and its settings that decide memory and traffic."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final

from ditmoe.parallel.layout import Group, Layout
from ditmoe.parallel.planner.anatomy import Weight

_ALIGNMENT: Final = 2
"""Elements that a flat partition of ZeRO 1 and 2 is a multiple of."""


@dataclass(frozen=True)
class ZeroSettings:
    """The keys of DeepSpeed's `zero_optimization` that count here, with its defaults (elements)."""

    reduce_bucket: int = 500_000_000
    """Gradients are reduced together in buffers of this size."""
    persistence_threshold: int = 100_000
    """ZeRO 3: tensors up to this size stay whole on every rank."""
    reuse_distance: int = 1_000_000_000
    """ZeRO 3: gathered weights are kept where they are used again before so many others."""
    prefetch_bucket: int = 50_000_000
    """ZeRO 3: weights gathered ahead of their use."""
    sums_in_bf16: bool = False
    """Whether bf16 gradients are averaged in bf16, rather than in fp32."""

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> "ZeroSettings":
        """With what the `deepspeed` section of a configuration says."""
        given = extra.get("zero_optimization") or {}  # an empty section reads as null
        keys = {
            "reduce_bucket": "reduce_bucket_size",
            "persistence_threshold": "stage3_param_persistence_threshold",
            "reuse_distance": "stage3_max_reuse_distance",
            "prefetch_bucket": "stage3_prefetch_bucket_size",
        }
        sizes = {field: int(given[key]) for field, key in keys.items() if key in given}
        return cls(**sizes, sums_in_bf16=extra.get("communication_data_type") == "bf16")


DEFAULTS: Final = ZeroSettings()


def steps_own_weights(zero: int, number_bytes: int, *, offload: bool = False) -> bool:
    """Whether AdamW steps what the network computes with, and reads gradients where they are,
    rather than fp32 copies of both: without ZeRO, and where ZeRO 1 and 2 train in fp32."""
    return not offload and (zero == 0 or (zero < 3 and number_bytes == 4))


def optimizer_bytes(zero: int, number_bytes: int) -> int:
    """Of each number that a rank's AdamW steps: two fp32 moments, and the fp32 weight where it has its own."""
    return 8 if steps_own_weights(zero, number_bytes) else 12


@dataclass(frozen=True)
class Shard:
    """Elements of a stage's tensors that have the same replicas."""

    group: Group
    """The ranks that ZeRO shards them over: all data ranks, or those with copies of the same experts."""
    replicas: int
    """Ranks of that group."""
    held: int
    """Elements before sharding."""
    padded: int
    """With what ZeRO pads them to."""
    persistent: int
    """ZeRO 3: elements that stay gathered on every rank beside its partition, padding included."""
    largest: int
    """Elements of the largest tensor."""
    touched: int
    """Elements of the tensors that a rank has a part of, the most of any rank (ZeRO 2 keeps their gradients)."""

    @property
    def partition(self) -> int:
        """Elements of one rank's part."""
        return self.padded // self.replicas


def shards(weights: Iterable[Weight], layout: Layout, settings: ZeroSettings) -> list[Shard]:
    """The state of a rank in the groups that ZeRO shards: all of it, or the experts apart when dealt out."""
    found: dict[bool, list[int]] = {}
    for weight in weights:
        found.setdefault(weight.routed and layout.expert > 1, []).append(weight.held(layout))
    groups: dict[bool, Group] = {False: "data", True: "expert copies"}
    return [
        _shard(tuple(numels), groups[apart], layout.size(groups[apart]), layout.zero, settings)
        for apart, numels in found.items()
    ]


@lru_cache(maxsize=4096)
def _shard(numels: tuple[int, ...], group: Group, replicas: int, zero: int, settings: ZeroSettings) -> Shard:
    held, persistent = sum(numels), 0
    if zero == 0:
        padded = held
    elif zero < 3:
        padded = _round_up(held, _ALIGNMENT * replicas)
    else:
        padded = sum(_round_up(numel, replicas) for numel in numels)
        if replicas > 1:
            persistent = sum(_round_up(n, replicas) for n in numels if n <= settings.persistence_threshold)
    touched = _most_touched(numels, padded // replicas) if zero == 2 else 0
    return Shard(group, replicas, held, padded, persistent, max(numels), touched)


def _most_touched(numels: tuple[int, ...], partition: int) -> int:
    """The largest sum of the tensors that one of the equal parts of their row overlaps."""
    ends = list(accumulate(numels))
    most = first = 0
    for start in range(0, ends[-1], partition):
        while ends[first] <= start:
            first += 1
        last = bisect_left(ends, min(start + partition, ends[-1]), lo=first)
        most = max(most, ends[last] - ends[first] + numels[first])
    return most


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
