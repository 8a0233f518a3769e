"""`ditmoe plan`: the layouts it offers can run, it answers soon, and the runs of configs/ are what it chose."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ditmoe.launcher.cli import app
from ditmoe.launcher.commands.plan import command
from ditmoe.launcher.configuration.resolve import resolve
from ditmoe.launcher.configuration.run_config import load_config
from ditmoe.launcher.configuration.sections import LaunchConfig
from ditmoe.launcher.planning.plan import plans
from ditmoe.launcher.planning.train_dry_run import dry_run, largest_stage
from ditmoe.model.count import count
from ditmoe.model.dit import Block
from ditmoe.model.errors import UserError
from ditmoe.parallel.planner.anatomy import Anatomy, Weight
from ditmoe.parallel.planner.estimate import Machine, Plan
from ditmoe.parallel.planner.gpus import GPUS, tflops_of_device
from ditmoe.parallel.planner.search import MOST_CANDIDATES, candidates, divisors, left_out

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = sorted((ROOT / "configs").glob("dit-*.yaml"))
LARGEST = ROOT / "configs" / "dit-g-2-16e2a-512-128gpus.yaml"
GIB = 2**30
Write = Callable[..., Path]


def plan(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def configuration(write_config: Write, **train: Any) -> str:
    model = {"preset": "DiT-S/2-8E2A", "image_size": 32, "channels": 4, "num_classes": 1000}
    return str(write_config(launch={}, model=model, parallel={}, train={"batch": 256, **train}))


def test_every_layout_it_offers_can_run(write_config: Write) -> None:
    path = configuration(write_config)
    found = json.loads(plan(path, "--gpus", "8", "--all", "--json").stdout)
    assert len(found) > 50 and found[0]["fits"]
    axes = {key: {entry["layout"][key] for entry in found} for key in ("pipe", "expert", "zero", "tensor")}
    assert axes == {"pipe": {1, 2, 4, 8}, "expert": {1, 2, 4, 8}, "zero": {1, 2, 3}, "tensor": {1, 2}}
    for entry in found[:: len(found) // 25]:
        overrides = [*entry["overrides"], "launch.processes=8"]
        parallel = load_config(Path(path), overrides).parallel
        assert parallel.pipe * parallel.tensor * (parallel.data or 0) == 8
    speeds = [entry["images_per_second"] for entry in found if entry["fits"]]
    assert speeds == sorted(speeds, reverse=True)


def test_the_best_is_explained(write_config: Write) -> None:
    done = plan(configuration(write_config), "--gpus", "8", "--gpu", "rtx4090")
    assert done.exit_code == 0, done.output
    for words in ("8 × RTX 4090 (24 GiB)", "The best:", "ZeRO", "all-gather", "none was measured on a GPU"):
        assert words in done.stdout
    overrides = re.search(r"^  (parallel\.pipe=.*)$", done.stdout, re.MULTILINE)
    assert overrides is not None
    assert plan(configuration(write_config), *overrides[1].split(), "--gpus", "8").exit_code == 0


def test_what_does_not_fit_is_said(write_config: Write) -> None:
    done = plan(configuration(write_config), "--gpus", "1", "--memory", "1")
    assert "0 of them fit" in done.stdout and "No layout fits" in done.stdout


def test_mistakes(write_config: Write) -> None:
    path = configuration(write_config)
    for arguments, words in (
        (["--gpus", "8", "--gpu", "h1000"], "--gpu h1000"),
        (["--gpus", "13"], "no layout can run"),
        ([], "--gpus is missing"),
        (["--gpus", "8", "--dry-run", "--rank", "8"], "expected 0 to 7"),
        (["--gpus", "8", "--dry-run", "--imbalance", "2"], "at most parallel.expert = 1"),
    ):
        done = plan(path, *arguments)
        assert isinstance(done.exception, UserError) and words in str(done.exception), arguments
    assert command.__doc__


def test_4096_gpus_take_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: for each layout the tensors are walked a few times, however many its stages and GPUs."""
    walks: Counter[int] = Counter()
    stage = Anatomy.stage

    def counted(self: Anatomy, blocks: range) -> Iterator[Weight]:
        walks[len(blocks)] += 1
        return stage(self, blocks)

    monkeypatch.setattr(Anatomy, "stage", counted)
    found = plans(load_config(LARGEST, ["train.batch=4096"]), 4096, Machine(GPUS["h100"]))
    assert {entry.layout.pipe for entry in found} > {1, 8, 32}
    assert len(found) < walks.total() < 12 * len(found)


def test_any_number_of_gpus_is_answered() -> None:
    for number in (1, 2, 12, 97, 4096, 30_030, 65_536):
        assert list(divisors(number)) == [each for each in range(1, number + 1) if number % each == 0]
    assert len(divisors(2**24)) == 25
    done = plan(str(LARGEST), "--gpus", str(2**60))
    assert done.exit_code == 2 and "--gpus" in done.output


HUGE = [
    *("model.preset=null", "model.patch=1", "model.depth=1000", "model.hidden=720720", "model.heads=180180"),
    *("model.experts=55440", "model.experts_per_token=2"),
    *("train.micro_batch=null", "parallel.data=null", "parallel.expert=1", "parallel.zero=1"),
]


@pytest.mark.parametrize(("gpus", "batch"), [(1_000_000, 10**6), (720_720, 14_414_400)])
def test_numbers_with_many_divisors_are_tried_in_part(gpus: int, batch: int) -> None:
    """Work is counted: how many layouts are tried, of however many there are."""
    config = load_config(LARGEST, [*HUGE, f"train.batch={batch}"])
    tried = list(candidates(config.model, gpus, batch))
    assert MOST_CANDIDATES / 4 < len(tried) == len(set(tried)) <= MOST_CANDIDATES
    missed = left_out(config.model, gpus, batch)
    assert missed > 0 and all(layout.processes == gpus and layout.batch == batch for layout in tried)
    # The ends of each axis are there, and its middle.
    pipes = sorted({layout.pipe for layout in tried})
    assert pipes[0] == 1 and pipes[-1] == max(number for number in divisors(gpus) if number <= 1000)
    assert len(pipes) > 3 and {layout.zero for layout in tried} == {0, 1, 2, 3}


def test_every_layout_of_a_real_cluster_is_tried() -> None:
    for gpus, batch in ((64, 1024), (4096, 4096), (16_384, 16_384)):
        config = load_config(LARGEST, [f"train.batch={batch}"])
        tried = sum(
            4 * len([n for n in divisors(16) if data % n == 0]) * len(divisors(batch // data))
            for pipe in divisors(gpus)
            for tensor in divisors(gpus // pipe)
            for data in [gpus // pipe // tensor]
            if pipe <= 40 and 16 % tensor == 0 and batch % data == 0
        )
        assert len(list(candidates(config.model, gpus, batch))) == tried and not left_out(
            config.model, gpus, batch
        )


def test_the_answer_says_that_layouts_were_not_tried(write_config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = configuration(write_config)
    assert "not tried" not in plan(path, "--gpus", "8").stdout
    monkeypatch.setattr("ditmoe.parallel.planner.search.MOST_CANDIDATES", 300)
    monkeypatch.setattr("ditmoe.parallel.planner.search._MOST_SIZES", (2**16, 3, 2))
    done = plan(path, "--gpus", "64", "--gpu", "h100", "train.batch=1024")
    assert re.search(r"^[\d,]+ more layouts were not tried", done.stdout, re.MULTILINE), done.output


def test_a_dry_run_builds_one_block_and_shows_few_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is counted: blocks that are built and ranks that are shown, however deep the network is."""
    built: list[int] = []
    block = Block.__init__

    def counted(self: Block, config: Any) -> None:
        built.append(1)
        block(self, config)

    monkeypatch.setattr(Block, "__init__", counted)
    axes = [*HUGE[:-4], "parallel.pipe=1000", "parallel.data=720", "parallel.expert=720", "parallel.zero=1"]
    config = load_config(LARGEST, [*axes, "train.micro_batch=1", f"train.batch={720 * 1000}"])
    text = dry_run(config, "a test")
    assert sum(built) <= 3
    lines = text.splitlines()
    assert len([line for line in lines if ", copy 0 of the experts" in line]) == 9
    assert max(map(len, [line for line in lines if "of the experts" in line])) < 500


def test_plan_counts_with_given_machines(write_config: Write) -> None:
    """Eight experts over eight GPUs: within one machine, or between two."""
    path = configuration(write_config)
    arguments = (path, "--gpus", "8", "--all", "--json")
    one, two = (json.loads(plan(*arguments, "--gpus-per-node", node).stdout) for node in ("8", "4"))
    seconds = [
        next(entry["seconds"]["all-to-all"] for entry in found if entry["layout"]["expert"] == 8)
        for found in (one, two)
    ]
    assert seconds[1] > 2 * seconds[0]


def test_a_run_for_each_published_model() -> None:
    presets = {(load_config(path, []).model.preset, load_config(path, []).model.image_size) for path in PUBLISHED}
    small = {(f"DiT-{size}/2-8E2A", side) for size in ("S", "B", "L", "XL") for side in (32, 64)}
    assert presets == {*small, ("DiT-S/2-16E2A", 32), ("DiT-S/2-16E2A", 64), ("DiT-G/2-16E2A", 64)}


def figures(plan: Plan) -> list[str]:
    """The lines of a configuration's header that say what its layout needs and reaches."""
    memory = plan.memory
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimiser": memory.optimizer}
    parts |= {"EMA": memory.ema, "activations": memory.activations, "buffers": memory.buffers}
    sent = {kind: size for kind, size in plan.traffic.most_common() if size / GIB >= 0.005}
    return [
        f"{plan.images_per_second:,.0f} images/s, {plan.step_seconds:.3f} s a step, MFU {plan.mfu:.1%},"
        f" peak {memory.peak / GIB:.1f} GiB of a GPU",
        "GiB: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()),
        "sent in a step, GiB: " + ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in sent.items()),
    ]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each passes `--dry-run` without its data, has the published settings, and what the planner chose for it."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "# without data: shards/imagenet-latents" in done.stdout and "`ditmoe data encode" in done.stdout
    values = yaml.safe_load(done.stdout)
    assert values["train"]["batch"] == 1024 and values["optim"]["lr"] == 1e-4 and values["ema"]["decay"] == 0.9999
    text = path.read_text()
    gpus = int(re.search(r"--gpus (\d+)", text)[1])  # type: ignore[index]
    chosen = plans(load_config(path, []), gpus, Machine(GPUS["h100"]))[0]
    layout = {key: values["parallel"][key] for key in ("pipe", "tensor", "expert", "data", "zero")}
    assert layout == {key: vars(chosen.layout)[key] for key in layout}
    assert values["train"]["micro_batch"] == chosen.layout.micro_batch
    assert values["parallel"]["activation_checkpointing"] == chosen.workload.recompute
    assert [line[4:] for line in text.splitlines() if line.startswith("#   ")] == figures(chosen)
    dry_run = re.search(r"^# peak +([\d.]+)$", done.stdout, re.MULTILINE)
    assert dry_run is not None and float(dry_run[1]) == pytest.approx(chosen.memory.peak / GIB, abs=0.001)
    assert f", on {gpus} H100 SXM." in text and f"configs/{path.name} --gpus {gpus}`" in text


def test_every_shipped_run_is_held_to_what_its_header_says() -> None:
    """By the tests above and those below; a new one needs one too."""
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == {
        *(path.stem for path in PUBLISHED),
        "demo",
        "shapes",
        "photos",
        "photos-cpu",
    }


@pytest.mark.parametrize(
    ("name", "side", "channels", "classes"),
    [("demo", 8, 1, 10), ("shapes", 32, 3, 10), ("photos", 64, 3, 1000), ("photos-cpu", 32, 3, 10)],
)
def test_headers_of_the_small_runs(name: str, side: int, channels: int, classes: int) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    given = {"image_size": side, "channels": channels, "num_classes": classes}
    config = load_config(path, [f"model.{key}={value}" for key, value in given.items()])
    header = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"{side}×{side}" in header or f"{side}² RGB" in header
    found = count(config.model)
    if sizes := re.search(r"of ([\d.]+)M parameters, of which ([\d.]+)M work on a token", header):
        assert sizes.groups() == (f"{found.total / 1e6:.1f}", f"{found.activated / 1e6:.1f}")
    if name != "photos":
        assert sizes is not None
        return
    assert f"{config.model.tokens} tokens each" in header
    memory = re.search(r"on ([\d, or]+) GPUs of (\d+) GiB or more: the planner counts ([\d.]+) GiB on one", header)
    assert memory is not None
    for gpus in map(int, re.findall(r"\d+", memory[1])):
        resolved = resolve(config.model_copy(update={"launch": LaunchConfig(processes=gpus)}), None, gpus)
        _, needed = largest_stage(resolved)
        assert Machine(replace(GPUS["rtx4090"], memory_gib=float(memory[2]))).fits(needed)
        if gpus == 1:
            assert f"{needed.peak / GIB:.1f}" == memory[3]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_the_peak_by_the_driver_s_name(name: str, peak: float | None) -> None:
    assert tflops_of_device(name, "bf16") == peak
