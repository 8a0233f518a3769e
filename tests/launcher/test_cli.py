"""The command line: answers at once, exit codes, and messages without tracebacks."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import ditmoe as package
from ditmoe.launcher.cli import VERBS
from ditmoe.launcher.configuration.reference import render

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]


def ditmoe(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ditmoe.launcher", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_imports_little(verb: str | None) -> None:
    """Importing is what help takes its time for; `benchmarks/answers.py` prints how much that is."""
    arguments = ["--help"] if verb is None else [verb, "--help"]
    code = (
        "import sys\nfrom ditmoe.launcher.cli import main\n"
        "try:\n    main()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: ditmoe" in done.stdout, done.stderr
    modules = done.stderr.split()
    assert len(modules) < 330  # 293 were the most
    assert not {"torch", "numpy", "yaml", "rich", "PIL", "tqdm"} & {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_imported_without_torch(verb: str) -> None:
    code = f"import sys, {VERBS[verb].module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_lists_every_verb() -> None:
    shown = ditmoe("--help").stdout
    for verb, (_, line) in VERBS.items():
        assert verb in shown and line in shown
    assert ditmoe().returncode == 2


def test_version() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["version"]
    assert ditmoe("--version").stdout == f"ditmoe {declared}\n"
    assert package.__version__ == declared


def test_an_unknown_command() -> None:
    done = ditmoe("trian")
    assert done.returncode == 2 and done.stderr.endswith("; did you mean train?\n")


def test_shipped_configurations_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = ditmoe("train", "dit-s-2-8e2a-256", "--dry-run", "launch.processes=8")
    assert done.returncode == 0 and "preset: DiT-S/2-8E2A" in done.stdout, done.stderr
    (tmp_path / "photos.yaml").write_text("nothing: 1\n")
    done = ditmoe("train", "photos")
    assert done.returncode == 2 and done.stderr.startswith(
        "note: photos is photos.yaml of the current folder; the"
    )


def test_a_user_error_has_no_traceback(tmp_path: Path) -> None:
    done = ditmoe("train", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path}/none.yaml: cannot be read: No such file or directory; expected a YAML file\n"
    )


def test_missing_data_are_found_before_anything_starts(write_config: Write, tmp_path: Path) -> None:
    path = write_config(data={"sources": [{"path": "nowhere"}]})
    done = ditmoe("train", str(path))
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: no such folder")
    assert not (tmp_path / "runs").exists()


def test_dry_run(write_config: Write, tmp_path: Path) -> None:
    done = ditmoe("train", str(write_config()), "--dry-run", "optim.lr=2e-4")
    assert done.returncode == 0, done.stderr
    values = yaml.safe_load(done.stdout)
    assert values["model"]["image_size"] == 8 and values["parallel"]["data"] == 2
    assert values["optim"]["lr"] == 2e-4
    assert "rank 0: experts 0–1 | rank 1: experts 2–3" in done.stdout
    for word in (
        "total",
        "activated",
        "weights",
        "gradients",
        "optimiser",
        "EMA",
        "activations",
        "buffers",
        "peak",
    ):
        assert f"# {word} " in done.stdout
    assert not (tmp_path / "runs").exists()


def test_configuration_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == render(), (
        "run: python -m ditmoe.launcher.configuration.reference > docs/configuration.md"
    )


@pytest.mark.parametrize(("variables", "stays"), [({"SLURM_PROCID": "1"}, True), ({}, False)])
def test_a_task_of_srun_stays_a_moment_after_its_message(variables: dict[str, str], stays: bool) -> None:
    """srun ends the step at the first task that fails, and loses what it was not sent by then."""
    code = (
        "import sys, time\nfrom ditmoe.launcher.cli import main\n"
        "time.sleep = lambda seconds: print('then', seconds, 'seconds', file=sys.stderr)\nmain()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_PROCID"} | variables
    command = [sys.executable, "-c", code, "train", "absent.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2 and "absent.yaml" in done.stderr
    assert done.stderr.endswith("then 1.0 seconds\n") == stays
