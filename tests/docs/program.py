"""The program as the pages may describe it: its commands, options and keys, asked in process."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer
import yaml

from ditmoe.launcher.cli import app
from ditmoe.launcher.configuration.checks import layout_problems
from ditmoe.launcher.configuration.fields import annotation_at, item_section, section_of
from ditmoe.launcher.configuration.overrides import apply_overrides
from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.model.errors import UserError
from tests.docs.pages import ROOT

PASSED_ON = ("evaluate", "encode", "synthesize")
"""What `ditmoe submit` hands on: options that are not the job's are the verb's own."""
STAND_INS = {"COMMAND": "train", "CONFIG": "dit-s-2-8e2a-256"}
"""Words in place of a command, and of the name of a configuration."""


@cache
def command() -> Any:
    """The command line, as `ditmoe` builds it."""
    return typer.main.get_command(app)


def parsed(arguments: list[str]) -> Any:
    """The context of the command that these arguments call; nothing is run.

    Raises:
        typer.TyperException: as the command line would.
    """
    context = command().make_context("ditmoe", list(arguments))
    while hasattr(context.command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return context
        name, found, rest = context.command.resolve_command(context, rest)
        context = found.make_context(name, rest, parent=context)
    return context


def problem_of(arguments: list[str], whole: bool = True) -> str | None:
    """What is wrong with a command of a page, or None.

    Args:
        arguments: what follows `ditmoe`.
        whole: it is complete; otherwise arguments may be missing, and words in capitals stand for any value.
    """
    any_configuration = "CONFIG" in arguments
    arguments = [STAND_INS.get(word, word) for word in arguments]
    if not whole:
        arguments = ["1" if word.isupper() else word for word in arguments if word.strip("…,. ")]
    if {"--help", "-h", "--version"} & set(arguments):
        arguments = [word for word in arguments if word not in ("--help", "-h", "--version")]
        whole = False
    try:
        context = parsed(arguments)
    except UserError as error:  # a configuration that is neither here nor shipped
        return None if not whole and "1" in arguments else str(error)
    except typer.TyperException as error:
        kind = type(error).__name__
        unfinished = (
            kind in ("MissingParameter", "NoArgsIsHelpError") or "requires an argument" in error.format_message()
        )
        placed = kind == "BadParameter" and "1" in arguments
        return None if not whole and (unfinished or placed) else f"{kind}: {error.format_message()}"
    if any_configuration:
        context.params["config"] = None
    path = context.command_path.split()[1:]
    if path[:1] == ["submit"] and path[1:] and path[1] in PASSED_ON:
        inner = ["data"] * (path[1] != "evaluate") + [path[1], *context.args]
        return problem_of(inner, whole)
    processes = (context.params.get("nodes") or 1) * (context.params.get("gpus_per_node") or 0)
    return _problem_of_keys(context.params, processes) if whole else None


def _problem_of_keys(parameters: dict[str, Any], processes: int) -> str | None:
    """What is wrong with the keys that are set, and with the layout on the GPUs of a job."""
    overrides = [word for word in (parameters.get("overrides") or ()) if "…" not in word]
    single = [word for word in overrides if not _varied(word)]
    given = parameters.get("config")
    path = ROOT / given if isinstance(given, Path) else None
    try:
        if path is not None and path.is_file():
            config = load_config(path, single)
            problems = layout_problems(dict(config), processes) if processes else []
            if problems:
                return f"on {processes} GPUs: {'; '.join(problems)}"
        else:
            _, problems = apply_overrides(RunConfig, {}, single)
            if problems:
                return "; ".join(problems)
    except UserError as error:
        return str(error)
    wrong = [word for word in overrides if not is_key(word.partition("=")[0])]
    return f"no such key: {', '.join(wrong)}" if wrong else None


def _varied(override: str) -> bool:
    """A key of a sweep with several values."""
    value = yaml.safe_load(override.partition("=")[2])
    return isinstance(value, str) and "," in value


def is_key(dotted: str) -> bool:
    """A key, or a section, of a run's configuration."""
    try:
        annotation_at(RunConfig, dotted.split("."))
    except KeyError:
        return False
    return True


def sections() -> list[str]:
    """The sections of a run's configuration."""
    return [name for name, field in RunConfig.model_fields.items() if section_of(field.annotation) is not None]


@cache
def options() -> frozenset[str]:
    """Every option of every command."""
    return frozenset(name for found in _all_commands(command()) for name in _names(found))


def _all_commands(found: Any) -> Iterator[Any]:
    yield found
    if hasattr(found, "resolve_command"):
        context = found.make_context(found.name or "ditmoe", [], resilient_parsing=True)
        for name in found.list_commands(context):
            yield from _all_commands(found.get_command(context, name))


def _names(found: Any) -> Iterator[str]:
    for parameter in found.params:
        yield from parameter.opts
        yield from parameter.secondary_opts
    yield from ("--help", "-h")


def unknown_keys(values: dict[str, Any], model: Any, prefix: str = "") -> Iterator[str]:
    """Keys of a block of YAML that a model of settings does not have."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{prefix}{key}"
            continue
        section, item = section_of(field.annotation), item_section(field.annotation)
        if section is not None and isinstance(value, dict):
            yield from unknown_keys(value, section, f"{prefix}{key}.")
        if item is not None and isinstance(value, list):
            for each in value:
                yield from unknown_keys(each, item, f"{prefix}{key}.") if isinstance(each, dict) else ()
