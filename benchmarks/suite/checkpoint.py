"""How long training waits for a save, against torch's own safetensors writer; on two processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.suite.figure import Figure, duration
from benchmarks.suite.machine import ROOT
from benchmarks.suite.settings import Settings

OURS = ("asynchronous", "not asynchronous")


def measure(settings: Settings) -> Iterator[Figure]:
    """The program's own figures."""
    file = settings.folder / "checkpoint.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), "--folder", str(settings.folder)]
    command += ["--repeats", str(settings.rounds_of(3)), "--json", str(file)]
    if settings.small:
        command += ["--depth", "1", "--hidden", "32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ})
    found = json.loads(file.read_text())
    theirs = found["torch's writer"]
    for name in OURS:
        for what, key in (("training waits for", "waits"), ("complete after", "complete")):
            yield duration(
                f"checkpoint, {name}: {what}", found[name][key], theirs[key], against="torch's safetensors writer"
            )
