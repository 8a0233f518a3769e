"""The settings that the engine hands to DeepSpeed, generated from the run's configuration.

Whatever the configuration decides is written out, defaults included: DeepSpeed's own defaults (such as clipping
at 1.0 where nothing is said) must not change a run.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Final

import torch

from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.parallel.engine.deepspeed_keys import key_problems
from ditmoe.parallel.layout import Layout

OVERLAPPED_BUCKET: Final = 50_000_000
"""Elements that are averaged at once while the backward pass goes on; DeepSpeed's 500 million leave nothing to do
meanwhile."""


def deepspeed_settings(
    layout: Layout,
    model: ModelConfig,
    precision: str,
    clip: float | None,
    extra: dict[str, Any],
    device: torch.device,
    largest: int,
) -> dict[str, Any]:
    """Generate DeepSpeed's settings and merge the `deepspeed` section into them.

    Args:
        largest: elements of the largest parameter of a rank.

    Raises:
        UserError: the section has keys that may not be set.
    """
    problems = key_problems(extra, layout.zero, layout.expert)
    if problems:
        raise UserError("\n".join(problems))
    settings: dict[str, Any] = {
        "train_batch_size": layout.micro_batch * layout.accumulation * layout.data,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        # Where the optimiser is on the device, the engine clips by itself and looks for what is not finite: the
        # host would wait for DeepSpeed's norm, and without ZeRO that averages the ranks' expert norms.
        "gradient_clipping": (clip or 0.0) if layout.offload else 0.0,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": layout.offload},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": layout.zero},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW steps in host memory too, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        # bf16 over 128 ranks is 1.1% off, fp32 0.17%.
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # Nobody reads it, and it would stop a GPU's host twice in each micro-step.
        "timers": {"throughput": {"enabled": False}},
    }
    if layout.zero in (1, 2) and not layout.offload:
        settings["zero_optimization"]["compute_grad_norm"] = False
    if layout.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if _overlaps(layout, device):
        # A larger tensor would be reduced outside of the buckets, and its memory used again while that goes on.
        bucket = max(OVERLAPPED_BUCKET, largest)
        settings["zero_optimization"] |= {"overlap_comm": True, "reduce_bucket_size": bucket}
    if layout.pipe > 1:
        # It would send each tensor rank's share alone, and takes no second tensor with a gradient then.
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if layout.expert > 1:
        settings["expert_parallel"] = _expert_parallel(layout, model, fast_expert_settings(device))
    merged = _merged(settings, extra)
    zero = merged["zero_optimization"]
    in_buckets = zero.get("contiguous_gradients", True) and largest <= zero.get("reduce_bucket_size", largest)
    if "overlap_comm" not in (extra.get("zero_optimization") or {}) and not in_buckets:
        zero.pop("overlap_comm", None)
    if layout.expert > 1:
        _check_experts(merged["expert_parallel"], extra.get("expert_parallel") or {}, precision, device)
    return merged


def _overlaps(layout: Layout, device: torch.device) -> bool:
    """Whether gradients are averaged while the backward pass goes on: on GPUs, in streams of their own, where more
    than one rank has them.

    ZeRO 3 does that by itself; DeepSpeed's pipeline does not, and with offload gradients leave the GPU one by one.
    """
    return (
        device.type == "cuda"
        and layout.data > 1
        and layout.zero in (1, 2)
        and layout.pipe == 1
        and not layout.offload
    )


def fast_expert_settings(device: torch.device) -> dict[str, Any]:
    """The ways of AutoEP that compute the same faster; each is for GPUs.

    By default it stops the host in each layer for the sizes of what is sent, writes `[T, K, D]` in fp32 to combine
    results, and multiplies by the gate's and the up matrices one after the other.
    """
    if device.type != "cuda":
        return {}
    from deepspeed.ops.triton_ops import autoep_fused_token_ops

    found: dict[str, Any] = {"async_split_plan": True}
    if autoep_fused_token_ops.is_available():
        found["combine_impl"] = "fused_weighted_sum"
    if torch.cuda.get_device_capability(device) >= (9, 0):  # before that a kernel of its own has no such way
        found["gate_up_impl"] = "fused"
    return found


def _check_experts(settings: dict[str, Any], given: dict[str, Any], precision: str, device: torch.device) -> None:
    """Bring the ways of the expert-parallel layer into agreement with DeepEP.

    Raises:
        UserError: one is for GPUs, and this is none; or needs a package that is not here, or another number type.
    """
    if given and device.type != "cuda":
        raise UserError(f"deepspeed.expert_parallel = {given} is for GPUs; leave it out on {device.type}")
    if settings.get("comm_backend") != "deepep":
        del settings["comm_max_tokens_per_rank"]
        return
    if precision != "bf16":
        raise UserError(
            f"deepspeed.expert_parallel.comm_backend = deepep with train.precision = {precision}: DeepEP sends"
            " bf16 alone; expected train.precision = bf16, or comm_backend: comm"
        )
    if find_spec("deep_ep") is None:
        raise UserError("deepspeed.expert_parallel.comm_backend = deepep: the package deep_ep is not installed")
    settings.pop("combine_impl", None)  # DeepEP sums by itself


def suspect_of(extra: dict[str, Any]) -> str:
    """What to look at where DeepSpeed does not do what this engine expects of it, for a message."""
    if extra:
        return f"deepspeed = {extra} is what was added to its settings: leave out what is not needed"
    return (
        f"DeepSpeed {version('deepspeed')} with torch {version('torch')}; expected the versions of constraints.txt"
    )


def _expert_parallel(layout: Layout, model: ModelConfig, fast: dict[str, Any]) -> dict[str, Any]:
    """AutoEP's settings for the modules of `ditmoe.model.experts.moe`."""
    settings = {
        "enabled": True,
        "autoep_size": layout.expert,
        "moe_layer_pattern": r"(.*\.)?blocks\.\d+\.moe",  # in a pipeline the stage's number comes before
        "expert_pattern": "experts",
        "router_pattern": "gate",
        "expert_w1": "gate_proj",
        "expert_w2": "down_proj",
        "expert_w3": "up_proj",
        "has_shared_experts": model.has_shared,
        "top_k": model.experts_per_token,
        "score_func": "softmax",
        "score_apply": "post",
        "route_norm": False,
        "use_grouped_mm": True,
        "comm_max_tokens_per_rank": layout.micro_batch * model.tokens,
        **fast,
    }
    if model.has_shared:
        settings["shared_experts_pattern"] = "shared_experts"
    return settings


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value or {})  # an empty section reads as null
        elif value is not None:
            merged[key] = value
    return merged
