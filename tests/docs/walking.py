"""Runs the shell blocks of a page in their order in one shell, as a reader would who follows the page alone.

`ditmoe` is a small program on the PATH that hands its arguments to a server in the process of the tests, which
shortens them (tests/docs/shortening.py) and runs them in a process forked from one whose imports are done.
"""

import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final

from ditmoe.launcher.local.launch import free_port
from tests.docs.pages import ROOT, SHELL, Block, blocks, typed
from tests.docs.shortening import shortened, walked
from tests.forked import run_forked

SERVED: Final = "service.client"
"""In a block of Python that asks the service which the page has started."""
_ASKS: Final = """\
#!{python} -SE
import json, os, socket, sys
asked = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.environ["DITMOE_WALK"])
    connection.sendall(json.dumps(asked).encode() + b"\\n")
    answer = json.loads(connection.makefile().read())
try:
    sys.stdout.write(answer["out"])
    sys.stdout.flush()
except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""
_SERVES: Final = """\
#!/usr/bin/env bash
# In the background, until the page ends; comes back when it answers.
python -m ditmoe.launcher serve "$@" >>serving.txt 2>&1 &
echo $! >>"$DITMOE_WALK.pids"
for _ in $(seq 600); do
    grep -q 'http://' serving.txt && exit 0
    sleep 0.1
done
cat serving.txt
exit 1
"""
_LOOKS: Final = """\
#!/usr/bin/env bash
# TensorBoard shows a folder until it is stopped: here the folder has to be there.
test -d "${@: -1}"
"""
_CLONES: Final = """\
#!/usr/bin/env bash
# `git clone ADDRESS FOLDER`: a copy of this checkout.
[ "$1" = clone ] && { [ "$DITMOE_CLONE" -ef "${@: -1}" ] || cp -r "$DITMOE_CLONE" "${@: -1}"; }
"""


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def served(folder: Path, cluster: bool) -> Iterator[Path]:
    """The socket of a server that runs what `ditmoe` is asked, for as long as the context lasts."""
    numbers = count()
    lines: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked = json.loads(self.rfile.readline())
            asked["arguments"] = shortened(asked["arguments"], cluster)
            program = [str(Path(__file__).with_name("within.py")), json.dumps(asked)]
            start = time.monotonic()
            done = run_forked(program, folder / f"command-{next(numbers)}", seconds=280)
            lines.append(f"{time.monotonic() - start:6.1f} s  ditmoe {' '.join(asked['arguments'])}")
            (folder / "commands.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            answer: dict[str, Any] = {"code": done.returncode, "out": done.stdout, "err": done.stderr}
            self.wfile.write(json.dumps(answer).encode())

    address = folder / "socket"
    with _Server(str(address), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield address
        server.shutdown()


def script_of(page: str) -> tuple[str, list[str]]:
    """The whole page as one script, and the lines that are left out."""
    parts, left = [], []
    for block in blocks(page):
        text, without = _shell_of(block)
        left += without
        if text.strip():
            parts.append(f"echo '== {page}:{block.line}' >&2\n{text}")
    return "\n".join(parts) + "\n", left


def _shell_of(block: Block) -> tuple[str, list[str]]:
    if block.language in SHELL:
        return walked(block.page, typed(block))
    if block.language == "python" and SERVED in block.text:
        text, left = walked(block.page, block.text)
        return f"python - <<'END_OF_PYTHON'\n{text}\nEND_OF_PYTHON\n", left
    return "", []


def walk(page: str, start: Path, checkout: Path, helpers: Path, environment: dict[str, str], cluster: bool) -> str:
    """Follow a page; what it printed.

    Args:
        page: its path from the root.
        start: the folder that the reader is in.
        checkout: what a clone would be, with the files that the page takes for granted.
        helpers: gets the programs that stand for others, and what the commands print.
        environment: variables besides this process's.
        cluster: Slurm's programs work.

    Raises:
        AssertionError: a command failed.
    """
    programs = helpers / "bin"
    programs.mkdir(parents=True)
    texts = {
        "ditmoe": _ASKS.format(python=sys.executable),
        "serving": _SERVES,
        "tensorboard": _LOOKS,
        "git": _CLONES,
    }
    for name, text in texts.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    script, _ = script_of(page)
    path = helpers / "page.sh"
    end = 'kill $(jobs -p) $(cat "$DITMOE_WALK.pids" 2>/dev/null) 2>/dev/null || true'
    head = f"set -eo pipefail\ntrap '{end}' EXIT\n"
    path.write_text(head + script.replace("PORT", str(free_port())), encoding="utf-8")
    with served(helpers, cluster) as address:
        variables = {
            **os.environ,
            **environment,
            "PATH": f"{programs}:{Path(sys.executable).parent}:{environment.get('PATH', os.environ['PATH'])}",
            "PYTHONPATH": f"{ROOT / '.typing'}:{ROOT}",
            "HOME": str(helpers / "home"),
            "XDG_CACHE_HOME": str(helpers / "cache"),
            "DITMOE_WALK": str(address),
            "DITMOE_CLONE": str(checkout),
            "REPOSITORY": str(checkout),
        }
        with (helpers / "output.txt").open("w", encoding="utf-8") as output:
            done = subprocess.run(
                ["bash", str(path)],
                cwd=start,
                env=variables,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
    text = (helpers / "output.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, f"{page}: exit code {done.returncode}\n{text[-6000:]}"
    return text
