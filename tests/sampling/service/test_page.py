"""The commands of docs/service.md run as they are printed, against `ditmoe serve` itself."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditmoe.launcher.cli import VERBS
from tests.sampling.small_run import write_run

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = re.findall(
    r"^```bash\n(.*?)^```$", (ROOT / "docs" / "service.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `ditmoe serve` listens."""
    runs = tmp_path_factory.mktemp("page") / "runs"
    write_run(runs / "demo")
    command = [sys.executable, "-m", "ditmoe.launcher", "serve", str(runs), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"serving {runs} at http://127.0.0.1:")
        try:
            yield line.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.split("http")[1].split()[0][-20:])
def test_the_page_is_true(block: str, address: str, tmp_path: Path) -> None:
    text = block.replace("http://127.0.0.1:8000", address)
    done = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout and '{"error":' not in done.stdout, done.stdout
    if "generations" in block:
        reply = json.loads(done.stdout)
        assert [each["nfe"] for each in reply["data"]] == [35, 35]
        assert set(reply) == {"created", "model", "step", "data", "sampler"}


def test_the_verb_is_listed() -> None:
    assert "serve" in VERBS and len(COMMANDS) >= 2
