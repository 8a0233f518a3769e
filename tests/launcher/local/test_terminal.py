"""Standard output and error: characters that they lack, and readers that have gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_forked

PROGRAM = """
import sys
from ditmoe.launcher.local.terminal import prepare_streams
prepare_streams()
print("\\u00e9 \\U0001f600 \\udcff")
print("\\u00e9 \\U0001f600 \\udcff", file=sys.stderr)
"""


def run(code: str, *redirections: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """By a shell, which closes what is to be closed."""
    command = f'"$0" -c "$1" {" ".join(redirections)}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, code],
        capture_output=True,
        env={**os.environ, **variables},
        timeout=60,
    )


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_any_text_can_be_written(variables: dict[str, str]) -> None:
    done = run(PROGRAM, PYTHONCOERCECLOCALE="0", **variables)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    for written in (done.stdout, done.stderr):
        assert written in (b"\\xe9 \\U0001f600 \\udcff\n", "é 😀 \\udcff\n".encode())
    if "PYTHONIOENCODING" in variables:
        assert done.stdout.isascii()


def test_streams_that_were_closed_before() -> None:
    done = run(PROGRAM, ">&-")
    assert done.returncode == 0 and done.stderr == "é 😀 \\udcff\n".encode()
    done = run(PROGRAM, "2>&-")
    assert done.returncode == 0 and done.stdout == "é 😀 \\udcff\n".encode()


def test_nobody_hears_an_error() -> None:
    """Exit code and output are what they would be: messages go nowhere."""
    code = PROGRAM + "print('still there'); print('x' * 100000, file=sys.stderr); sys.exit(7)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, timeout=60)
    os.close(writer)
    assert done.returncode == 7 and b"still there" in done.stdout


def test_a_run_goes_on_without_a_reader(tmp_path: Path) -> None:
    """What it says is in its log, with a word on why the terminal ends."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys; from pathlib import Path\n"
        "reader, writer = os.pipe(); os.close(reader); sys.stdout = open(writer, 'w')\n"
        "from ditmoe.launcher.local.terminal import prepare_streams\n"
        "from ditmoe.launcher.training.report import Reporter\n"
        "from ditmoe.launcher.training.run_folder import RunFolder\n"
        "prepare_streams()\n"
        "with Reporter(RunFolder(Path(sys.argv[1])), 5) as report:\n"
        "    for step in range(1, 6):\n"
        "        report.log(f'said {step}'); report.record(step, {'loss': 1.0}); report.advance()\n"
    )
    done = run_forked([str(program), str(tmp_path / "run")], tmp_path / "output", seconds=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("nobody reads the standard output any more (Broken pipe); this log goes on") == 1
    assert all(f"said {step}" in log and f"(step={step:07d})" in log for step in range(1, 6))
