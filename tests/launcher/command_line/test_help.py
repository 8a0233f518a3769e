"""Help: every command has examples, and every example is a command line that the program takes."""

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from ditmoe.launcher.cli import SECTIONS, VERBS, app
from ditmoe.launcher.command_line.groups import split_help
from ditmoe.launcher.commands.data import encode, synthesize
from ditmoe.launcher.commands.evaluate import command as evaluate
from ditmoe.launcher.commands.submit.other_jobs import _parsed
from ditmoe.launcher.configuration.overrides import apply_overrides
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.sweep.cells import split_values

PASSED_ON = {
    "submit evaluate": ("evaluate", evaluate),
    "submit encode": ("data encode", encode.command),
    "submit synthesize": ("data synthesize", synthesize.command),
}
"""Commands of jobs that read the rest of their line as another command does."""


def walk(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command and group, by its words after `ditmoe`."""
    yield path, command
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from walk(command.get_command(None, name), f"{path} {name}".strip())


ROOT = typer.main.get_command(app)
COMMANDS = dict(walk(ROOT))


@pytest.mark.parametrize("path", COMMANDS)
def test_help_has_examples_at_its_end(path: str) -> None:
    command = COMMANDS[path]
    context = typer.Context(command, info_name=f"ditmoe {path}".strip())
    shown = command.get_help(context)
    assert command.examples, f"ditmoe {path} --help has no example"
    assert shown.rstrip().endswith("Examples:\n  " + "\n  ".join(command.examples))
    assert "Example" not in (command.help or "")


@pytest.mark.parametrize("path", COMMANDS)
def test_examples_are_of_their_command_and_can_be_read(path: str) -> None:
    for example in COMMANDS[path].examples:
        words = words_of(example)
        assert words[: len(path.split())] == path.split(), example
        check(words)


def words_of(example: str) -> list[str]:
    """The words after `ditmoe`, without what a shell does with the output."""
    line = example[example.index("ditmoe ") :]
    words = shlex.split(line.partition(" > ")[0].rstrip(")"), comments=True)
    return words[1:]


def check(words: list[str]) -> None:
    """Read a command line as the program does, and its keys as a configuration does."""
    command, path = ROOT, []
    while hasattr(command, "list_commands"):
        path.append(words[0])
        command, words = command.get_command(None, words[0]), words[1:]
        assert command is not None, path
    context = command.make_context(f"ditmoe {' '.join(path)}", list(words))
    name = " ".join(path)
    if name in PASSED_ON:
        _parsed(*PASSED_ON[name], list(context.args))
    else:
        assert not context.args
    overrides = [
        f"{key}={value}"
        for key, _, values in (override.partition("=") for override in context.params.get("overrides") or ())
        for value in split_values(values)
    ]
    assert apply_overrides(RunConfig, {}, overrides)[1] == []
    if context.params.get("evaluate") is not None:
        _parsed("evaluate", evaluate, [*shlex.split(context.params["evaluate"]), "--", "RUN"])


def test_what_is_wrong_in_an_example_is_seen() -> None:
    with pytest.raises(typer.TyperException):
        check(["train", "photos", "--dryrun"])
    with pytest.raises(AssertionError):
        check(["train", "photos", "optim.lrr=1"])
    with pytest.raises(AssertionError):
        check(["data", "pakc"])
    assert words_of("source <(ditmoe completion bash)") == ["completion", "bash"]


def test_examples_are_taken_out_of_the_text() -> None:
    assert split_help("Do it.\n\n    More.\n\n    Examples:\n        a b\n        c\n    ") == (
        "Do it.\n\nMore.",
        ("a b", "c"),
    )
    assert split_help("Do it.") == ("Do it.", ())
    assert split_help(None) == (None, ())


def test_commands_stand_in_sections_in_the_order_of_use() -> None:
    shown = ROOT.get_help(typer.Context(ROOT, info_name="ditmoe"))
    places = [shown.index(f"\n{title}:\n") for title in SECTIONS]
    places_of_commands = [shown.index(f"\n  {name} ") for name in VERBS]
    assert places == sorted(places) and places_of_commands == sorted(places_of_commands)
    names = list(VERBS)
    assert names.index("data") < names.index("train") < names.index("sample") < names.index("evaluate")
