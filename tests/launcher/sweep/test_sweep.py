"""A sweep: its cells and their names, what is refused, what follows a failure, and the table."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.data.storage.stopping import EXIT_STOPPED
from ditmoe.launcher.commands import sweep as sweep_command
from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.launcher.sweep.cells import Cell, ReadyCell, cells_of, name_of, ready, split_values
from ditmoe.launcher.sweep.run import run_cells
from ditmoe.launcher.sweep.table import as_markdown, as_text, rows_of, write_table
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError
from tests.forked import DITMOE, run_forked
from tests.sampling.small_run import write_digits

Write = Callable[..., Path]
VARIED = ["optim.lr=1e-4,2e-4", "model.depth=2,4"]


def test_the_product_of_the_values(write_config: Write, tmp_path: Path) -> None:
    cells = cells_of(write_config(), [*VARIED, "seed=3"], tmp_path / "sweep")
    assert [(cell.config.optim.lr, cell.config.model.depth) for cell in cells] == [
        (1e-4, 2),
        (1e-4, 4),
        (2e-4, 2),
        (2e-4, 4),
    ]
    assert [cell.name for cell in cells][:2] == ["optim.lr=1e-4+model.depth=2", "optim.lr=1e-4+model.depth=4"]
    for cell in cells:
        assert cell.config.seed == 3
        assert cell.config.run.dir == cell.folder == tmp_path / "sweep" / cell.name
        assert load_config(tmp_path / "tiny.yaml", list(cell.overrides)) == cell.config


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", ["1"]),
        ("1,2", ["1", "2"]),
        ("[1,2]", ["[1,2]"]),
        ("[1, 2],[3,4]", ["[1, 2]", "[3,4]"]),
        ("{a: 1, b: [2,3]},null", ["{a: 1, b: [2,3]}", "null"]),
        ("'a,b',\"c,'d\"", ["'a,b'", '"c,\'d"']),
        ("", [""]),
        ("1,,2", ["1", "", "2"]),
    ],
)
def test_commas_inside_a_value_do_not_part_it(text: str, values: list[str]) -> None:
    assert split_values(text) == values
    assert ",".join(values) == text


@given(st.dictionaries(st.sampled_from(["data.sources", "optim.lr", "seed"]), st.text(), min_size=1))
def test_any_name_is_one_safe_folder(values: dict[str, str]) -> None:
    name = name_of(values)
    assert re.fullmatch(r"[A-Za-z0-9._=+-]{1,140}", name) and name not in (".", "..")


def test_names_of_different_values_differ() -> None:
    texts = ["a/b", "a_b", "a b", "x" * 300, "x" * 301, "pipe:cat a", "pipe:cat b", "s3://u:p@h/a", "s3://u:q@h/a"]
    names = [name_of({"data.cache": text}) for text in texts]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "u:p" in name or "u_p" in name]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=1e-4"], "no key has several values; expected such as optim.lr=1e-4,2e-4"),
        (["optim.lr=1e-4,2e-4", "optim.lr=3e-4"], "optim.lr is given twice; expected all of its values once"),
        (["optim.lr=1,2", "run.dir=x"], "run.dir: each cell has a run folder of its own; expected --dir FOLDER"),
        (["run.dir=a,b"], "run.dir: each cell has a run folder of its own"),
        (["optim={lr: 1.0},{lr: 2.0}", "optim.clip=1"], "optim.clip is a part of optim, and both are given"),
        (["optim.lr=1e-4,"], "optim.lr=1e-4,: expected KEY=VALUE or KEY=VALUE,VALUE"),
        (["optim.lr"], "optim.lr: expected KEY=VALUE"),
        (["optim.lr=1e-4,1.0e-4"], "optim.lr=1.0e-4: is the same run as optim.lr=1e-4"),
        (["optim.lr=1e-4,2e-4", "model.deep=3"], "optim.lr=1e-4 and 1 more: "),
        (["optim.lr=1e-4,none"], "optim.lr=none: "),
        ([f"seed={','.join(map(str, range(1001)))}"], "the keys make 1,001 cells; expected 1,000 at most"),
    ],
)
def test_what_is_refused(write_config: Write, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        cells_of(write_config(), overrides, tmp_path / "sweep")


def test_a_cell_that_was_begun_with_other_settings_is_refused_before_any_starts(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditmoe.data.stream.dataset.Dataset.check_files", lambda self: None)
    config = write_config()
    cells = cells_of(config, VARIED, tmp_path / "sweep")
    assert [found.processes for found in ready(cells)] == [2] * 4
    begun = cells[2]
    folder = RunFolder(begun.folder)
    begun.folder.mkdir(parents=True)
    folder.store_config(ready(cells)[2].config)
    (folder.checkpoints / "step-00000005").mkdir(parents=True)
    (folder.checkpoints / "step-00000005" / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        ready(cells_of(config, [*VARIED, "train.batch=32"], tmp_path / "sweep"))
    message = str(caught.value)
    assert message.startswith(f"{begun.name}: ") and "train.batch = 32, but the run was started with 16" in message
    with pytest.raises(UserError, match="seed = 5"):
        ready(cells_of(config, [*VARIED, "seed=5"], tmp_path / "sweep"))


class Trains:
    """Stands for the processes of training: what they leave, and how they end."""

    def __init__(self, codes: Sequence[int] = ()) -> None:
        self.started: list[str] = []
        self._codes = list(codes)

    def __call__(self, arguments: Sequence[str], processes: int, **options: Any) -> int:
        assert list(arguments[:2]) == ["train", "--"] and processes == 2
        config = load_config(Path(arguments[2]), list(arguments[3:]))
        self.started.append(config.run.dir.name)
        code = self._codes.pop(0) if self._codes else 0
        if code == 0:
            finish(config.run.dir, config)
        return code


def finish(run: Path, config: Any, step: int = 20) -> None:
    """What training leaves of a run."""
    folder = RunFolder(run)
    folder.checkpoints.mkdir(parents=True)
    folder.store_config(config)
    (folder.checkpoints / f"step-{step:08d}").mkdir()
    (folder.checkpoints / f"step-{step:08d}" / "checkpoint.json").write_text("{}")
    records = [{"step": at, "loss": 1000 * config.optim.lr / at} for at in (10, step)]
    folder.stats.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def cells(write_config: Write, tmp_path: Path) -> list[ReadyCell]:
    found = cells_of(write_config(), VARIED, tmp_path / "sweep")
    return [ReadyCell(cell, cell.config, 2) for cell in found]


def plain(cells: Sequence[ReadyCell]) -> list[Cell]:
    return [found.cell for found in cells]


def test_a_complete_cell_that_shall_train_longer_goes_on(cells: list[ReadyCell], tmp_path: Path) -> None:
    steps = cells[0].config.train.steps
    for found in cells[:2]:
        finish(found.cell.folder, found.config, steps)
    trains, said = Trains([]), list[str]()
    assert run_cells(tmp_path / "tiny.yaml", cells[:2], said.append, start=trains) == 0 and not trains.started
    longer = cells[0].config.train.model_copy(update={"steps": steps + 10})
    asked = [replace(found, config=found.config.model_copy(update={"train": longer})) for found in cells[:2]]
    trains = Trains([2, 2])
    assert run_cells(tmp_path / "tiny.yaml", asked, said.append, start=trains) == 2
    assert trains.started == [found.cell.name for found in cells[:2]]
    assert said[-1].startswith("2 of 2 cells failed") and f"from step {steps:,} to {steps + 10:,}" in said[-5]


def test_a_failed_cell_stops_no_other_and_a_repeated_sweep_goes_on(cells: list[ReadyCell], tmp_path: Path) -> None:
    file, names, said = tmp_path / "tiny.yaml", [found.cell.name for found in cells], []
    trains = Trains([0, 137, 2])
    assert run_cells(file, cells, said.append, start=trains) == 1
    assert trains.started == names
    assert said[-1] == f"2 of 4 cells failed: {names[1]}, {names[2]}"
    trains = Trains([2])
    assert run_cells(file, cells, said.append, start=trains) == 2  # each by a user's mistake
    assert trains.started == names[1:3]
    trains, scored = Trains(), []
    assert run_cells(file, cells, said.append, lambda run: scored.append(run.name) or 0, start=trains) == 0
    assert trains.started == names[1:2] and scored == names
    assert run_cells(file, cells, said.append, lambda run: 1 if run.name == names[3] else 0, start=trains) == 1


@pytest.mark.parametrize("code", [128 + 15, EXIT_STOPPED])
def test_a_signal_ends_the_sweep(cells: list[ReadyCell], tmp_path: Path, code: int) -> None:
    """Also one after which training has saved."""
    said: list[str] = []
    trains = Trains([0, code])
    assert run_cells(tmp_path / "tiny.yaml", cells, said.append, start=trains) == code
    assert len(trains.started) == 2
    assert said[-1] == f"cell 2 of 4, {cells[1].cell.name}: stopped; repeat the command to continue with it"


def evaluation(run: Path, step: int, fid: float, count: int = 100) -> None:
    """What `ditmoe evaluate` leaves."""
    shared = {"which": "ema", "sampler": {"steps": 5}, "count": count, "labels": "balanced"}
    result = {"network": {"name": "classifier", "fingerprint": "n"}, "real": {"fingerprint": "r"}, "fid": fid}
    content = {"evaluation": {"weights": "w-ema", "step": step, **shared}, "results": {"classifier": result}}
    file = run / "evaluations" / f"step-{step:08d}-ema-euler-{count}-abcd" / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))


def test_the_table_has_every_cell(cells: list[ReadyCell], tmp_path: Path) -> None:
    first, third, fourth = (cells[place].cell for place in (0, 2, 3))
    finish(first.folder, first.config)
    finish(third.folder, third.config)
    finish(fourth.folder, fourth.config, step=10)
    (fourth.folder / "state.json").write_text(json.dumps({"state": "stopped", "step": 10}))
    evaluation(first.folder, 10, 9.0)
    evaluation(first.folder, 20, 5.0)
    evaluation(third.folder, 20, 4.0)
    rows = rows_of(plain(cells))
    assert [(row["optim.lr"], row["model.depth"]) for row in rows] == [
        ("1e-4", "2"),
        ("1e-4", "4"),
        ("2e-4", "2"),
        ("2e-4", "4"),
    ]
    assert [row["state"] for row in rows] == ["complete", "not begun", "complete", "stopped"]
    assert [row["step"] for row in rows] == [20, 0, 20, 10]
    assert rows[0]["loss"] == pytest.approx((0.1 / 10 + 0.1 / 20) / 2)  # of the last checkpoint_every steps
    assert [row["fid"] for row in rows] == [5.0, None, 4.0, None]
    text = as_text(rows)
    assert f"lowest FID: 4, {third.folder}" in text and f"lowest loss: 0.0075, {first.folder}" in text
    assert "20 of 20" in text and "warning" not in text
    assert len(as_markdown(rows).split("\n\n")[0].splitlines()) == 2 + 4
    written = write_table(tmp_path / "sweep", rows)
    assert [path.name for path in written] == ["table.md", "table.csv"]
    with written[1].open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["fid"]) if row["fid"] else None for row in read] == [5.0, None, 4.0, None]
    evaluation(fourth.folder, 10, 3.0, count=50)
    text = as_text(rows_of(plain(cells)))
    assert "warning: FIDs of 2 different settings or feature networks cannot be compared" in text
    assert "warning: the figures are of different steps: 10, 20" in text
    assert "warning: losses" not in text


@pytest.mark.parametrize(
    ("section", "values"),
    [("objective", {"kind": "ddpm"}), ("data", {"sources": [{"path": "elsewhere"}, {"path": "synthetic"}]})],
)
def test_losses_of_different_things_are_not_compared_unseen(
    cells: list[ReadyCell], section: str, values: dict[str, Any]
) -> None:
    first, second = (cells[place].cell for place in (0, 1))
    finish(first.folder, first.config)
    content = second.config.plain()
    finish(second.folder, RunConfig.model_validate({**content, section: {**content[section], **values}}))
    rows = rows_of(plain(cells))
    warning = "warning: losses of 2 different objectives or images cannot be compared"
    assert warning in as_text(rows).splitlines() and warning in as_markdown(rows).splitlines()
    assert "loss_of" not in as_text(rows)


def test_dry_run_writes_nothing(write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(model={"depth": 1, "hidden": 16, "heads": 2, "patch": 4}, parallel={})
    before = sorted(tmp_path.rglob("*"))
    listed = run_forked([*DITMOE, "sweep", str(config), *VARIED, "--table", "--dry-run"], tmp_path.parent / "out")
    assert listed.returncode == 0 and "optim.lr  model.depth  state" in listed.stdout, listed.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_sweep_trains_every_cell(tmp_path: Path) -> None:
    """With real processes; repeated, it starts none, and tables the same."""
    values = {
        "launch": {"processes": 1, "device": "cpu", "threads": 1},
        "model": {"depth": 1, "hidden": 16, "heads": 2, "patch": 4},
        "data": {"sources": [{"path": str(write_digits(tmp_path / "digits"))}], "workers": 0},
        "train": {"steps": 2, "batch": 8, "precision": "fp32", "log_every": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    arguments = ["sweep", "tiny.yaml", "optim.lr=1e-3,1e-2", "--dir", "sweep"]
    first = run_forked([*DITMOE, *arguments], tmp_path / "out")
    assert first.returncode == 0, first.stderr
    assert "cell 2 of 2, optim.lr=1e-2: from step 0 to 2" in first.stdout
    with (tmp_path / "sweep" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optim.lr"], row["state"], row["step"]) for row in rows] == [
        ("1e-3", "complete", "2"),
        ("1e-2", "complete", "2"),
    ]
    assert float(rows[0]["loss"]) > 0 and rows[0]["loss"] != rows[1]["loss"]
    second = run_forked([*DITMOE, *arguments], tmp_path / "out")
    assert second.returncode == 0 and "cell 1 of 2, optim.lr=1e-3: complete at step 2" in second.stdout
    table = [text[text.index("optim.lr  state") :] for text in (first.stdout, second.stdout)]
    assert table[0] == table[1]


def test_a_cell_is_scored_with_the_options_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], int]] = []

    def start(arguments: Sequence[str], processes: int, **options: Any) -> int:
        started.append((list(arguments), processes))
        return 3

    monkeypatch.setattr("ditmoe.launcher.local.launch.spawn", start)
    assert sweep_command.scorer("--count 8 --processes 2 --data 'a b'")(tmp_path) == 3
    words = ["evaluate", "--count", "8", "--processes", "2", "--data", "a b", "--processes=2", "--", str(tmp_path)]
    assert started == [(words, 1)]  # it leads two others
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert sweep_command.scorer("--crew c")(tmp_path) == 3
    assert started[1][0] == ["evaluate", "--crew", "c", "--processes=3", "--crew=c", "--", str(tmp_path)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stepz 3", "--stepz: no such option"),
        ("--count none", "--count none: expected an integer >= 1"),
        ("--watch", "--watch is not for a sweep"),
        ("'", "No closing quotation"),
    ],
)
def test_options_of_the_evaluation_are_checked_first(
    write_config: Write, tmp_path: Path, options: str, message: str
) -> None:
    done = run_forked([*DITMOE, "sweep", str(write_config()), *VARIED, "--evaluate", options], tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()
