"""What may stand in a batch script: the checks of every value that a user gives, and how it is quoted there.

A value is one line. Slurm reads its own lines (`#SBATCH`) by rules that differ from the shell's.
"""

import re
import shlex
from typing import Final

from ditmoe.model.outside.text import is_fit_to_print

LONGEST_VALUE: Final = 2000
"""Bytes of a value; Slurm takes lines of 8 KiB."""
_TIME: Final = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_DURATION: Final = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", re.ASCII)
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:,=@%^+&|*-]+", re.ASCII)
_LONGEST_SECONDS: Final = 366 * 86400

OWNED: Final[dict[str, str]] = {
    **dict.fromkeys(("nodes", "gpus-per-node", "time", "partition", "account", "qos"), "has an option of its own"),
    **dict.fromkeys(("constraint", "mem", "cpus-per-task"), "has an option of its own"),
    "ntasks-per-node": "is what --tasks-per-node says",
    "ntasks": "is what --nodes and --tasks-per-node say",
    "signal": "is what --warning says",
    "array": "would start the job many times over",
    "chdir": "is the folder that the job is submitted from",
    "error": "is written to the job folder, with the output",
    "export": "is decided by the script; the site file has `environment`",
    "get-user-env": "is decided by the script; the site file has `environment`",
    "job-name": "tells that a run's job is in the queue",
    "no-requeue": "would end the job where it should go on",
    "open-mode": "keeps the output of earlier attempts",
    "output": "is written to the job folder",
    "requeue": "is always asked for",
    "wrap": "is a script of its own",
    "parsable": "decides what sbatch prints",
    "quiet": "decides what sbatch prints",
    "test-only": "submits nothing; --dry-run shows the script",
    "wait": "would keep sbatch from coming back",
    "help": "submits nothing",
    "usage": "submits nothing",
    "version": "submits nothing",
}
"""Raw options that are not taken, and why."""
_WHOLE: Final = ("gpus", "no-kill", "wait-all-nodes")
"""Options of their own right, although one above begins with them or they with it."""


def one_line(text: str) -> str:
    """A value of one line. ValueError where it is empty, long, or has characters that control a terminal."""
    if not text.strip() or not is_fit_to_print(text) or len(text.encode(errors="surrogateescape")) > LONGEST_VALUE:
        raise ValueError(f"expected one line of text, of at most {LONGEST_VALUE} bytes")
    return text


def raw_option(key: str) -> str:
    """The name of one of sbatch's long options. ValueError where it is none, or is not the user's to give."""
    if not re.fullmatch(r"[a-z][a-z0-9-]+", key, re.ASCII):
        raise ValueError(
            f"{key!a} is no option of sbatch; expected its long name without dashes, such as mail-type"
        )
    for owned, reason in OWNED.items():
        # sbatch takes the beginning of an option's name for the option.
        if owned.startswith(key) and key not in _WHOLE:
            raise ValueError(f"{owned} {reason}; expected it left out")
    return key


def time_limit_seconds(text: str) -> int | None:
    """The seconds of a time limit as sbatch takes it; None: none. ValueError where it is not one."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _TIME.fullmatch(text)
    numbers = [int(part[:9]) if part is not None else None for part in match.groups()] if match else []
    if not any(numbers):
        raise ValueError(
            "expected a time of at least a second, as minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS;"
            " or UNLIMITED"
        )
    days, first, second, third = numbers
    assert first is not None
    if days is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first, second or 0, third
    else:
        hours, minutes, seconds = 0, first, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def duration_seconds(text: str) -> int:
    """The seconds of `90`, `90s`, `30m`, `2h` or `1h30m`. ValueError where it is none of them, or over a year."""
    match = _DURATION.fullmatch(text)
    numbers = [int(part[:9]) if part else 0 for part in match.groups()] if match else [0]
    total = sum(number * unit for number, unit in zip(numbers, (3600, 60, 1), strict=False))
    if not 0 < total <= _LONGEST_SECONDS:
        raise ValueError("expected a duration of a second to a year, such as 90s, 30m, 2h or 1h30m")
    return total


def in_shell(word: str) -> str:
    """A word as the shell reads it back."""
    return shlex.quote(word)


def in_option(value: str) -> str:
    """A value as Slurm reads it back from a line `#SBATCH --key=value`."""
    if _PLAIN.fullmatch(value):
        return value
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'"{escaped}"'


def plain_path(path: str) -> str:
    """A path that a script can have. ValueError where Slurm or PYTHONPATH would read another one from it."""
    if (
        not is_fit_to_print(path)
        or "\\" in path
        or ":" in path
        or len(path.encode(errors="replace")) > LONGEST_VALUE
    ):
        raise ValueError(
            f"{path!a}: cannot stand in a batch script; expected no backslash, no colon, nothing that controls a"
            f" terminal, and at most {LONGEST_VALUE} bytes"
        )
    return path


def in_file_name(path: str) -> str:
    """A path for an option that replaces `%j` and the like."""
    return path.replace("%", "%%")
