"""The keys of a run's configuration as one list: what each takes, its default, and what its docstring says.

`ditmoe keys`, the completion of keys and docs/configuration.md are made of it.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ditmoe.launcher.configuration.fields import choices, expected, section_of, unit_of, walk
from ditmoe.launcher.configuration.run_config import RunConfig


class Key(NamedTuple):
    """A key that holds a value, not a section."""

    name: str
    """Dotted; the items of a list of sections have the position 0."""
    takes: str
    """Its type, bounds and choices, in words."""
    unit: str
    """What its number counts or measures, in words; empty for a plain number, and for what is none."""
    default: str
    """`default 0.1`, as YAML; `required`; or empty where it follows from others."""
    text: str
    """Its docstring."""
    choices: tuple[str, ...]
    """The values that it may have, where they have names."""

    @property
    def line(self) -> str:
        """All but the docstring: `an integer >= 1; unit: images; default 16`."""
        return "; ".join(filter(None, (self.takes, self.unit and f"unit: {self.unit}", self.default)))

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring, in one line."""
        first = re.split(r"(?<=[.;])\s", " ".join(self.text.split()), maxsplit=1)[0]
        return first.rstrip(".;")


def key_of(name: str, field: FieldInfo) -> Key:
    """What is known of a key."""
    return Key(
        name,
        expected(field),
        unit.name if (unit := unit_of(field)) else "",
        _default(name, field),
        inspect.cleandoc(field.description or ""),
        choices(field.annotation),
    )


def all_keys(model: type[BaseModel] = RunConfig) -> Iterator[Key]:
    """Every key of a configuration, in the order of its sections."""
    for name, field in walk(model):
        if section_of(field.annotation) is None:
            yield key_of(name, field)


def _default(name: str, field: FieldInfo) -> str:
    if name == "run.dir":
        return "default runs/NAME"
    if field.is_required():
        return "required"
    # The network's shape has zeros for what the preset gives.
    if name.startswith("model.") and field.default == 0 and isinstance(field.default, int):
        return ""
    value: Any = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if isinstance(value, tuple):
        value = list(value)
    return f"default {yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"
