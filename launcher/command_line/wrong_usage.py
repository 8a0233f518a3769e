"""What a user reads where a command line is wrong: what was found, what was expected, what was probably meant."""

from typing import Any

import typer

from ditmoe.model.outside.nearest import expected_name


class WrongUsage(typer.TyperException):
    """A command line that names a command which there is not, told in our words."""


def words_of(error: typer.TyperException) -> str:
    """A message of the command line's library, in our words."""
    if isinstance(error, WrongUsage):
        return error.message
    context: Any = getattr(error, "ctx", None)
    if context is None:
        return _begun_small(error.format_message().rstrip("."))
    path = context.command_path
    listed = f"`{path} --help`"
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        return f"{path} {option}: no such option; {expected_name(option, _options(context), listed, 'one')}"
    parameter: Any = getattr(error, "param", None)
    if parameter is None:
        return f"{path}: {_begun_small(error.format_message().rstrip('.'))}; {listed} shows its usage"
    shown = parameter.opts[0] if parameter.param_type_name == "option" else parameter.display_name_raw
    if type(error).__name__ == "MissingParameter":
        return f"{path}: {shown} is missing; expected {_usage(context)}"
    from pydantic import ValidationError  # help does not need it

    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return f"{shown}: {_begun_small(error.message.rstrip('.'))}; {listed} shows what it takes"
    found, descriptor = str(cause.errors()[0]["input"]), parameter.type_descriptor
    if descriptor.is_choice:
        known = [str(getattr(each, "value", each)) for each in descriptor.choices]
        return f"{shown} {found}: {expected_name(found, known)}"
    return f"{shown} {found}: expected {_takes(parameter)}"


def _takes(parameter: Any) -> str:
    """A number's type and bounds, in words; of other types their name."""
    words = {int: "an integer", float: "a number"}.get(parameter.type_descriptor.annotation, parameter.bare_type())
    limits = {">=": parameter.min, "<=": parameter.max}
    bounds = [f"{sign} {bound:,}" for sign, bound in limits.items() if bound is not None]
    return f"{words} {' and '.join(bounds)}".rstrip()


def _options(context: Any) -> list[str]:
    """The options of a command, the long spelling of each."""
    found = []
    for parameter in context.command.get_params(context):
        if parameter.param_type_name == "option":
            found += [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")]
    return found


def _usage(context: Any) -> str:
    return " ".join([context.command_path, *context.command.collect_usage_pieces(context)])


def _begun_small(message: str) -> str:
    """A sentence as the middle of one: `Got unexpected…` → `got unexpected…`."""
    first, rest = message[:1], message[1:]
    return message if rest[:1].isupper() else first.lower() + rest
