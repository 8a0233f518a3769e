"""The settings that the engine hands to DeepSpeed, generated from the run's configuration.

Whatever the configuration decides is written out, defaults included: DeepSpeed's own defaults (such as clipping
at 1.0 where nothing is said) must not change a run.
"""

from importlib.metadata import version
from typing import Any

from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.parallel.engine.deepspeed_keys import key_problems
from ditmoe.parallel.layout import Layout


def deepspeed_settings(
    layout: Layout, model: ModelConfig, precision: str, clip: float | None, extra: dict[str, Any]
) -> dict[str, Any]:
    """Generate DeepSpeed's settings and merge the `deepspeed` section into them.

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
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if layout.zero in (1, 2) and not layout.offload:
        settings["zero_optimization"]["compute_grad_norm"] = False
    if layout.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if layout.pipe > 1:
        # It would send each tensor rank's share alone, and takes no second tensor with a gradient then.
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if layout.expert > 1:
        settings["expert_parallel"] = _expert_parallel(layout.expert, model)
    return _merged(settings, extra)


def suspect_of(extra: dict[str, Any]) -> str:
    """What to look at where DeepSpeed does not do what this engine expects of it, for a message."""
    if extra:
        return f"deepspeed = {extra} is what was added to its settings: leave out what is not needed"
    return (
        f"DeepSpeed {version('deepspeed')} with torch {version('torch')}; expected the versions of constraints.txt"
    )


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
        "has_shared_experts": model.has_shared,
        "top_k": model.experts_per_token,
        "score_func": "softmax",
        "score_apply": "post",
        "route_norm": False,
        "use_grouped_mm": True,
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
