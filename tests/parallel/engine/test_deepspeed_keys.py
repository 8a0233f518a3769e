"""Each of DeepSpeed's keys that may be set leaves losses and gradient norms as they are."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

from ditmoe.parallel.engine.deepspeed_keys import GOVERNED, PASSED, key_problems
from tests.test_repository import ROOT

Runner = Callable[..., list[dict[str, Any]]]

VALUES: Final[dict[str, Any]] = {
    "reduce_bucket_size": 1000,
    "allgather_bucket_size": 1000,
    "allgather_partitions": False,
    "use_multi_rank_bucket_allreduce": False,
    "reduce_scatter": False,
    "overlap_comm": True,  # the default of ZeRO 1 and 2 is false
    "contiguous_gradients": False,
    "round_robin_gradients": True,
    "parameter_alignment": True,
    "sub_group_size": 5000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 1000,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 1000,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "async_split_plan": False,  # all of these are other on a GPU
    "combine_impl": "weighted_sum",
    "gate_up_impl": "separate",
    "comm_backend": "comm",
    "communication_data_type": "fp32",
    "grad_accum_dtype": "fp32",
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
}
"""A value of each key that is not its default, and has its effect in the tests' network."""
COMMON: Final = {"steps": 2, "depth": 2, "clip": 0.3}


def section(key: str, value: Any) -> dict[str, Any]:
    """The `deepspeed` section that sets one key."""
    group, _, leaf = key.rpartition(".")
    return {group: {leaf: value}} if group else {leaf: value}


def cases() -> Iterator[dict[str, Any]]:
    """Every key on every stage that it is for, with experts dealt out and, where that is refused, without.

    Those that are for GPUs alone are in tests/parallel/test_gpus.py.
    """
    for key, known in PASSED.items():
        if known.needs_experts:
            continue
        value = VALUES[key.rpartition(".")[2]]
        for zero in known.zero:
            expert = 1 if known.zero_with_experts is not None and zero not in known.zero_with_experts else 2
            if zero or key == "wall_clock_breakdown":
                yield {**COMMON, "zero": zero, "expert": expert, "deepspeed": section(key, value)}
    for key in ("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "round_robin_gradients"):
        yield {
            **COMMON,
            "zero": 1,
            "pipe": 2,
            "micro_batch": 4,
            "deepspeed": section(f"zero_optimization.{key}", VALUES[key]),
        }


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_each_key_leaves_the_curve_as_it_is(run_cases: Runner) -> None:
    chosen = list(cases())
    plain: dict[str, Any] = {**COMMON, "zero": 0, "expert": 1}
    reference, *results = run_cases(2, [plain, *chosen])
    for case, result in zip(chosen, results, strict=True):
        assert "error" not in result, (case, result)
        np.testing.assert_allclose(result["curve"], reference["curve"], rtol=1e-5, err_msg=str(case))
        assert result["ema"] == pytest.approx(reference["ema"], rel=1e-5), case


def test_every_key_has_a_value_that_fits_and_is_documented() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert len(VALUES) == len(PASSED) and not PASSED.keys() & GOVERNED.keys()
    for key, known in PASSED.items():
        assert known.fits(VALUES[key.rpartition(".")[2]]), key
        stages = " ".join(map(str, known.zero))
        assert f"| `{key.removeprefix('zero_optimization.')}` | {stages} |" in page.replace(",", ""), key


@pytest.mark.parametrize("key", [key for key, known in PASSED.items() if known.zero_with_experts is not None])
def test_what_experts_do_not_go_with_is_refused(key: str) -> None:
    for zero in PASSED[key].zero:
        refused = key_problems(section(key, VALUES[key.rpartition(".")[2]]), zero, expert=2)
        assert bool(refused) == (zero not in (PASSED[key].zero_with_experts or ())), refused
