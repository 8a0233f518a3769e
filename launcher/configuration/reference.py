"""docs/configuration.md: every key of a run's configuration, from the docstrings of the fields.

`python -m ditmoe.launcher.configuration.reference > docs/configuration.md` writes it.
"""

import inspect
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ditmoe.launcher.configuration.fields import expected, item_section, section_of
from ditmoe.launcher.configuration.run_config import RunConfig

_HEAD = """\
# Configuration

A run is a YAML file, and dotted keys that are set after it on the command line:

    ditmoe train configs/demo.yaml train.steps=2000 optim.betas='[0.9, 0.95]'

Values are YAML (`1e-4` is a number, `yes` is a word, and a key that is given twice is an error). `ditmoe train
CONFIG --dry-run` prints the whole configuration of a run as it would be used.

When a run is resumed, most keys must be as they were. Any of these may change, with all keys below them, and the
loss curve stays what it is:

{free}

These may change too, and change the loss curve from there on:

{from_then_on}

Every change is told in `log.txt` and kept in `history.jsonl`. As long as a run has no checkpoint, nothing was
trained that a change could break: then any key may change.

This page is written by `python -m ditmoe.launcher.configuration.reference` from the fields' own docstrings.
"""


def render() -> str:
    """The page, as Markdown."""
    from ditmoe.launcher.configuration.resume import FREE, FROM_THEN_ON

    free, from_then_on = ("\n".join(f"- `{key}`" for key in keys) for keys in (FREE, FROM_THEN_ON))
    parts = [_HEAD.format(free=free, from_then_on=from_then_on)]
    plain = []
    for name, field in RunConfig.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            plain.append((name, field))
        else:
            parts += _section(name, section)
    parts += ["## Keys without a section\n", *(_entry(name, field) for name, field in plain)]
    return "\n".join(parts).rstrip() + "\n"


def _section(name: str, section: type[BaseModel]) -> list[str]:
    """Heading and keys of a section; its own sections follow."""
    lines = [f"## `{name}`\n", f"{inspect.cleandoc(section.__doc__ or '')}\n"]
    below: list[str] = []
    for key, field in section.model_fields.items():
        inner = section_of(field.annotation)
        items = item_section(field.annotation)
        if inner is not None:
            below += _section(f"{name}.{key}", inner)
            continue
        lines.append(_entry(f"{name}.{key}", field))
        if items is not None:
            lines += [_entry(f"{name}.{key}.0.{inside}", each) for inside, each in items.model_fields.items()]
    return [*lines, *below]


def _entry(key: str, field: FieldInfo) -> str:
    """A key: what it takes, its default, and its docstring."""
    text = inspect.cleandoc(field.description or "")
    body = "\n".join(f"  {line}" if line else "" for line in text.splitlines())
    return f"- **`{key}`**: {expected(field)}{_default(key, field)}\n\n{body}\n"


def _default(key: str, field: FieldInfo) -> str:
    """`; default 0.1`, as YAML."""
    if key == "run.dir":
        return "; default `runs/NAME`"
    # The network's shape has zeros for what the preset gives.
    if field.is_required() or (key.startswith("model.") and field.default == 0 and isinstance(field.default, int)):
        return "; required" if field.is_required() else ""
    value: Any = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"; default `{text}`"


if __name__ == "__main__":
    print(render(), end="")
