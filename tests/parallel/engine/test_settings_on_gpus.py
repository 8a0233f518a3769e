"""What is handed to DeepSpeed on GPUs, without one."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.parallel.engine import deepspeed_settings as settings
from ditmoe.parallel.engine.update import order_streams
from ditmoe.parallel.layout import Layout

GPU = torch.device("cuda", 0)
MODEL = ModelConfig(
    depth=2,
    hidden=32,
    heads=4,
    patch=2,
    experts=8,
    experts_per_token=2,
    image_size=8,
    channels=4,
    num_classes=10,
)


def generated(
    extra: dict[str, Any] | None = None,
    device: torch.device = GPU,
    largest: int = 1000,
    precision: str = "bf16",
    **axes: Any,
) -> dict[str, Any]:
    grid = {"pipe": 1, "data": 4, "expert": 1, "tensor": 1, "zero": 1, "micro_batch": 2, "accumulation": 1, **axes}
    return settings.deepspeed_settings(Layout(**grid), MODEL, precision, 1.0, extra or {}, device, largest)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.triton_ops import autoep_fused_token_ops

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(autoep_fused_token_ops, "is_available", lambda: True)


def test_gradients_are_summed_in_fp32_unless_bf16_is_asked_for() -> None:
    assert generated()["communication_data_type"] == "fp32"
    assert generated({"communication_data_type": "bf16"})["communication_data_type"] == "bf16"


@pytest.mark.parametrize(
    "axes", [{"zero": 0}, {"zero": 3}, {"data": 1}, {"pipe": 2, "data": 2}, {"offload": True}]
)
def test_only_zero_1_and_2_overlap(axes: dict[str, Any]) -> None:
    assert "overlap_comm" not in generated(**axes)["zero_optimization"]
    for zero in (1, 2):
        assert generated(zero=zero)["zero_optimization"]["overlap_comm"] is True
        assert "overlap_comm" not in generated(zero=zero, device=torch.device("cpu"))["zero_optimization"]


def test_every_tensor_fits_a_bucket_that_is_reduced_meanwhile() -> None:
    """A larger one would be reduced by itself, and its memory used again before that is done."""

    def zero(largest: int, **extra: Any) -> dict[str, Any]:
        found: dict[str, Any] = generated({"zero_optimization": extra}, largest=largest)["zero_optimization"]
        return found

    assert zero(1000)["reduce_bucket_size"] == settings.OVERLAPPED_BUCKET
    assert zero(10**9)["reduce_bucket_size"] == 10**9
    assert "overlap_comm" not in zero(1000, reduce_bucket_size=999)
    assert "overlap_comm" not in zero(1000, contiguous_gradients=False)
    assert zero(1000, overlap_comm=False)["overlap_comm"] is False


def test_experts_take_the_fast_ways_and_deepspeed_accepts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config, validate_autoep_config

    fast = {"async_split_plan": True, "combine_impl": "fused_weighted_sum", "gate_up_impl": "fused"}

    def accepted(extra: dict[str, Any] | None = None) -> dict[str, Any]:
        found: dict[str, Any] = generated({"expert_parallel": extra or {}}, expert=2)["expert_parallel"]
        parsed = parse_autoep_config(found)
        validate_autoep_config(parsed, world_size=4, pp_size=1, tp_size=1, sp_size=1)
        return found

    assert accepted().items() >= fast.items()
    assert accepted({"combine_impl": "weighted_sum"})["combine_impl"] == "weighted_sum"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "gate_up_impl" not in accepted()
    with pytest.raises(UserError, match="deep_ep is not installed"):
        accepted({"comm_backend": "deepep"})
    with pytest.raises(UserError, match=r"train\.precision = fp32: DeepEP sends bf16 alone"):
        generated({"expert_parallel": {"comm_backend": "deepep"}}, expert=2, precision="fp32")
    monkeypatch.setattr(settings, "find_spec", lambda _: importlib.util.find_spec("torch"))
    deep = accepted({"comm_backend": "deepep"})
    assert deep["comm_max_tokens_per_rank"] == 2 * MODEL.tokens and "combine_impl" not in deep


def test_a_cpu_has_none_of_these_ways() -> None:
    cpu = torch.device("cpu")
    found = generated(device=cpu, expert=2)["expert_parallel"]
    assert not found.keys() & {"async_split_plan", "combine_impl", "gate_up_impl", "comm_max_tokens_per_rank"}
    with pytest.raises(UserError, match="is for GPUs"):
        generated({"expert_parallel": {"async_split_plan": True}}, device=cpu, expert=2)


@pytest.mark.parametrize("zero", [2, 3])
def test_streams_are_ordered_in_place_of_a_stop(zero: int) -> None:
    """Only while a reduction ends; afterwards whatever stopped the host does so again."""
    events: list[str] = []

    class Stopping:
        def synchronize(self) -> None:
            events.append("stop")

    class Accelerator(Stopping):
        def current_stream(self) -> Any:
            return SimpleNamespace(wait_stream=lambda stream: events.append(f"wait {stream is reduction}"))

    accelerator, reduction = Accelerator(), Stopping()
    stops = accelerator if zero == 2 else reduction

    def end() -> None:
        stops.synchronize()
        events.append("end")

    def post_step(names: set[str]) -> None:
        accelerator.synchronize()
        events.append(f"{names}")

    name = "reduction_stream" if zero == 2 else "reduce_and_partition_stream"
    optimizer = SimpleNamespace(
        overlapping_partition_gradients_reduce_epilogue=end, _post_step=post_step, **{name: reduction}
    )
    order_streams(optimizer, accelerator)
    optimizer.overlapping_partition_gradients_reduce_epilogue()
    stops.synchronize()
    assert events == ["wait True", "end", "stop"]
    optimizer._post_step({"a"})
    accelerator.synchronize()
    assert events[3:] == (["stop", "{'a'}", "stop"] if zero == 2 else ["{'a'}", "stop"])
