"""Shells at a terminal of their own, into which lines and tabs are typed."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Final, Self

PROMPT: Final = "READY>"
STARTS: Final = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
# The terminal echoes these, and what it echoes is not yet the prompt.
SETS: Final = {
    "bash": "PS1='READY''>'; bind 'set enable-bracketed-paste off'; bind 'set show-all-if-ambiguous on'",
    "zsh": "autoload -Uz compinit; compinit -u -d $HOME/dump; setopt no_beep; PROMPT='READY''>'",
}
CLEAR: Final = "\x15"
"""The key that empties the line."""


def with_ditmoe(folder: Path) -> dict[str, str]:
    """An environment in which `ditmoe` is this program."""
    binary = folder / "bin" / "ditmoe"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ditmoe.launcher "$@"\n')
    binary.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{binary.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HOME": str(folder),
        "TERM": "dumb",
        "COLUMNS": "200",
    }


class Shell:
    """An interactive bash or zsh that completes command lines of ditmoe."""

    def __init__(self, name: str, folder: Path) -> None:
        self._terminal, inner = pty.openpty()
        self._process = subprocess.Popen(
            STARTS[name],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=with_ditmoe(folder),
            cwd=folder,
            start_new_session=True,
        )
        os.close(inner)
        self.type(f"{SETS[name]}\n", PROMPT)
        self.type(f"source <(ditmoe completion {name})\n", PROMPT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def type(self, keys: str, awaited: str) -> None:
        """Type keys, and wait for a text on the terminal; AssertionError with what came instead."""
        os.write(self._terminal, keys.encode())
        found, end = "", time.monotonic() + 60
        with DefaultSelector() as selector:  # not `select`, which knows no descriptor beyond 1,023
            selector.register(self._terminal, EVENT_READ)
            while awaited not in found:
                assert time.monotonic() < end, f"{keys!r}: {found!r}"
                if selector.select(0.1):
                    found += os.read(self._terminal, 65536).decode(errors="replace").replace("\r", "")
