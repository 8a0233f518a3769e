"""`ditmoe plan`: the layouts it offers can run, it answers soon, and the runs of configs/ are what it chose."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ditmoe.launcher.cli import app
from ditmoe.launcher.commands.plan import command
from ditmoe.launcher.configuration.run_config import load_config
from ditmoe.launcher.planning.plan import plans
from ditmoe.launcher.planning.train_dry_run import dry_run
from ditmoe.model.count import count
from ditmoe.model.dit import Block
from ditmoe.model.errors import UserError
from ditmoe.parallel.planner.anatomy import Anatomy, Weight
from ditmoe.parallel.planner.estimate import Machine, Plan
from ditmoe.parallel.planner.gpus import GPUS, tflops_of_device
from ditmoe.parallel.planner.search import EQUAL, MOST_CANDIDATES, candidates, divisors, left_out

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
    answer = json.loads(plan(path, "--gpus", "8", "--all", "--json").stdout)
    found = answer["plans"]
    assert len(found) == answer["layouts"]["can_run"] > 50 and found[0]["fits"]
    axes = {key: {entry["layout"][key] for entry in found} for key in ("pipe", "expert", "zero", "tensor")}
    assert axes == {"pipe": {1, 2, 4, 8}, "expert": {1, 2, 4, 8}, "zero": {1, 2, 3}, "tensor": {1, 2}}
    for entry in found[:: len(found) // 25]:
        overrides = [*entry["overrides"], "launch.processes=8"]
        parallel = load_config(Path(path), overrides).parallel
        assert parallel.pipe * parallel.tensor * (parallel.data or 0) == 8
    fitting = [entry for entry in found if entry["fits"]]
    assert len(fitting) == answer["layouts"]["fit"] and found[: len(fitting)] == fitting
    rest = [entry["memory_bytes"]["peak"] for entry in found[len(fitting) :]]
    assert rest == sorted(rest)


def test_the_fastest_come_first_and_among_equals_the_fewest_micro_steps(write_config: Write) -> None:
    path = configuration(write_config)
    for gpus in ("1", "8"):
        found = json.loads(plan(path, "--gpus", gpus, "--all", "--json").stdout)["plans"]
        fitting = [entry for entry in found if entry["fits"]]
        speeds = [entry["images_per_second"] for entry in fitting]
        for place, speed in enumerate(speeds):
            assert max(speeds[place:]) <= speed / (1 - EQUAL), (
                "no later one is faster but by what counts as nothing"
            )
        equals = [entry for entry in fitting if entry["images_per_second"] >= (1 - EQUAL) * max(speeds)]
        steps = [entry["layout"]["accumulation"] for entry in equals]
        assert fitting[: len(equals)] == equals and steps == sorted(steps)
        assert gpus == "8" or len(set(steps)) > 3


def test_the_best_is_explained(write_config: Write) -> None:
    done = plan(configuration(write_config), "--gpus", "8", "--gpu", "rtx4090")
    assert done.exit_code == 0, done.output
    for words in ("8 × RTX 4090 (24 GiB)", "The best:", "ZeRO", "all-gather", "none was measured on a GPU"):
        assert words in done.stdout
    for words in ("limited by compute (matrix products)", "days (", "GPU-hours", "GiB a rank (the saver's copy"):
        assert words in done.stdout, words
    overrides = re.search(r"^  (parallel\.pipe=.*)$", done.stdout, re.MULTILINE)
    assert overrides is not None
    assert plan(configuration(write_config), *overrides[1].split(), "--gpus", "8").exit_code == 0


def test_the_whole_run_adds_up(write_config: Write) -> None:
    """Time, checkpoints, host memory and data, in text and in JSON, from the step and the parameters."""
    path = configuration(write_config, steps=700_000)
    found = json.loads(plan(path, "--gpus", "8", "checkpoint.keep_every=100_000", "--json").stdout)
    for entry in found["plans"]:
        run, ranks = entry["run"], 8
        assert run["hours"] == pytest.approx(entry["step_seconds"] * 700_000 / 3600) == run["days"] * 24
        assert run["gpu_hours"] == pytest.approx(run["hours"] * ranks) and run["images"] == 700_000 * 256
        assert run["checkpoint_bytes"] == 16 * found["parameters"]
        assert run["disk_bytes"] == (2 + 7 + 1) * run["checkpoint_bytes"]
        assert run["samples_per_second"] == entry["images_per_second"]
        # The index of the tests' shards: 20 samples in 1,000 bytes.
        assert run["bytes_per_second"] == pytest.approx(entry["images_per_second"] * 50)
        layout, host = entry["layout"], run["host"]
        if layout["pipe"] == layout["tensor"] == 1:
            # Every parameter is copied by one of its ranks.
            assert host["copy_bytes"] * ranks == pytest.approx(run["checkpoint_bytes"], rel=1e-4)
        assert host["offload_bytes"] == host["training_bytes"] == 0
        assert run["host_of_machine_bytes"] == host["total_bytes"] * 8
    best = found["plans"][0]
    text = plan(path, "--gpus", "8", "checkpoint.keep_every=100_000").stdout
    for words in (
        f"{best['run']['hours'] / 24:.2f} days ({best['run']['hours']:,.2f} hours)",
        f"{best['run']['gpu_hours']:,.1f} GPU-hours",
        "50 bytes a sample, as in",
        f"checkpoint: {best['run']['checkpoint_bytes'] / 1e9:.1f} GB",
    ):
        assert words in text, words
    waits = json.loads(plan(path, "--gpus", "8", "checkpoint.asynchronous=false", "--json").stdout)["plans"][0]
    assert waits["run"]["host"]["copy_bytes"] == 0
    moved = json.loads(plan(path, "--gpus", "8", "parallel.offload=true", "--json").stdout)["plans"]
    assert all(entry["run"]["host"]["offload_bytes"] > entry["run"]["host"]["copy_bytes"] > 0 for entry in moved)


def test_the_own_layout_is_ranked(write_config: Write) -> None:
    path = configuration(write_config)
    every = json.loads(plan(path, "--gpus", "8", "--all", "--json").stdout)
    fitting = [entry for entry in every["plans"] if entry["fits"]]
    for place in (0, len(fitting) // 2, len(fitting) - 1):
        keys = fitting[place]["overrides"]
        own = json.loads(plan(path, *keys, "--gpus", "8", "--json").stdout)["own"]
        assert own["place"] == place + 1 and own["layout"] == fitting[place]["layout"]
        text = plan(path, *keys, "--gpus", "8").stdout
        assert f"own layout is number {place + 1} of {len(fitting)} that fit" in text
        assert place == 0 or "slower than the best: " in text or "as fast as the best" in text
    # One that does not fit, and one that cannot run.
    text = plan(path, "--gpus", "1", "--memory", "16").stdout
    assert re.search(
        r"own layout does not fit: it takes [\d.]+ GiB of 16, most of it activations, [\d.]+ GiB", text
    )
    done = plan(path, "parallel.data=4", "--gpus", "8")
    assert "own layout cannot run on 8:" in done.stdout and "parallel.data = 4 must be" in done.stdout
    assert json.loads(plan(path, "parallel.data=4", "--gpus", "8", "--json").stdout)["own"]["problems"]


def test_what_does_not_fit_is_said_with_the_nearest_that_fits(write_config: Write) -> None:
    path = configuration(write_config)
    done = plan(path, "--gpus", "1", "--memory", "4")
    assert "0 of them fit" in done.stdout and "No layout fits: the one that needs least takes" in done.stdout
    assert "parallel.offload=true: " in done.stdout and re.search(r"^  --gpus \d+: ", done.stdout, re.MULTILINE)
    nearest = json.loads(plan(path, "--gpus", "1", "--memory", "4", "--json").stdout)["nearest"]
    assert {entry["change"].partition("=")[0].partition(" ")[0] for entry in nearest} == {
        "parallel.offload",
        "--gpus",
    }
    for entry in nearest:
        # Each proposal does what it says.
        again = ["--gpus", str(entry["gpus"]), "--memory", "4", *entry["overrides"], "--json"]
        own = json.loads(plan(path, *again).stdout)["own"]
        assert own["fits"] and own["memory_bytes"] == entry["memory_bytes"]
    huge = "model.preset=null model.depth=1000 model.hidden=4096 model.heads=1 model.patch=2 parallel.offload=true"
    nothing = plan(path, *huge.split(), "--gpus", "1", "--memory", "1")
    assert "Nothing near it was found that fits" in nothing.stdout, nothing.output


def test_the_number_of_gpus_may_be_left_out(write_config: Write) -> None:
    """It is the configuration's, or else the fewest that hold the run: no number below holds it."""
    path = configuration(write_config)
    text = plan(path, "parallel.data=4").stdout
    assert "4 × H100 SXM (80 GiB), as the configuration says" in text and "the fewest that hold the run: 1" in text
    large = configuration(write_config, batch=64)
    keys = [large, "--gpu", "rtx4090", "model.preset=DiT-XL/2-8E2A"]
    found = json.loads(plan(*keys, "--json").stdout)
    assert found["gpus"] == found["fewest_gpus"] > 1 and found["plans"][0]["fits"]
    fewer = json.loads(plan(*keys, "--gpus", str(found["gpus"] - 1), "--json").stdout)
    assert fewer["layouts"]["fit"] == 0 and fewer["nearest"][-1]["gpus"] == found["gpus"]
    assert fewer["fewest_gpus"] is None


def test_a_number_of_gpus_that_cannot_run_gets_the_nearest_that_can(write_config: Write) -> None:
    path = configuration(write_config)
    done = plan(path, "--gpus", "13")
    assert "nearest that fit: train.batch=260, or --gpus 12" in str(done.exception)
    assert "train.batch = 256 must be a multiple" in str(done.exception)
    for change in (["train.batch=260", "--gpus", "13"], ["--gpus", "12"]):
        assert json.loads(plan(path, *change, "--json").stdout)["plans"][0]["fits"]


def test_any_gpu_can_be_described(write_config: Write) -> None:
    path = configuration(write_config)
    machine = ["--gpus", "8", "--memory", "16", "--bandwidth", "20", "--peak-tflops"]
    slow, fast = (json.loads(plan(path, *machine, peak, "--json").stdout) for peak in ("100", "1000"))
    assert slow["gpu"]["bf16_tflops"] == 100 and slow["gpu"]["memory_gib"] == 16 and slow["gpu"]["bandwidth"] == 20
    assert slow["plans"][0]["images_per_second"] < fast["plans"][0]["images_per_second"]
    assert "8 × GPU of 100 TFLOP/s (16 GiB)" in plan(path, *machine, "100").stdout
    # A known one with another peak keeps what is its own.
    own = json.loads(plan(path, "--gpus", "8", "--gpu", "l40s", "--peak-tflops", "100", "--json").stdout)["gpu"]
    assert own["memory_gib"] == 48 and own["bf16_tflops"] == 100


def test_a_run_without_gpus_is_planned_by_cores(write_config: Write) -> None:
    model = {"depth": 2, "hidden": 32, "heads": 2, "patch": 2, "experts": 4, "experts_per_token": 2}
    path = str(write_config(model=model))
    found = json.loads(plan(path, "--json").stdout)
    host = found["plans"][0]["run"]["host"]
    assert found["gpus"] == 2 and found["gpu"]["name"] == "CPU core" and host["training_bytes"] > 0
    # The bucket of 500 million gradients is asked for, but never written to the end.
    assert found["plans"][0]["memory_bytes"]["peak"] < 2**28
    text = plan(path).stdout
    assert "2 × CPU core (2 GiB), as the configuration says" in text and "minutes" in text


def test_mistakes(write_config: Write) -> None:
    path = configuration(write_config)
    for arguments, words in (
        (["--gpus", "8", "--gpu", "h1000"], "--gpu h1000"),
        (["--gpus", "8", "--peak-tflops", "100"], "--peak-tflops without --memory"),
        (["--gpus", "13"], "no layout can run"),
        (["--dry-run"], "--gpus is missing"),
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
        next(entry["seconds"]["all-to-all"] for entry in found["plans"] if entry["layout"]["expert"] == 8)
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
    assert (
        f"# hardware: {gpus} × H100 SXM (80 GiB each)\n" in text and f"configs/{path.name} --gpus {gpus}`" in text
    )


@pytest.mark.parametrize(("name", "side", "channels"), [("demo", 8, 1), ("shapes", 32, 3), ("photos-cpu", 32, 3)])
def test_the_parameters_of_the_small_runs(name: str, side: int, channels: int) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    given = {"image_size": side, "channels": channels, "num_classes": 10}
    found = count(load_config(path, [f"model.{key}={value}" for key, value in given.items()]).model)
    sizes = f"of {found.total / 1e6:.1f}M parameters, of which {found.activated / 1e6:.1f}M work on a token."
    assert sizes in path.read_text(encoding="utf-8").splitlines()[0]


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
