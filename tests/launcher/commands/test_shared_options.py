"""The options that say who makes the parts of a command's work: alike in every command that works in parts."""

from pathlib import Path
from typing import Any

import pytest
import typer

from ditmoe.launcher.cli import app
from ditmoe.launcher.commands.shared_options import Sharing
from ditmoe.model.errors import UserError

COMMANDS = ("evaluate", "score", "reference make", "data encode", "data synthesize")
RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}


def options_of(command: str) -> dict[str, Any]:
    """Option → what help says of it, and its default."""
    group: Any = typer.main.get_command(app)
    for word in command.split():
        group = group.get_command(None, word)
    return {name: (option.help, option.default) for option in group.params for name in option.opts}


def test_they_are_spelt_alike_in_every_command() -> None:
    for name in ("--processes", "--crew", "--listen", "--part-limit"):
        found = {str(options_of(command)[name]) for command in COMMANDS}
        if name == "--processes":  # drawing and encoding take one core each
            assert len(found) == 2 and all(
                "Processes on this machine that share the work" in each for each in found
            )
        else:
            assert len(found) == 1, found


def test_they_are_told_again_as_they_were() -> None:
    assert Sharing().arguments() == []
    whole = Sharing(0, Path("c"), "lo", 2.5)
    assert whole.arguments() == ["--processes=0", "--crew=c", "--listen=lo", "--part-limit=2.5"]


def test_who_leads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    led: list[tuple[Any, ...]] = []

    class Leads:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            led.append((*arguments[:3], options["gpus"]))

        def __enter__(self) -> str:
            return "crew"

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("ditmoe.launcher.local.crew_workers.leads_crew", Leads)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("ditmoe.launcher.local.launch.threads_per_process", lambda processes: 4 // processes)

    def crew_of(sharing: Sharing, **options: Any) -> Any:
        with sharing.led(**options) as crew:
            return crew

    assert crew_of(Sharing()) is None and crew_of(Sharing(1)) is None and not led
    assert crew_of(Sharing(), per_core=True, gpus=False) == "crew" and led.pop() == (None, 4, 360, False)
    assert crew_of(Sharing(), per_core=True, most=1) is None
    assert crew_of(Sharing(8, part_limit=3), most=3) == "crew" and led.pop() == (None, 3, 3, True)
    assert crew_of(Sharing(0, tmp_path)) == "crew" and led.pop() == (tmp_path, 0, 360, True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert crew_of(Sharing()) == "crew" and led.pop()[1] == 2

    # A rank that is alone leads where it is asked to, such as the process of a watch that scores a checkpoint.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert crew_of(Sharing()) is None and crew_of(Sharing(2)) == "crew" and led.pop()[1] == 2
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    assert crew_of(Sharing(2)) is None and not led
    with pytest.raises(UserError, match="--crew c: one process leads it, and this is one of 2"):
        crew_of(Sharing(crew=Path("c")))
    with pytest.raises(UserError, match="--part-limit 3: is of workers that one process leads"):
        crew_of(Sharing(2, part_limit=3))


def test_a_task_with_a_node_to_itself_starts_ranks_that_do_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[tuple[Any, ...]] = []

    def spawn(arguments: list[str], processes: int, *, log_dir: Path) -> int:
        started.append((arguments, processes, log_dir.is_dir()))
        return 3

    monkeypatch.setattr("ditmoe.launcher.local.launch.spawn", spawn)
    monkeypatch.setattr("sys.argv", ["ditmoe", "data", "encode", "a", "b"])
    for name, value in {**RANK, "DITMOE_NODE_TASK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(typer.Exit) as ended, Sharing(2).led(tmp_path / "ranks"):
        pass
    assert ended.value.exit_code == 3 and started == [(["data", "encode", "a", "b"], 2, True)]


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="--processes 0: expected 1 or more, or --crew FOLDER"):
        Sharing(0)
    with pytest.raises(UserError, match="--listen lo: workers of other machines join by --crew FOLDER"):
        Sharing(2, listen="lo")
