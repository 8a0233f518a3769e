"""A comparison on a small network of random weights: every cell once, and the folder that shows them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ditmoe.data.storage.files import make_folder
from ditmoe.launcher.cli import app
from ditmoe.launcher.configuration.grid_file import load_comparison
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.sampling.comparison.cells import cells_of
from ditmoe.sampling.diagnostics import results as chain_files
from ditmoe.sampling.evaluation import of_run as evaluate_run
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_jobs, prepare_jobs
from ditmoe.sampling.metrics.networks import opening
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SamplerConfig
from tests.obedient import Obedient
from tests.sampling.evaluation.test_evaluate_file import Pixels
from tests.sampling.small_run import write_digits, write_noise_classifier, write_run

SCHEDULES = Path(__file__).resolve().parents[3] / "configs" / "grids"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "shards")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The feature classifier of the digits, trained once for all tests here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of chains are empty files: other tests look at them, and each takes as long as its evaluation."""

    def write(path: Path, *_: object) -> None:
        make_folder(path.parent)
        path.touch()

    monkeypatch.setattr(chain_files, "write_chain_picture", write)


GRID = """
count: 80
nfe: [2, 3, 5]
tolerances: [0.1]
samplers: [heun, euler, rk45]
"""


def command(run, shards, cache, file, *more):
    arguments = ["evaluate", str(run), "--grid", str(file), "--data", str(shards), "--cache", str(cache)]
    return CliRunner().invoke(app, [*arguments, "--no-recogniser", "--batch", "40", *more])


def test_a_grid_is_evaluated_once_and_shown(
    run: Path, shards: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text(GRID)
    drawn, loaded = [], []
    draw, load = evaluate_run.generate, evaluate_run.load_model
    monkeypatch.setattr(evaluate_run, "generate", lambda *a, **k: drawn.append(a[2]) or draw(*a, **k))
    monkeypatch.setattr(evaluate_run, "load_model", lambda *a, **k: loaded.append(a) or load(*a, **k))
    first = command(run, shards, cache, file)
    assert first.exit_code == 0, first.output
    # heun: 1, 2 and 3 steps; euler: 2, 3 and 5; rk45: one tolerance. Two chunks each.
    assert len(drawn) == 14 and len(loaded) == 1
    assert "7 evaluations" in first.output
    found = re.findall(r"^(\w+), plain, .*: FID \S+ at (\S+) NFE; (\d) of 7 left$", first.output, re.M)
    assert [name for name, _, _ in found] == ["heun"] * 3 + ["euler"] * 3 + ["rk45"]
    assert [left for _, _, left in found] == list("6543210")
    assert [float(nfe) for _, nfe, _ in found[:6]] == [1, 3, 5, 2, 3, 5]

    (folder,) = run.glob("evaluations/grid-digits-*")
    grid = json.loads((folder / "grid.json").read_text())
    assert grid["complete"] and len(grid["rows"]) == 7
    for row in grid["rows"]:
        metrics = json.loads((run / "evaluations" / row["evaluation"] / "metrics.json").read_text())
        assert row["fid"] == metrics["results"]["classifier"]["fid"] and row["seconds"] > 0
        assert row["nfe"] == metrics["evaluation"]["nfe"]
    assert (folder / "table.md").read_text() in first.output
    with Image.open(folder / "fid-nfe.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 300

    # Again, after a cell of it was lost: that one is drawn, and what else was known stays.
    lost = run / "evaluations" / grid["rows"][1]["evaluation"]
    (lost / "metrics.json").unlink()
    (lost / "chunks" / "00001.npz").unlink()
    again = command(run, shards, cache, file)
    assert again.exit_code == 0, again.output
    assert len(drawn) == 15 and len(loaded) == 2
    assert json.loads((folder / "grid.json").read_text()) == grid
    assert command(run, shards, cache, file).exit_code == 0 and len(drawn) == 15


def test_a_crew_evaluates_the_cells_as_one_process_does(
    run: Path, shards: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obedient: Obedient
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # what workers have of two cores
    file = tmp_path / "digits.yaml"
    file.write_text(GRID)
    alone = command(run, shards, cache, file)
    assert alone.exit_code == 0 and not obedient.made, alone.output
    (run / "evaluations").rename(run / "alone")
    loaded, load = [], evaluate_run.load_model
    monkeypatch.setattr(evaluate_run, "load_model", lambda *a, **k: loaded.append(a) or load(*a, **k))
    led = command(run, shards, cache, file, "--processes", "2", "--chunk", "40")
    assert led.exit_code == 0, led.output
    # The statistics of the real images are there; the network is loaded once, by the worker.
    assert obedient.stages() == {"drawn": 14, "described": 14} and len(loaded) == 1

    def rows(folder: Path) -> list[dict[str, Any]]:
        (grid,) = folder.glob("grid-digits-*/grid.json")
        return [{**row, "seconds": None} for row in json.loads(grid.read_text())["rows"]]

    assert rows(run / "evaluations") == rows(run / "alone")


@pytest.mark.usefixtures("unpainted")
def test_chains_are_compared_with_the_sampler_that_finishes_them(
    run: Path, shards: Path, cache: Path, tmp_path: Path
) -> None:
    write_noise_classifier(run)
    start = "samples_per_chain: 20, initial: euler, initial_steps: 4, burn_in_first: 3, burn_in: 3"
    file = tmp_path / "chains.yaml"
    file.write_text(
        "count: 80\nnfe: [2, 6, 12]\nsamplers: [kar1, dpm-solver++]\nchains:\n"
        f"  published: {{skip: 2, {start}}}\n  even: {{share: 0.5, step_rule: exponential, {start}}}\n"
    )
    result = command(run, shards, cache, file)
    assert result.exit_code == 0, result.output
    assert "left out: kar1, published, NFE 2: one step costs more" in result.output
    (folder,) = run.glob("evaluations/grid-chains-*")
    grid = json.loads((folder / "grid.json").read_text())
    kar1 = [row for row in grid["rows"] if row["sampler"] == "kar1"]
    # A start of 10 evaluations for 20 images is half of one for each; Tweedie's step is one.
    assert [(row["variant"], row["nfe"]) for row in kar1] == [
        *(("plain", 1), ("plain", 5), ("plain", 11)),
        *(("published", 4.5), ("published", 10.5)),
        *(("even", 4.5), ("even", 11.5)),
    ]
    assert all(row["settings"]["sampler"] == "dlg:heun" for row in kar1[3:])
    assert {(verdict["sampler"], verdict["variant"]) for verdict in grid["verdicts"]} == {
        (sampler, variant)
        for sampler in ("kar1", "dpm-solver++")
        for variant in ("published", "even", "best of the chains")
    }
    for verdict in grid["verdicts"]:
        for judgement in (verdict["at_equal_nfe"], verdict["with_twice_the_nfe_alone"]):
            points = sum(len(stretch["points"]) for stretch in judgement["won"])
            points += len(judgement["lost_at"]) + len(judgement["not_judged_at"])
            assert points > 0 and (points == 2 or verdict["variant"] != "published")


def test_every_seed_of_a_cell_is_evaluated_and_few_steps_are_told(
    run: Path, shards: Path, cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "seeds.yaml"
    file.write_text("count: 80\nnfe: [2, 3]\nsamplers: [euler, heun]\nseed: 3\nrepeats: 2\n")
    result = command(run, shards, cache, file)
    assert result.exit_code == 0, result.output
    assert "4 evaluations of 2 seeds" in result.output and "seeds 3 to 4" in result.output
    noisy = "heun with 2 steps on the karras schedule leaves noise in images: expected at least 10 steps"
    assert result.output.count(f"warning: {noisy}") == 1 and f"- {noisy}" in result.output
    (folder,) = run.glob("evaluations/grid-seeds-*")
    grid = json.loads((folder / "grid.json").read_text())
    assert grid["complete"] and len(grid["rows"]) == 4
    for row in grid["rows"]:
        found = []
        for seed in row["seeds"]:
            metrics = json.loads((run / "evaluations" / seed["evaluation"] / "metrics.json").read_text())
            assert metrics["evaluation"]["sampler"]["seed"] == seed["seed"]
            found.append(metrics["results"]["classifier"]["fid"])
            told = [line for line in metrics["results"]["classifier"]["warnings"] if "leaves noise" in line]
            assert told == ([noisy] if (row["sampler"], row["steps"]) == ("heun", 2) else [])
        assert [seed["seed"] for seed in row["seeds"]] == [3, 4] and found[0] != found[1]
        assert row["fid"] == pytest.approx(sum(found) / 2)
        assert row["deviations"]["fid"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5)


def test_processes_are_started_once_for_all_cells(run: Path, shards: Path, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("count: 80\nnfe: [1, 2]\nsamplers: [euler]\n")
    result = command(run, shards, cache, file, "--processes", "2", "--chunk", "40")
    assert result.exit_code == 0, result.output
    assert "euler, plain, 2 steps: FID" in result.output and "## Every evaluation" in result.output
    (folder,) = run.glob("evaluations/grid-two-*")
    assert json.loads((folder / "grid.json").read_text())["complete"]
    ids = {path.parent.name: json.loads(path.read_text()) for path in run.glob("evaluations/*/metrics.json")}
    assert len(ids) == 2 and all(metrics["evaluation"]["processes"] == 2 for metrics in ids.values())


def test_what_is_wrong_with_a_grid_is_told_at_once_by_key(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(
        "count: 0\nnfe: [0]\ntolerances: [2]\nplain: false\nsteps: 3\n"
        "samplers: [kar3, {sampler: kar2, churn: -1}, {sampler: euler, steps: 5}]\n"
    )
    with pytest.raises(UserError) as caught:
        load_comparison(file)
    for message in (
        f"{file}: 8 problems",
        "steps = 3: no such key",
        "count = 0: expected an integer >= 1",
        "samplers.0.sampler = 'kar3': expected one of ddpm",
        "samplers.1.churn = -1: expected a number >= 0",
        "samplers.2: steps is not for one sampler: `nfe` sets them",
        "nfe = 0: expected numbers of at least 1",
        "tolerances = 2: expected numbers between 0 and 1",
        "plain = false without chains: nothing is left to compare",
    ):
        assert message in str(caught.value)
    file.write_text(
        "samplers: [kar1, heun, rk45]\nchains:\n  a: {skip: 0}\n  b: {skp: 1}\n  c: {skip: 1, share: 0.5}\n"
        "  a|b: {}\n  plain: {}\n  d: {initial: rk45}\n"
    )
    with pytest.raises(UserError) as caught:
        load_comparison(file)
    for message in (
        "chains.a.skip = 0: expected an integer >= 1",
        "chains.b.skp = 1: no such key; did you mean chains.b.skip?",
        "chains.c: share = 0.5 and skip = 1 are both given",
        "chains.d: initial = rk45: what it costs is not known beforehand",
        "nfe is missing; expected what kar1 is to aim at",
        "tolerances is missing; expected those of rk45",
        "samplers.1 = heun: is the same as kar1",
    ):
        assert message in str(caught.value)
    file.write_text("samplers: [euler]\nnfe: [1]\nchains:\n  a|b: {}\n  plain: {}\n")
    with pytest.raises(UserError, match=r"(?s)chains\.a\|b: expected a name.*chains\.plain: expected a name"):
        load_comparison(file)
    file.write_text(
        "samplers: [heun, {sampler: euler, cfg_sigma_max: 0.2}, rk45]\nnfe: [9]\ntolerances: [0.1]\n"
        "chains:\n  a: {}\n  b: {}\ncfg_scale: 2\ncfg_sigma_min: 0.3\n"
    )
    with pytest.raises(UserError) as caught:
        load_comparison(file)
    told = str(caught.value).splitlines()
    assert told[0] == f"{file}: 4 problems" and [line.split(":")[0].strip(" -") for line in told[1:]] == [
        "samplers.0",
        "samplers.1",
        "samplers.2",
        "samplers.2",
    ], told
    assert "cfg_sigma_min, cfg_sigma_max with sampler = dlg" in told[1]
    assert "cfg_sigma_min = 0.3 is not below cfg_sigma_max = 0.2" in told[2]
    file.write_text("samplers: [heun]\nnfe: [9]\nchains: {a: {}}\ncfg_sigma_min: 0.3\n")
    assert load_comparison(file).cfg_sigma_min == 0.3, "without guidance there is no interval to refuse"


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("dmcmc", "velocity 4 steps"),
        ("dmcmc-shapes", "velocity 4 steps"),
        ("dmcmc-digits", "velocity 3 steps"),
    ],
)
def test_a_shipped_grid_is_valid(name: str, fixed: str) -> None:
    """Every integrator of the paper and DPM-Solver++, alone and with three kinds of chains."""
    cells, left_out = cells_of(load_comparison(SCHEDULES / f"{name}.yaml"), ObjectiveConfig())
    variants = {"plain", "published", "velocity", fixed}
    for sampler in ("kar1", "kar2", "euler", "reverse-diffusion", "euler-maruyama", "dpm-solver++"):
        assert {cell.variant for cell in cells if cell.sampler == sampler} == variants
    assert {cell.variant for cell in cells if cell.sampler == "rk45"} == variants - {"velocity"}
    assert len(left_out) == 1 and "rk45, velocity: its NFE is not known beforehand" in left_out[0]


def test_no_shipped_grid_is_forgotten() -> None:
    names = ["dmcmc-digits", "dmcmc-published", "dmcmc-shapes", "dmcmc"]
    assert sorted(path.stem for path in SCHEDULES.glob("*.yaml")) == sorted(names)


def test_the_published_chain_is_compared_in_both_units() -> None:
    comparison = load_comparison(SCHEDULES / "dmcmc-published.yaml")
    cells, left_out = cells_of(comparison, ObjectiveConfig())
    assert not left_out and comparison.repeats >= 3
    assert {cell.variant for cell in cells} == {"plain", "published", "unscaled"}
    right, wrong = (comparison.chains[name].chains() for name in ("published", "unscaled"))
    assert right == DlgConfig(skip=1, samples_per_chain=25)
    assert (right.step_size / wrong.step_size, right.burn_in_step_size / wrong.burn_in_step_size) == (4, 4)
    assert right.initial_noise / wrong.initial_noise == 2


def test_a_grid_leaves_no_room_for_what_it_decides(run: Path, shards: Path, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID)
    refused = command(run, shards, cache, file, "--count", "50000", "--schedule", "karras", "--cfg-scale", "1")
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception).startswith(f"--count, --schedule, --cfg-scale: set in {file}")
    missing = command(run, shards, cache, tmp_path / "karras")
    assert "karras: no such file; expected the YAML file of a comparison" in str(missing.exception)
    file.write_text("samplers: [heun]\nnfe: [2]\nplain: false\nchains:\n  a: {}\n")
    assert "no evaluation is possible:\n  heun, a, NFE 2: one step" in str(
        command(run, shards, cache, file).exception
    )
    file.write_text(GRID + "cfg_channels: 2\n")
    assert "cfg_channels = 2: expected at most the model's 1" in str(command(run, shards, cache, file).exception)
    file.write_text(GRID + "chains:\n  a: {skip: 1, samples_per_chain: 100}\n")
    assert isinstance(command(run, shards, cache, file).exception, UserError)  # no noise-level classifier
    assert not (run / "evaluations").exists()


def test_jobs_that_share_all_but_the_sampler_are_those_of_one_by_one(run: Path, shards: Path, cache: Path) -> None:
    options = EvaluationOptions(
        source=run, sampler=SamplerConfig(steps=2), count=20, data=shards, recogniser=False, cache=cache
    )
    jobs = prepare_jobs(options, [SamplerConfig(steps=2), SamplerConfig(steps=3)])
    assert jobs[0].folder == evaluate_run.prepare_job(options).folder != jobs[1].folder
    seen = []
    metrics = evaluate_jobs(jobs, lambda place, found, seconds: seen.append((place, found, seconds is None)))
    assert seen == [(0, metrics[0], False), (1, metrics[1], False)]
    assert evaluate_jobs(jobs) == metrics


def test_a_grid_is_compared_with_statistics_of_others(
    run: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without floors, precision and recall, which moments alone do not give."""
    monkeypatch.setattr(opening, "load_inception", lambda path, device, resize: Pixels())
    (tmp_path / "inception.pth").write_bytes(b"weights")
    statistics = tmp_path / "edm.npz"
    np.savez(statistics, mu=np.full(16, 0.4), sigma=0.1 * np.eye(16))
    file = tmp_path / "moments.yaml"
    file.write_text("count: 40\nnfe: [1, 2]\nsamplers: [euler]\n")
    told = ("--features", "inception", "--features-path", str(tmp_path / "inception.pth"))
    done = command(run, statistics, cache, file, *told)
    assert done.exit_code == 0, done.output
    assert "left out: floors of Fréchet distances, precision, recall and KID, sFID" in done.output
    (folder,) = run.glob("evaluations/grid-moments-*")
    rows = json.loads((folder / "grid.json").read_text())["rows"]
    assert [row["fid_floor"] for row in rows] == [None, None] and all(row["fid"] > 0 for row in rows)
    assert [row["recall"] for row in rows] == [None, None] and (folder / "fid-nfe.png").stat().st_size > 1000
    assert command(run, statistics, cache, file, *told).output.count("FID") == done.output.count("FID")
