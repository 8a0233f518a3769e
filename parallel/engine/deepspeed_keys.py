"""DeepSpeed's own settings that a run may add, each known to leave the loss curve as it is.

DeepSpeed reads more than a hundred keys. Some silently change what is trained (`gradient_allreduce_op: sum`, or
`contiguous_gradients: false` where experts are dealt out), some are ignored, and few are checked for their
spelling. So only those pass with which tests/parallel/engine trains and compares, on each ZeRO stage named here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ditmoe.model.outside.nearest import nearest

GOVERNED: Final = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch and train.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.warmup_steps and optim.decay_steps",
    "bf16": "train.precision",
    "bfloat16": "train.precision",  # an old name of bf16
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "expert_parallel.enabled": "parallel.expert",
    "expert_parallel.autoep_size": "parallel.expert",
    "expert_parallel.top_k": "model.experts_per_token",
    "expert_parallel.comm_max_tokens_per_rank": "train.micro_batch",
    "pipeline": "parallel.pipe",
    "tensor_parallel": "parallel.tensor",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_optimization.cpu_offload": "parallel.offload",  # an old name of offload_optimizer
    "zero_force_ds_cpu_optimizer": "parallel.offload",
}
"""DeepSpeed's key → the key of ours that decides it."""


@dataclass(frozen=True)
class PassedKey:
    """A key that may be set."""

    effect: str
    """What it is for, for the documentation."""
    expected: str
    """Its values in words."""
    fits: Callable[[Any], bool]
    zero: tuple[int, ...]
    """ZeRO stages that it has its effect in."""
    zero_with_experts: tuple[int, ...] | None = None
    """Of these, those where experts may be dealt out as well; None: all of them."""
    needs_experts: bool = False
    """Whether it is for experts that are dealt out to GPUs."""


def _switch(effect: str, zero: tuple[int, ...], with_experts: tuple[int, ...] | None = None) -> PassedKey:
    return PassedKey(effect, "true or false", lambda value: isinstance(value, bool), zero, with_experts)


def _count(effect: str, least: int, zero: tuple[int, ...], even: bool = False) -> PassedKey:
    def fits(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62
        return whole and not (even and value % 2)

    return PassedKey(effect, f"an {'even number' if even else 'integer'} >= {least}", fits, zero)


def _fp32(effect: str, zero: tuple[int, ...]) -> PassedKey:
    return PassedKey(effect, "fp32", lambda value: isinstance(value, str) and value == "fp32", zero)


def _of_experts(effect: str, *values: str) -> PassedKey:
    """A key of the expert-parallel layer, which has these ways on GPUs alone."""
    if not values:
        return PassedKey(effect, "true or false", lambda value: isinstance(value, bool), (0, 1, 2, 3), None, True)
    return PassedKey(effect, " or ".join(values), lambda value: value in values, (0, 1, 2, 3), None, True)


PASSED: Final[Mapping[str, PassedKey]] = {
    "zero_optimization.reduce_bucket_size": _count("elements averaged over the ranks at once", 1, (1, 2, 3)),
    "zero_optimization.allgather_bucket_size": _count("elements gathered at once", 2, (1, 2), even=True),
    "zero_optimization.allgather_partitions": _switch("false: broadcasts instead of a gather", (1, 2)),
    "zero_optimization.use_multi_rank_bucket_allreduce": _switch(
        "false: one reduction for each owner of a part, instead of one for all", (1, 2)
    ),
    "zero_optimization.reduce_scatter": _switch("false: all-reduce, where that is faster", (1, 2, 3), (3,)),
    "zero_optimization.overlap_comm": _switch("reduce while the backward pass goes on", (1, 2, 3)),
    "zero_optimization.contiguous_gradients": _switch(
        "false: no buffer for gradients, with more fragments in memory", (1, 2, 3), (3,)
    ),
    "zero_optimization.round_robin_gradients": _switch("deal parameters out so that copies overlap", (1, 2)),
    "zero_optimization.parameter_alignment": _switch("begin each parameter at 16 bytes, with padding", (1, 2)),
    "zero_optimization.sub_group_size": _count("elements that the optimiser steps at once", 1, (3,)),
    "zero_optimization.stage3_prefetch_bucket_size": _count("elements gathered ahead of use", 0, (3,)),
    "zero_optimization.stage3_param_persistence_threshold": _count(
        "parameters of fewer elements stay whole on each rank", 0, (3,)
    ),
    "zero_optimization.stage3_model_persistence_threshold": _count("elements that stay whole at most", 0, (3,)),
    "zero_optimization.stage3_max_live_parameters": _count("elements gathered at a time", 0, (3,)),
    "zero_optimization.stage3_max_reuse_distance": _count(
        "a parameter used again within so many elements is kept", 0, (3,)
    ),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _switch("gather by all-reduce", (3,)),
    "zero_optimization.stage3_allgather_sequential": _switch("gather one parameter at a time", (3,)),
    "expert_parallel.async_split_plan": _of_experts("false: stop the host for the sizes of what is sent"),
    "expert_parallel.combine_impl": _of_experts(
        "how results are weighed and summed", "weighted_sum", "fused_weighted_sum"
    ),
    "expert_parallel.gate_up_impl": _of_experts("one product for gate and up, or two", "separate", "fused"),
    "expert_parallel.comm_backend": _of_experts(
        "how tokens travel; DeepEP, where it is installed", "comm", "deepep"
    ),
    "communication_data_type": PassedKey(
        "bf16: average bf16 gradients in bf16, with half the traffic; over 128 ranks 1.1% off, and 0.17% in fp32",
        "fp32 or bf16",
        lambda value: value in ("fp32", "bf16"),
        (1, 2, 3),
    ),
    "data_types.grad_accum_dtype": _fp32("sum micro-steps in fp32 where gradients are bf16", (2, 3)),
    "wall_clock_breakdown": _switch("print how long the parts of a step take", (0, 1, 2, 3)),
    "memory_breakdown": _switch("print the memory in use", (0, 1, 2, 3)),
}
"""DeepSpeed's key, dotted → what is known of it."""

_SECTIONS: Final = {key.partition(".")[0] for key in (*GOVERNED, *PASSED) if "." in key}


def key_problems(extra: Mapping[Any, Any], zero: int, expert: int) -> list[str]:
    """Problems of a `deepspeed` section, a message each: keys that may not be set, or not to this value."""
    problems = []
    for key, value in _flat(extra):
        if key in _SECTIONS:
            problems.append(f"deepspeed.{key} = {value!r} must be a mapping of DeepSpeed's keys")
        elif key in GOVERNED:
            problems.append(f"deepspeed.{key} is decided by {GOVERNED[key]}; set that instead")
        elif key not in PASSED:
            problems.append(f"deepspeed.{key} = {_shown(value)} may not be set; {_suggestion(key)}")
        elif PASSED[key].needs_experts and expert == 1:
            problems.append(f"deepspeed.{key} with parallel.expert = 1 is of no use; leave it out")
        elif not PASSED[key].fits(value):
            problems.append(f"deepspeed.{key} = {_shown(value)}: expected {PASSED[key].expected}")
        else:
            problems += _stage_problem(key, PASSED[key], zero, expert)
    return problems


def _flat(extra: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The keys of a section, dotted, with their values; an empty section has none."""
    for key, value in extra.items():
        if key in _SECTIONS and isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        elif not (key in _SECTIONS and value is None):
            yield str(key), value


def _stage_problem(key: str, known: PassedKey, zero: int, expert: int) -> list[str]:
    stages = known.zero_with_experts if expert > 1 and known.zero_with_experts is not None else known.zero
    if zero in stages:
        return []
    if zero in known.zero:
        return [
            f"deepspeed.{key} with parallel.expert = {expert} and parallel.zero = {zero}: DeepSpeed would"
            f" not train the experts rightly; leave it out, or expected parallel.zero = {_either(stages)}"
        ]
    return [
        f"deepspeed.{key} with parallel.zero = {zero} is of no use; leave it out, or expected"
        f" parallel.zero = {_either(stages)}"
    ]


def _either(stages: tuple[int, ...]) -> str:
    return " or ".join(map(str, stages))


def _suggestion(key: str) -> str:
    """The key that was probably meant, or those that exist."""
    known = [*PASSED, *GOVERNED]
    near = nearest(key, known, cutoff=0.75)
    if near is None:
        leaves = {name.rpartition(".")[2]: name for name in known}
        leaves |= {leaf.removeprefix("stage3_"): name for leaf, name in leaves.items()}
        leaf = nearest(key.rpartition(".")[2], leaves, cutoff=0.8)
        near = None if leaf is None else leaves[leaf]
    if near is not None:
        instead = f"deepspeed.{near}" if near in PASSED else GOVERNED[near]
        return f"did you mean {instead}?"
    return "it is not known to leave the loss curve as it is; docs/training.md lists the keys that are"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
