"""docs/configuration.md: every key of a run's configuration, from the docstrings of the fields.

`python -m ditmoe.launcher.configuration.reference > docs/configuration.md` writes it.
"""

import inspect

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ditmoe.launcher.configuration.fields import item_section, section_of
from ditmoe.launcher.configuration.keys import key_of
from ditmoe.launcher.configuration.run_config import RunConfig

_HEAD = """\
# Configuration

A run is described by a YAML file and by dotted keys after it on the command line:

```
ditmoe train configs/demo.yaml train.steps=2000 optim.betas='[0.9, 0.95]'
```

Values are YAML (`1e-4` is a number, `yes` is a word, and giving a key twice is an error). `ditmoe train CONFIG
--dry-run` prints the whole configuration as a run would use it, and `ditmoe keys optim.` lists keys at the
terminal.

When a run is resumed, most keys must stay as they were. These keys, and all keys below them, may change without
changing the loss curve:

{free}

These may change too, but they change the loss curve from there on:

{from_then_on}

`log.txt` and `history.jsonl` record every change. A run without a checkpoint has trained nothing that a change
could break, so any key may change.

`python -m ditmoe.launcher.configuration.reference` writes this page from the fields' own docstrings.
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


def _entry(name: str, field: FieldInfo) -> str:
    """A key: what it takes, its default, and its docstring."""
    key = key_of(name, field)
    body = "\n".join(f"  {line}" if line else "" for line in key.text.splitlines())
    unit = f"; unit: {key.unit}" if key.unit else ""
    word, _, value = key.default.partition(" ")
    default = f"; {word} `{value}`" if value else f"; {word}" if word else ""
    return f"- **`{name}`**: {key.takes}{unit}{default}\n\n{body}\n"


if __name__ == "__main__":
    print(render(), end="")
