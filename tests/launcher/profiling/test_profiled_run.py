"""A run that is profiled, from the command to what is in its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditmoe.launcher.profiling import parts
from ditmoe.launcher.profiling.session import WARM_UP
from ditmoe.launcher.profiling.trace import read_trace
from ditmoe.model.config import ModelConfig
from ditmoe.model.count import flops_per_image, macs_by_module, macs_of_parts
from tests.forked import DITMOE, packed_digits, run_forked

CONFIG = """
run: {{dir: {run}}}
launch: {{processes: 2, device: cpu, threads: 1}}
model: {{depth: 2, hidden: 32, heads: 4, patch: 2, experts: 4, experts_per_token: 2}}
data: {{sources: [{{path: {shards}}}], workers: 1}}
parallel: {{expert: 2, zero: 1}}
train: {{steps: 7, batch: 16, precision: fp32, log_every: 1, checkpoint_every: 5}}
optim: {{lr: 1.0e-3}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two processes, experts shared out: with a profile, with skipped steps in it, and too short for it."""
    folder = tmp_path_factory.mktemp("profiled")
    shards = packed_digits(folder)
    found = {}
    overrides = {
        "profiled": ["train.profile=2"],
        "skipping": ["train.profile=2", "train.skip_steps=[5,6]", "train.steps=8"],
        "short": ["train.profile=4"],
    }
    earlier = folder / "skipping" / "profile" / f"step-{WARM_UP + 1:08d}"
    (earlier / "unfinished-1").mkdir(parents=True)
    (earlier / "trace-rank-00005.json.gz").write_bytes(b"of a start with more processes")
    for name, override in overrides.items():
        found[name] = folder / name
        config = folder / f"{name}.yaml"
        config.write_text(CONFIG.format(run=found[name], shards=shards))
        done = run_forked([*DITMOE, "train", str(config), *override], folder / f"{name}-ranks", 2)
        assert done.returncode == 0, done.stderr
    return found


def losses(run: Path) -> list[tuple[float, float]]:
    records = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"]) for record in records]


def test_a_profile_has_every_part_and_changes_nothing(runs: dict[str, Path]) -> None:
    folder = runs["profiled"] / "profile" / f"step-{WARM_UP + 1:08d}"
    profiles: list[dict[str, Any]] = json.loads((folder / "profile.json").read_text())
    assert [profile["rank"] for profile in profiles] == [0, 1]
    expected = set(parts.PARTS) - {parts.MLP}
    for profile in profiles:
        assert profile["steps"] == 2
        assert set(profile["parts"]) == expected
        seconds = {name: times["forward"] + times["backward"] for name, times in profile["parts"].items()}
        assert sum(seconds.values()) == pytest.approx(profile["step_seconds"])
        assert all(seconds[name] > 0 for name in expected)
        for name in (
            parts.ATTENTION,
            parts.EXPERTS,
            parts.SHARED,
            parts.DISPATCH,
            parts.ROUTER,
            parts.FINAL_LAYER,
        ):
            assert profile["parts"][name]["backward"] > 0, name
        assert 0 < profile["hidden_seconds"] <= profile["sending_seconds"] < profile["step_seconds"]
    table = (folder / "table.txt").read_text()
    assert all(f"\n{name} " in table for name in expected)
    assert losses(runs["profiled"]) == losses(runs["short"])


def test_what_is_sent_is_what_was_planned(runs: dict[str, Path]) -> None:
    """To the byte; what goes to experts varies with the tokens, and as much arrives as is sent."""
    folder = next((runs["profiled"] / "profile").iterdir())
    profiles = json.loads((folder / "profile.json").read_text())
    planned = [profile["planned"] for profile in profiles]
    sent = [profile["sent"] for profile in profiles]
    assert set(planned[0]) == {"all-to-all", "all-reduce", "all-gather"}
    assert sum(each.pop("all-to-all") for each in sent) == sum(each.pop("all-to-all") for each in planned)
    assert sent == planned
    assert (folder / "table.txt").read_text().count("exactly") == 3


def test_steps_without_an_update_are_passed_over(runs: dict[str, Path]) -> None:
    """Steps 5 and 6 compute and send nothing: 4 and 7 are timed, and what 8 sends is counted."""
    folder = runs["skipping"] / "profile" / f"step-{WARM_UP + 1:08d}"
    profiles = json.loads((folder / "profile.json").read_text())
    assert [profile["steps"] for profile in profiles] == [2, 2]
    for profile in profiles:
        assert profile["sent"]["all-reduce"] == profile["planned"]["all-reduce"] > 0
    board = EventAccumulator(str(runs["skipping"] / "tensorboard")).Reload()
    assert [event.step for event in board.Images("profile")] == [8]


@pytest.mark.parametrize("name", ["profiled", "skipping"])
def test_it_is_shown_beside_the_run(runs: dict[str, Path], name: str) -> None:
    """Nothing of an earlier start from the same step stays beside it."""
    run = runs[name]
    folder = next((run / "profile").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == [
        "profile.json",
        "table.txt",
        "timeline.png",
        "trace-rank-00000.json.gz",
        "trace-rank-00001.json.gz",
    ]
    assert (folder / "table.txt").read_text().splitlines()[0] in (run / "log.txt").read_text()
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert "profile" in board.Tags()["images"]
    assert "profile/text_summary" in board.Tags()["tensors"]
    first, second = (read_trace(folder / f"trace-rank-0000{rank}.json.gz") for rank in (0, 1))
    # On one clock: both are in a step at the same time.
    assert first.steps[0][0] < second.steps[0][1] and second.steps[0][0] < first.steps[0][1]


def test_a_run_that_is_too_short_says_so_and_goes_on(runs: dict[str, Path]) -> None:
    run = runs["short"]
    said = "no profile: the run ends after step 7; train.profile = 4 needs steps 4 to 8"
    assert said in (run / "log.txt").read_text()
    assert len(losses(run)) == 7


def test_every_product_of_matrices_has_a_part() -> None:
    for experts in (0, 4):
        config = ModelConfig(
            depth=3,
            hidden=32,
            heads=4,
            patch=2,
            experts=experts,
            experts_per_token=2 if experts else 0,
            image_size=8,
            channels=1,
            num_classes=10,
        )
        by_part: dict[str, int] = {}
        for name, macs in macs_by_module(config).items():
            part = parts.part_of_module(name)
            assert part != parts.REST, name
            by_part[part] = by_part.get(part, 0) + macs * (config.depth if name.startswith("blocks.") else 1)
        assert 2 * sum(by_part.values()) == flops_per_image(config)
        assert by_part[parts.FINAL_LAYER] == macs_of_parts(config).final_layer
        assert (parts.MLP in by_part) == (not experts) and (parts.EXPERTS in by_part) == bool(experts)
