"""What a run tells: each step once, also after a resume."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as BoardAccumulator

from ditmoe.launcher.training.report import Reporter, drop_after
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError


class Terminal(io.StringIO):
    """A terminal that keeps what it shows."""

    def isatty(self) -> bool:
        return True


def steps(folder: RunFolder) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in folder.stats.read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def test_a_resumed_curve_has_each_step_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with Reporter(folder, 10, terminal=io.StringIO()) as reporter:
        for step in range(1, 7):
            reporter.record(step, {"loss": 0.1 * step})
    with Reporter(folder, 10, step=4, terminal=io.StringIO()) as reporter:
        for step in range(5, 9):
            reporter.record(step, {"loss": -0.1 * step})
    expected = [(s, 0.1 * s) for s in range(1, 5)] + [(s, -0.1 * s) for s in range(5, 9)]
    assert steps(folder) == expected  # exactly: numbers are written in full
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))


def test_a_run_that_begins_anew_shows_nothing_of_before(tmp_path: Path) -> None:
    """It was ended before its first checkpoint, with records of its own; it may have another configuration now."""
    folder = RunFolder(tmp_path)
    for last, loss in ((6, 0.5), (4, 0.25)):
        with Reporter(folder, 10, terminal=io.StringIO()) as reporter:
            reporter.text("configuration", f"loss {loss}")
            for step in range(1, last + 1):
                reporter.record(step, {"loss": loss})
    board = BoardAccumulator(str(folder.tensorboard)).Reload()  # as TensorBoard itself reads them
    losses = [(event.step, event.tensor_proto.float_val[0]) for event in board.Tensors("train/loss")]
    assert losses == [(step, 0.25) for step in range(1, 5)]
    (text,) = board.Tensors("configuration/text_summary")
    assert b"loss 0.25" in text.tensor_proto.string_val[0]


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.stats.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo')
    assert drop_after(folder.stats, 5) == 1
    assert steps(folder) == [(1, 0.5), (2, 0.4)]
    assert drop_after(folder.stats, 5) == 0
    assert drop_after(folder.stats, 0) == 2 and steps(folder) == []


def test_plain_lines(tmp_path: Path) -> None:
    terminal = io.StringIO()
    with Reporter(RunFolder(tmp_path), 200, terminal=terminal) as reporter:
        reporter.log("begins")
        reporter.advance()
        reporter.record(100, {"loss": 0.12345, "step_seconds": 0.25, "lr": 1e-4, "images": 800})
    begins, line = terminal.getvalue().splitlines()
    assert begins == "begins"
    assert line == "(step=0000100) Train Loss: 0.1235, Train Steps/Sec: 4.00, LR: 1.00e-04"
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [entry.partition("] ")[2] for entry in log] == [begins, line]


def test_the_keys_of_samples_are_those_of_each_step_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for first in (1, 2):  # started again after step 1, which is kept
        with Reporter(folder, 4, step=first - 1, terminal=io.StringIO()) as reporter:
            for step in range(first, 4):
                reporter.samples(step, [f"{first}/{step}"])
    records = [json.loads(line) for line in folder.sample_keys.read_text().splitlines()]
    assert records == [{"step": step, "keys": [f"{min(step, 2)}/{step}"]} for step in (1, 2, 3)]


def test_a_terminal_has_a_bar(tmp_path: Path) -> None:
    terminal = Terminal()
    with Reporter(RunFolder(tmp_path), 4, step=1, terminal=terminal) as reporter:
        reporter.record(2, {"loss": 0.5})
        reporter.advance()
        reporter.log("a word")
    shown = terminal.getvalue()
    assert "1/4" in shown and "2/4" in shown and "a word" in shown
    assert "(step=" not in shown
    assert "Train Loss: 0.5000" in (tmp_path / "log.txt").read_text()


def test_stats_are_strict_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    values = {"loss": 0.5, "grad_norm": float("inf"), "expert_load": [[0.25, 0.75], [0.5, float("nan")]]}
    with Reporter(folder, 4, terminal=io.StringIO()) as reporter:
        reporter.record(1, values)
    (line,) = folder.stats.read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record == {"step": 1, "loss": 0.5, "grad_norm": None, "expert_load": [[0.25, 0.75], [0.5, None]]}


def test_tensorboard(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with Reporter(folder, 4, terminal=io.StringIO()) as reporter:
        sources = {"real": {"images": 40, "epoch": 0.5, "skipped": 1}}
        values = {"loss": 0.5, "memory_gib": 2.0, "expert_load": [[0.25, 0.75]], "odd": 3, "sources": sources}
        reporter.record(1, values)
        reporter.image("samples", np.zeros((8, 8, 3), dtype=np.uint8), 1)
        reporter.text("configuration", "model:\n  depth: 2")
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert set(board.Tags()["scalars"]) == {
        "train/loss",
        "memory/peak - GiB",
        "expert load - share/block 0/expert 0",
        "expert load - share/block 0/expert 1",
        "other/odd",
        "sources/real/images",
        "sources/real/epoch",
        "sources/real/skipped",
    }
    assert board.Scalars("sources/real/images")[0].value == 40
    assert board.Tags()["images"] == ["samples"]
    assert board.Tags()["tensors"] == ["configuration/text_summary"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["log.txt", "stats.jsonl", "samples.jsonl", "history.jsonl"])
def test_a_pipe_in_place_of_a_report_is_a_message_and_no_wait(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=rf"{name}: (is a pipe|cannot be read: not a regular file)"):  # noqa: SIM117
        with Reporter(folder, 10, terminal=io.StringIO()) as reporter:
            reporter.samples(1, ["a"])
            folder.keep_in_history(1, skipped=True)


def test_the_log_says_why_a_run_ended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError), Reporter(folder, 10, terminal=io.StringIO()):
        raise UserError("step 7: the loss is nan\nits samples: a, b")
    lines = folder.log.read_text().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "ended by an error: step 7: the loss is nan",
        "its samples: a, b",
    ]
