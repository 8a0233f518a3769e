"""YAML as a configuration needs it: plain, within limits, duplicate keys refused, `1e-4` a number, `yes` a word.

Whatever the text, reading ends soon, with values or with a message: how long, how deep and how large it may be is
limited while it is composed (aliases count as what they stand for), tags are refused, so that only plain values
come out, and keys are strings.
"""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from ditmoe.model.errors import UserError

LONGEST_TEXT: Final = 2**20
"""Characters of a file, or of an override."""
DEEPEST: Final = 32
"""Mappings and lists within one another."""
MOST_VALUES: Final = 50_000
"""Values, keys, lists and mappings, each as often as aliases repeat it."""
LARGEST_INTEGER: Final = 2**63 - 1
"""Larger ones are read as text, so that the key that holds one says what it takes."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that collects duplicate keys and reads plain scalars as YAML 1.2 does."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []
        self._depth = 0
        self._values = 0
        self._composed: dict[int, tuple[int, int]] = {}
        """By the identity of a finished node: the values that it stands for, and its height."""
        self._height = 0
        """Of the node that was composed last."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, and stop where the text goes beyond the limits."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _refused(event, f"found the tag {event.tag}; expected plain values, without tags")
        alias = isinstance(event, yaml.AliasEvent)
        outer_height, values_before = self._height, self._values
        self._depth, self._height = self._depth + 1, 0
        if self._depth > DEEPEST:
            raise _refused(event, f"found more than {DEEPEST} mappings and lists within one another")
        node = super().compose_node(parent, index)
        if alias:
            if id(node) not in self._composed:
                raise _refused(event, f"the alias *{event.anchor} is part of what it stands for")
            values, height = self._composed[id(node)]
        else:
            values, height = self._values - values_before + 1, self._height + 1
            self._composed[id(node)] = values, height
            if isinstance(node, yaml.ScalarNode):
                _check_text(event, node.value)
        self._values = values_before + values
        if self._values > MOST_VALUES:
            raise _refused(
                event, f"found more than {MOST_VALUES:,} values, aliases counted as what they stand for"
            )
        if self._depth - 1 + height > DEEPEST:
            raise _refused(event, f"found more than {DEEPEST} mappings and lists within one another")
        self._depth, self._height = self._depth - 1, max(outer_height, height)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; its keys are the text that stands there, whatever it would be as a value."""
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"found a {key_node.id} as a key; expected a name", key_node.start_mark
                )
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in first_line:
                self.problems.append(
                    f"{shortened(name)} is given twice, in line {first_line[name]} and line {line}; expected once"
                )
            first_line.setdefault(name, line)
        self.flatten_mapping(node)  # what `<<` merges in gives way to the mapping's own keys
        for key_node, _ in node.value:
            key_node.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        """Construct an integer, or the text of one that is too large."""
        if len(node.value) > 40:
            return node.value
        value = super().construct_yaml_int(node)
        return value if abs(value) <= LARGEST_INTEGER else node.value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refused(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, problem, event.start_mark)  # type: ignore[arg-type]


def _check_text(event: yaml.Event, text: str) -> None:
    """Text that can be written to a file, and be a path."""
    if "\0" in text:
        raise _refused(event, "found the character \\0; expected text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _refused(event, "found half of a surrogate pair; expected characters of Unicode")


def shortened(text: str, most: int = 60) -> str:
    """A text in at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


_NUMBERS_AND_WORDS = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN)",
        "-+.0123456789",
    ),
)
_replaced = {tag for tag, _, _ in _NUMBERS_AND_WORDS}
_replaced |= {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _replaced]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _letters in _NUMBERS_AND_WORDS:
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_letters))


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Read YAML text: its value, and a message for each key that is given twice.

    Raises:
        yaml.YAMLError: the text is not YAML, or goes beyond the limits.
    """
    if len(text) > LONGEST_TEXT:
        raise yaml.YAMLError(f"found more than {LONGEST_TEXT:,} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.problems
    except OverflowError as error:
        raise yaml.YAMLError("found an escape that stands for no character of Unicode") from error
    finally:
        loader.dispose()


def reason_of(error: yaml.YAMLError) -> str:
    """Why a text is not YAML, in a line."""
    if isinstance(error, yaml.MarkedYAMLError):
        return shortened(str(error.problem), 200)
    return shortened(str(error).partition("\n")[0], 200)


def read_yaml(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Read a YAML file of keys: its values, and a message for each key that is given twice.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping of keys.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_TEXT + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}; expected a YAML file") from error
    try:
        values, problems = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{place}: not YAML: {reason_of(error)}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: found a {type(values).__name__}; expected keys such as `model:` and `data:`")
    return values, problems
