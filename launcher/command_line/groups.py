"""Commands whose help ends with examples, and groups of them.

The examples of a command stand in its docstring, in a section `Examples:` at its end, a line each; tests read
them against the program.
"""

import inspect
from collections.abc import Callable
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType

from ditmoe.launcher.command_line.wrong_usage import WrongUsage
from ditmoe.model.outside.nearest import expected_name

_HEADING: Final = "\nExamples:\n"


def split_help(text: str | None) -> tuple[str | None, tuple[str, ...]]:
    """A docstring's text, and the lines of its examples."""
    if text is None:
        return None, ()
    words, heading, examples = f"\n{inspect.cleandoc(text)}\n".partition(_HEADING)
    lines = [line.strip() for line in examples.splitlines()]
    return (words.strip() if heading else text), tuple(line for line in lines if line)


def _write_examples(formatter: Any, lines: tuple[str, ...]) -> None:
    """Write them as they stand: a line that is wrapped cannot be copied."""
    if lines:
        with formatter.section("Examples"):
            for line in lines:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(TyperCommand):
    """A command whose help ends with its examples."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.help, self.examples = split_help(self.help)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(formatter, self.examples)


class Group(TyperGroup):
    """A group of commands in the order of their use, whose help ends with examples."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.help, self.examples = split_help(self.help)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(formatter, self.examples)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments begin with; WrongUsage naming the nearest where there is no such one."""
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and self.get_command(ctx, name) is None:
            path = ctx.command_path
            known = expected_name(name, self.list_commands(ctx), f"`{path} --help`", "a command")
            raise WrongUsage(f"{path} {name}: no such command; {known}")
        return super().resolve_command(ctx, args)


class Commands(typer.Typer):
    """A group to which commands are added by `@GROUP.command(…)`."""

    def __init__(self, help: str) -> None:
        # Plain help: rich would take a third of the time that help may take.
        super().__init__(cls=Group, help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

    def command(
        self, name: str | None = None, **options: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        return super().command(name, **{"cls": Command, **options})


def single_command(name: str, function: Any) -> Any:
    """A command that is no group, from its function."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command)(function)
    return typer.main.get_command(app)
