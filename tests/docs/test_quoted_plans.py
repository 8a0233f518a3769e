"""What docs/plan.md quotes of the planner is what the planner says now."""

import pytest
from typer.testing import CliRunner

from ditmoe.launcher.cli import app
from ditmoe.launcher.configuration.run_config import load_config
from ditmoe.launcher.planning.room import Room, check_room
from ditmoe.model.errors import UserError
from tests.docs.pages import ROOT, blocks, ditmoe_commands, typed

PAGE = "docs/plan.md"
LARGE = "--gpus 128"
"""In the command of the quotation that takes four seconds."""
QUOTED = [block for block in blocks(PAGE) if block.text.startswith("$ ditmoe plan")]


def lines_of(text: str) -> list[str]:
    """Without the command and the dots that stand for more."""
    return [line for line in text.splitlines() if line.strip() and line != "…" and not line.startswith("$ ")]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.slow if LARGE in block.text else ())
        for number, block in enumerate(QUOTED)
    ],
)
def test_a_quoted_plan(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (arguments,) = ditmoe_commands(typed(QUOTED[number]))
    said = CliRunner().invoke(app, arguments).output.splitlines()
    assert [line for line in lines_of(QUOTED[number].text) if line not in said] == []


def test_a_quoted_refusal() -> None:
    """On one GPU of 16 GiB, with micro-batches of 128."""
    quoted = next(block.text for block in blocks(PAGE) if block.text.startswith("error: configs/photos.yaml"))
    given = ["model.image_size=64", "model.channels=3", "model.num_classes=10", "parallel.data=1"]
    config = load_config(ROOT / "configs/photos.yaml", [*given, "train.micro_batch=128"])
    with pytest.raises(UserError) as refused:
        check_room(config, "configs/photos.yaml", 1, Room(64 << 30, False, (16 << 30,)))
    said = [line.strip() for line in str(refused.value).splitlines()]
    assert [line.strip().removeprefix("error: ") for line in lines_of(quoted)] == said


def test_there_are_quotations() -> None:
    assert len(QUOTED) == 2 and sum(LARGE in block.text for block in QUOTED) == 1
