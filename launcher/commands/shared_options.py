"""Options that several commands have, declared once."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def with_options(
    options: Mapping[str, tuple[Any, Any]], argument: str, collect: Callable[[Mapping[str, Any]], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options in place of one of its arguments, which then holds what they were.

    Args:
        options: option → its annotation and its default.
        argument: the command's argument.
        collect: makes that argument of the options' values; a list is a tuple there.
    """
    parameters = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    }

    def mark(command: Callable[..., None]) -> Callable[..., None]:
        signature: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            signature += parameters.values() if name == argument else [parameter]

        @functools.wraps(command)
        def with_all(*arguments: Any, **given: Any) -> None:
            values = {name: given.pop(name, option.default) for name, option in parameters.items()}
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            command(*arguments, **{argument: collect(values)}, **given)

        with_all.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        with_all.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
        return with_all

    return mark
