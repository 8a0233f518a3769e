"""The planner's figures against what real processes hold and send."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from ditmoe.model.config import ModelConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.memory import Workload, rank_memory
from ditmoe.parallel.planner.traffic import step_traffic
from ditmoe.parallel.planner.zero import ZeroSettings
from ditmoe.parallel.stages import stage_blocks
from tests.forked import run_forked

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("planner_worker.py")
MODEL: Final = {
    "depth": 4,
    "hidden": 32,
    "heads": 4,
    "patch": 2,
    "experts": 4,
    "experts_per_token": 2,
    "image_size": 8,
    "channels": 1,
    "num_classes": 10,
}
PARTS: Final = ("weights", "gradients", "optimizer", "ema")
SMALL_DISTANCE: Final = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 1000,
        "stage3_max_reuse_distance": 100_000,
        "stage3_prefetch_bucket_size": 10_000,
    }
}
"""So that weights of a tiny network are gathered for each pass, as those of a large one are."""
NOTHING_KEPT: Final = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 1000,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
"""Each weight is gathered for each pass, whatever was fetched before: then what is sent is known exactly."""


def case(data: int, zero: int, expert: int = 1, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A layout, with changes to the model and the rest."""
    rest = {"clip": None, "precision": "fp32", "recompute": False, "extra": {}}
    layout = {"pipe": 1, "data": data, "expert": expert, "tensor": 1, "zero": zero, "micro_batch": 2}
    layout |= {key: changes.pop(key) for key in ("pipe", "tensor") if key in changes}
    model = {key: value for key, value in changes.items() if key not in rest}
    return {
        **rest,
        **{key: value for key, value in changes.items() if key in rest},
        "layout": {**layout, "accumulation": accumulation},
        "model": {**MODEL, **model},
    }


CASES: Final = {
    2: [
        case(2, 1, precision="bf16", accumulation=2),
        case(2, 2, precision="bf16", experts=0, experts_per_token=0),
        case(2, 3, precision="bf16", accumulation=2),
        case(2, 0, expert=2, clip=0.1, accumulation=2, recompute=True),
        case(2, 2, expert=2, clip=0.1, accumulation=2),
        case(1, 0, tensor=2, accumulation=2, recompute=True),
    ],
    4: [
        case(4, 1, expert=2),
        case(4, 1, expert=4, balance_group=8, precision="bf16"),
        case(4, 3, expert=2, accumulation=2, extra=SMALL_DISTANCE),
        case(2, 1, pipe=2, expert=2, accumulation=4),
        case(1, 1, pipe=4, accumulation=2, precision="bf16", recompute=True),
        case(2, 2, tensor=2, attention="qk_norm", precision="bf16"),
        case(1, 1, pipe=2, tensor=2, experts=0, experts_per_token=0, accumulation=2),
        case(4, 3, expert=2, accumulation=2, extra=NOTHING_KEPT),
    ],
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[list[dict[str, Any]]]]:
    """World size → per case, per rank, what was measured; the processes are started once."""
    found: dict[int, list[list[dict[str, Any]]]] = {}

    def results(world: int) -> list[list[dict[str, Any]]]:
        if world not in found:
            found[world] = []  # started once, also where it fails
            folder = tmp_path_factory.mktemp("planner")
            (folder / "cases.json").write_text(json.dumps(CASES[world]))
            arguments = [str(WORKER), str(folder / "cases.json"), str(folder / "out.json")]
            done = run_forked(arguments, folder / "ranks", world)
            assert done.returncode == 0, done.stderr[-3000:]
            found[world] = json.loads((folder / "out.json").read_text())
        return found[world]

    return results


NUMBERED: Final = [(world, number) for world, cases in CASES.items() for number in range(len(cases))]


def name(world: int, number: int) -> str:
    """A test's name: what is special about its case."""
    found = CASES[world][number]
    words = [f"{key}{found['layout'][key]}" for key in ("pipe", "data", "tensor", "expert", "zero")]
    words += [key for key in ("clip", "recompute", "extra") if found[key]]
    return "-".join([*words, found["precision"], "moe" if found["model"]["experts"] else "dense"])


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("world", "number"), NUMBERED, ids=[name(*pair) for pair in NUMBERED])
def test_state_and_collectives(measured: Any, world: int, number: int) -> None:
    """State within 5% on every rank; every kind of collective exactly.

    What a rank sends to experts depends on its tokens; over all ranks as much arrives as is sent, so the mean is
    exactly the planner's figure for even routing.
    """
    found, ranks = CASES[world][number], measured(world)[number]
    config, layout = ModelConfig.model_validate(found["model"]), Layout(**found["layout"])
    work = Workload(found["precision"], found["recompute"], zero=ZeroSettings.from_extra(found["extra"]))
    for stage, blocks in enumerate(stage_blocks(config, layout.pipe)):
        members = [of_rank for rank, of_rank in enumerate(ranks) if layout.stage(rank) == stage]
        memory = rank_memory(config, layout, blocks, stage, work)
        for part in PARTS:
            assert max(m[part] for m in members) == pytest.approx(getattr(memory, part), rel=0.05), part
        expected = dict(step_traffic(config, layout, blocks, work))
        exchanged = sum(m["sent"].pop("all-to-all", 0) for m in members)
        assert exchanged == len(members) * expected.pop("all-to-all", 0)
        if found["extra"] == SMALL_DISTANCE:
            # What DeepSpeed keeps gathered between two passes depends on what it fetched ahead.
            upper = expected.pop("all-gather")
            assert all(0 < m["sent"].pop("all-gather") <= upper for m in members)
        for measured_rank in members:
            assert measured_rank["sent"] == expected


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("world", "number"), [(2, 4), (4, 0), (4, 3)])
def test_the_dry_run_s_expert_layer_is_deepspeed_s(measured: Any, world: int, number: int) -> None:
    """The same collectives; what is kept for the backward pass, within the rows that a CPU's path adds."""
    for rank in measured(world)[number]:
        theirs, ours = rank["layers"]
        assert theirs["sent"] == ours["sent"] and theirs["calls"] == ours["calls"]
        assert ours["kept"] == pytest.approx(theirs["kept"], rel=0.05)
