"""YAML as a configuration needs it: safe, duplicate keys refused, `1e-4` a number, `yes` a word."""

import re
from pathlib import Path
from typing import Any

import yaml

from ditmoe.model.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that collects duplicate keys and reads plain scalars as YAML 1.2 does."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in first_line:
                self.problems.append(
                    f"{name} is given twice, in line {first_line[name]} and line {line}; expected once"
                )
            first_line.setdefault(name, line)
        return super().construct_mapping(node, deep=deep)


_NUMBERS_AND_WORDS = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN)",
        "-+.0123456789",
    ),
)
_replaced = {tag for tag, _, _ in _NUMBERS_AND_WORDS} | {"tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _replaced]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _letters in _NUMBERS_AND_WORDS:
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_letters))


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Read YAML text: its value, and a message for each key that is given twice.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.problems
    finally:
        loader.dispose()


def read_yaml(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Read a YAML file of keys: its values, and a message for each key that is given twice.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping of keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}; expected a YAML configuration") from error
    try:
        values, problems = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise UserError(f"{path}{place}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: found a {type(values).__name__}; expected keys such as `model:` and `data:`")
    return values, problems
