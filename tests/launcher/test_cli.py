"""The command line: answers at once, exit codes, and messages without tracebacks."""

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
from tests.forked import DITMOE, run_forked

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]
Train = Callable[..., subprocess.CompletedProcess[str]]


def ditmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Started as a user does: for what imports little."""
    return subprocess.run([sys.executable, *DITMOE, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `ditmoe train`, forked from a process that has done the imports."""
    return lambda *arguments: run_forked([*DITMOE, "train", *arguments], tmp_path / "output", seconds=60)


HELPS = """
import os, sys
from ditmoe.launcher.cli import VERBS, main

for verb in (None, *VERBS):
    child = os.fork()  # which has imported what the command itself imports, and no other verb's
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[1]}/{verb}.{name}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["ditmoe", "--help"] if verb is None else ["ditmoe", verb, "--help"]
        try:
            main()
        finally:
            print(*sys.modules, file=sys.stderr)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(f"{sys.argv[1]}/{verb}.code", "w").write(str(code))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each verb the help, the exit code and the imported modules: VERB.out, VERB.code and VERB.err."""
    folder = tmp_path_factory.mktemp("helps")
    subprocess.run([sys.executable, "-c", HELPS, str(folder)], check=True, timeout=60)
    return folder


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_imports_little(verb: str | None, helps: Path) -> None:
    """Importing is what help takes its time for; `benchmarks/answers.py` prints how much that is."""
    shown, err, code = ((helps / f"{verb}.{name}").read_text() for name in ("out", "err", "code"))
    assert code == "0" and "Usage: ditmoe" in shown, err
    modules = err.split()
    assert "ditmoe.launcher.cli" in modules and len(modules) < 330  # 293 were the most
    assert not {"torch", "numpy", "yaml", "rich", "PIL", "tqdm"} & {name.partition(".")[0] for name in modules}


IMPORTS = """
import importlib, os, sys
from ditmoe.launcher.cli import VERBS

for name, verb in VERBS.items():
    child = os.fork()
    if child == 0:
        importlib.import_module(verb.module)
        os._exit("torch" in sys.modules or "numpy" in sys.modules)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_verbs_are_imported_without_torch() -> None:
    done = subprocess.run([sys.executable, "-u", "-c", IMPORTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{verb} 0" for verb in VERBS], done.stderr


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


def test_shipped_configurations_are_found_from_any_folder(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = train("dit-s-2-8e2a-256", "--dry-run", "launch.processes=8")
    assert done.returncode == 0 and "preset: DiT-S/2-8E2A" in done.stdout, done.stderr
    (tmp_path / "photos.yaml").write_text("nothing: 1\n")
    done = train("photos")
    assert done.returncode == 2 and done.stderr.startswith(
        "note: photos is photos.yaml of the current folder; the"
    )


def test_a_user_error_has_no_traceback(train: Train, tmp_path: Path) -> None:
    done = train(str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path}/none.yaml: cannot be read: No such file or directory; expected a YAML file\n"
    )


def test_missing_data_are_found_before_anything_starts(train: Train, write_config: Write, tmp_path: Path) -> None:
    path = write_config(data={"sources": [{"path": "nowhere"}]})
    done = train(str(path))
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: no such folder")
    assert not (tmp_path / "runs").exists()


def test_dry_run(train: Train, write_config: Write, tmp_path: Path) -> None:
    done = train(str(write_config()), "--dry-run", "optim.lr=2e-4")
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
def test_a_task_of_srun_stays_a_moment_after_its_message(
    variables: dict[str, str], stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun ends the step at the first task that fails, and loses what it was not sent by then."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\nfrom ditmoe.launcher.cli import main\n"
        "time.sleep = lambda seconds: print('then', seconds, 'seconds', file=sys.stderr)\nmain()"
    )
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = run_forked([str(program), "train", "absent.yaml"], tmp_path / "output", seconds=60)
    assert done.returncode == 2 and "absent.yaml" in done.stderr
    assert done.stderr.endswith("then 1.0 seconds\n") == stays
