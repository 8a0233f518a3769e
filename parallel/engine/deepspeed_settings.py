"""The settings that the engine hands to DeepSpeed, generated from the run's configuration.

Whatever the configuration decides is written out, defaults included: DeepSpeed's own defaults (such as clipping
at 1.0 where nothing is said) must not change a run.
"""

from typing import Any

from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.parallel.layout import Layout

GOVERNED = {
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
    "expert_parallel": "parallel.expert",
    "pipeline": "parallel.pipe",
    "tensor_parallel": "parallel.tensor",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_force_ds_cpu_optimizer": "parallel.offload",
}
"""DeepSpeed's key → the key of ours that decides it."""


def governed_keys(extra: dict[str, Any]) -> list[str]:
    """Problems of a `deepspeed` section: the keys in it that a key of ours decides, one message each."""
    zero = extra.get("zero_optimization", {})
    present = [key for key in extra if key in GOVERNED]
    if not isinstance(zero, dict):
        return [f"deepspeed.zero_optimization = {zero!r} must be a mapping of DeepSpeed's keys"]
    present += [f"zero_optimization.{key}" for key in zero if f"zero_optimization.{key}" in GOVERNED]
    return [f"deepspeed.{key} is decided by {GOVERNED[key]}; set that instead" for key in present]


def deepspeed_settings(
    layout: Layout, model: ModelConfig, precision: str, clip: float | None, extra: dict[str, Any]
) -> dict[str, Any]:
    """Generate DeepSpeed's settings and merge the `deepspeed` section into them.

    Raises:
        UserError: the section contradicts a key of ours.
    """
    problems = governed_keys(extra)
    if problems:
        raise UserError("\n".join(problems))
    settings: dict[str, Any] = {
        "train_batch_size": layout.micro_batch * layout.accumulation * layout.data,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        # Without ZeRO the engine clips by itself: DeepSpeed averages the ranks' expert norms there.
        "gradient_clipping": (clip or 0.0) if layout.zero else 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": layout.zero},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW steps in host memory too, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if layout.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if layout.pipe > 1:
        # It would send each tensor rank's share alone, and takes no second tensor with a gradient then.
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if layout.expert > 1:
        settings["expert_parallel"] = _expert_parallel(layout.expert, model)
    return _merged(settings, extra)


def _expert_parallel(ranks: int, model: ModelConfig) -> dict[str, Any]:
    """AutoEP's settings for the modules of `ditmoe.model.experts.moe`."""
    settings = {
        "enabled": True,
        "autoep_size": ranks,
        "moe_layer_pattern": r"(.*\.)?blocks\.\d+\.moe",  # in a pipeline the stage's number comes before
        "expert_pattern": "experts",
        "router_pattern": "gate",
        "expert_w1": "gate_proj",
        "expert_w2": "down_proj",
        "expert_w3": "up_proj",
        "has_shared_experts": model.shared_experts > 0,
        "top_k": model.experts_per_token,
        "score_func": "softmax",
        "score_apply": "post",
        "route_norm": False,
        "use_grouped_mm": True,
    }
    if model.shared_experts:
        settings["shared_experts_pattern"] = "shared_experts"
    return settings


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
