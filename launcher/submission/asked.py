"""What is asked of Slurm: the site file's defaults, and the options that come before them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from ditmoe.launcher.configuration.problems import problem_list
from ditmoe.launcher.configuration.validation import validate_sections
from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import expected_name
from ditmoe.model.outside.yaml_reader import read_yaml, shortened
from ditmoe.slurm.job_folder import PHASES
from ditmoe.slurm.submission.settings import JobSettings, contradictions
from ditmoe.slurm.submission.values import raw_option

SITE_VARIABLE: Final = "DITMOE_SITE"
USUAL_SITE: Final = Path("~/.config/ditmoe/site.yaml")
_REPEATED: Final = {"sbatch": "--sbatch", "limits": "--limit", "container_mounts": "--container-mount"}
"""Setting → the option that gives a part of it, where that is called otherwise."""


def job_settings(site: Path | None, given: Mapping[str, Any]) -> JobSettings:
    """The settings of a job.

    Args:
        site: the site file that the user names; None: that of DITMOE_SITE, or the usual one where it is there.
        given: settings that stand on the command line, by their names. Raw options and limits are `KEY=VALUE`.

    Raises:
        UserError: every problem of a file, or of all options, at once.
    """
    defaults = _site_values(site)
    values, problems = _option_values(given)
    problems += [_by_option(line) for line in _problems(values)]
    if problems:
        raise UserError(problem_list("options", problems))
    merged = {**defaults, **values}
    for key in ("sbatch", "limits"):
        merged[key] = {**(defaults.get(key) or {}), **values.get(key, {})}
    if merged.get("container") == "none":
        merged["container"] = None
    settings = JobSettings.model_validate(merged)
    problems = contradictions(settings)
    if problems:
        raise UserError(problem_list("options, with the site file's defaults", problems))
    return settings.model_copy(update={"container": _image(settings)})


def _site_values(site: Path | None) -> dict[str, Any]:
    """The valid values of the site file."""
    named = site or (Path(os.environ[SITE_VARIABLE]) if os.environ.get(SITE_VARIABLE) else None)
    path = named or USUAL_SITE.expanduser()
    if named is None and not path.exists():
        return {}
    values, problems = read_yaml(path)
    problems += _problems(values)
    if problems:
        raise UserError(problem_list(str(path), problems))
    return values


class _File(BaseModel):
    """A site file has no sections: it is one."""

    site: JobSettings


def _problems(values: Mapping[str, Any]) -> list[str]:
    """A line for each wrong setting, beginning with its name."""
    _, problems = validate_sections(_File, {"site": dict(values)})
    return [line.removeprefix("site.").replace(" site.", " ") for line in problems]


def _option_values(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options as settings, and a line for each that is no KEY=VALUE."""
    values, problems = {key: value for key, value in given.items() if value not in (None, [], ())}, []
    for key in ("sbatch", "limits"):
        pairs: dict[str, Any] = {}
        for text in values.pop(key, ()):
            name, equals, value = text.partition("=")
            problem = _of_pair(key, name, bool(equals))
            if problem is not None:
                problems.append(f"{_REPEATED[key]} {shortened(ascii(text))}: {problem}")
                continue
            pairs[name] = value if equals else True
        if pairs:
            values[key] = pairs
    return values, problems


def _of_pair(key: str, name: str, has_value: bool) -> str | None:
    """What is wrong with the name of a raw option or of a limit; None: nothing."""
    if key == "limits":
        if not has_value:
            return "expected PHASE=DURATION, such as save=1h"
        return None if name in PHASES else f"no such phase; {expected_name(name, PHASES)}"
    try:
        raw_option(name)
    except ValueError as error:
        return str(error)
    return None


def _by_option(line: str) -> str:
    """A line about a setting as one about its option."""
    name = line.split(" ", 1)[0].split(".", 1)[0].rstrip(":")
    rest = line.removeprefix(name)
    option = _REPEATED.get(name, f"--{name.replace('_', '-')}")
    return f"{option}{f' {rest[1:]}' if rest.startswith('.') else rest}"


def _image(settings: JobSettings) -> str | None:
    """The container's image, absolute where it is a file. UserError where that is not there."""
    image = settings.container
    if image is None or "://" in image or (settings.container_runtime == "pyxis" and "/" not in image[:2]):
        return image
    path = Path(image).expanduser().absolute()
    if not path.exists():
        raise UserError(
            f"--container {image}: no such file; expected an image, or an address such as docker://NAME"
        )
    return str(path)
