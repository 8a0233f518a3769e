"""One rank under fake tensors: it agrees with the planner, and its expert layer with DeepSpeed's."""

import json
import subprocess
import sys
from typing import Any, Final

import pytest

from ditmoe.parallel.planner.expert_layer import even_routing

CODE: Final = """
import json, resource, sys
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.count import preset_config
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.dry_run import dry_run
from ditmoe.parallel.planner.memory import Workload, rank_memory
from ditmoe.parallel.planner.traffic import control_traffic, step_traffic

results = []
for case in json.loads(sys.argv[1]):
    config = preset_config(*case["preset"])
    layout, work = Layout(**case["layout"]), Workload(*case["workload"])
    found = dry_run(config, ObjectiveConfig(kind=case["objective"]), layout, work, case["rank"])
    expected = rank_memory(config, layout, found.blocks, found.stage, work)
    traffic = step_traffic(config, layout, found.blocks, work)
    traffic.subtract(control_traffic(config, layout, found.blocks, work))
    results.append({
        "seconds": found.seconds,
        "found": vars(found.memory),
        "expected": vars(expected),
        "sent": dict(+found.sent),
        "traffic": dict(+traffic),
    })
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"results": results, "gib": peak / 2**20}))
"""


def case(preset: str, size: int, rank: int, workload: tuple[Any, ...], **axes: Any) -> dict[str, Any]:
    layout = {"pipe": 1, "data": 1, "expert": 1, "tensor": 1, "zero": 1, "micro_batch": 4, "accumulation": 1}
    objective = "ddpm" if preset.startswith("DiT-S") else "rectified_flow"
    return {
        "preset": (preset, size),
        "rank": rank,
        "workload": workload,
        "layout": layout | axes,
        "objective": objective,
    }


CASES: Final = {
    "16.5B, 1,024 ranks": case("DiT-G/2-16E2A", 512, 5, ("bf16", False), data=1024, expert=16, micro_batch=8),
    "16.5B, the fullest rank": case("DiT-G/2-16E2A", 512, 16, ("bf16", False, 2.0), data=256, pipe=4, expert=16),
    "stages": case("DiT-S/2-8E2A", 256, 4, ("bf16", False), pipe=3, data=4, expert=2, accumulation=8),
    "recomputation": case("DiT-S/2-8E2A", 512, 1, ("bf16", True), data=8, expert=8, zero=2, accumulation=2),
    "ZeRO 3": case("DiT-S/2-16E2A", 256, 3, ("bf16", False), data=8, expert=4, zero=3, accumulation=2),
    "fp32": case("DiT-S/2-8E2A", 256, 0, ("fp32", False), data=4, zero=0, accumulation=2),
    "tensor": case("DiT-S/2-8E2A", 256, 1, ("bf16", False), tensor=2, data=4),
    "dense": case("DiT-S/2", 256, 0, ("bf16", False), data=2, micro_batch=16),
}
SLOW: Final = [name for name in CASES if name.startswith("16.5B")]
"""Each takes ten seconds to be built."""
NAMES: Final = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
CLOSE: Final = ("weights", "gradients", "optimizer", "ema", "peak")


class DryRuns:
    """The cases of a kind, in one process of their own once the first is asked for: they have a process group."""

    def __init__(self) -> None:
        self._done: dict[bool, dict[str, Any]] = {}

    def of(self, name: str) -> dict[str, Any]:
        """What was found and what was expected, and the memory of the process."""
        is_slow = name in SLOW
        if is_slow not in self._done:
            self._done[is_slow] = self._run([each for each in CASES if (each in SLOW) == is_slow])
        return self._done[is_slow][name]

    def _run(self, names: list[str]) -> dict[str, Any]:
        arguments = [sys.executable, "-W", "ignore", "-c", CODE, json.dumps([CASES[name] for name in names])]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        return {
            name: {**result, "gib": found["gib"]} for name, result in zip(names, found["results"], strict=True)
        }


@pytest.fixture(scope="module")
def dry_runs() -> DryRuns:
    return DryRuns()


@pytest.mark.timeout(280)
@pytest.mark.parametrize("name", NAMES)
def test_memory_agrees_with_the_planner(dry_runs: DryRuns, name: str) -> None:
    found, expected = dry_runs.of(name)["found"], dry_runs.of(name)["expected"]
    for part in CLOSE:
        assert found[part] == pytest.approx(expected[part], rel=0.05), part


@pytest.mark.parametrize("name", NAMES)
def test_collectives_agree_with_the_planner(dry_runs: DryRuns, name: str) -> None:
    """Exactly; ZeRO 3's gathers are of whole modules here, and an imbalance is rounded to whole tokens."""
    sent, traffic = dry_runs.of(name)["sent"], dry_runs.of(name)["traffic"]
    exact = name not in ("ZeRO 3", "16.5B, the fullest rank")
    assert sent == (traffic if exact else pytest.approx(traffic, rel=0.02))


@pytest.mark.parametrize("name", [each for each in NAMES if each.values[0] in ("ZeRO 3", SLOW[0])])
def test_no_memory_is_needed(dry_runs: DryRuns, name: str) -> None:
    assert dry_runs.of(name)["gib"] < 2


def test_routing() -> None:
    even = even_routing(100, 4, 2)
    assert even.send == even.receive == (25,) * 4
    full, other = even_routing(100, 4, 0, 2.0), even_routing(100, 4, 3, 2.0)
    assert full.send == other.send == (50, 17, 17, 16)
    assert full.receive == (50,) * 4 and other.receive == (16,) * 4
