"""Processes that do jobs for the service."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ditmoe.data.storage.files import open_appending
from ditmoe.launcher.local.launch import PROGRAM
from ditmoe.launcher.local.signals import PARENT_VARIABLE
from ditmoe.sampling.service.access import TOKEN_VARIABLE


def start_child(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a verb of ours that ends with the thread that starts it; its output is appended to a file."""
    inherited = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
    with open_appending(log) as output:
        return subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **environment, PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,  # Ctrl-C is for the service, which queues its jobs again
        )
