"""Shipped configurations by name: from any folder, and what a file of that name means for them."""

import subprocess
import sys
from pathlib import Path

import pytest

from ditmoe.launcher.configuration.grid_file import load_comparison
from ditmoe.launcher.configuration.run_config import load_config
from ditmoe.launcher.configuration.shipped import FOLDER, description, find_config, shipped
from ditmoe.model.errors import UserError
from tests.test_imports import FLOORS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def silent(line: str) -> None:
    raise AssertionError(line)


def test_every_one_is_found_by_its_name_and_can_be_read() -> None:
    assert FOLDER == ROOT / "configs"
    for name, path in shipped().items():
        assert find_config(Path(name), say=silent) == path
        load_config(path, [])
    for name, path in shipped("grid").items():
        assert find_config(Path(name), "grid", silent) == path
        load_comparison(path)
    assert {"photos", "demo"} <= set(shipped()) and "dmcmc" in shipped("grid")


def test_every_one_is_described_by_its_first_line() -> None:
    for path in (*shipped().values(), *shipped("grid").values()):
        assert path.read_text(encoding="utf-8").startswith(f"# {description(path)}\n") and description(path)


def test_a_file_of_that_name_wins_and_is_told() -> None:
    told: list[str] = []
    for name in ("photos.yaml", "demo"):
        Path(name).write_text("")
    assert find_config(Path("photos"), say=told.append) == Path("photos.yaml")
    assert find_config(Path("photos.yaml"), say=told.append) == Path("photos.yaml")
    assert find_config(Path("demo"), say=told.append) == Path("demo")
    assert told == [
        f"note: {given} is {local} of the current folder; the shipped configuration of that name is {path}"
        for given, local, path in (
            ("photos", "photos.yaml", FOLDER / "photos.yaml"),
            ("photos.yaml", "photos.yaml", FOLDER / "photos.yaml"),
            ("demo", "demo", FOLDER / "demo.yaml"),
        )
    ]


def test_there_is_nothing_to_tell_of_the_shipped_file_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    assert find_config(Path("photos"), say=silent) == Path("photos.yaml")
    monkeypatch.chdir(ROOT)
    assert find_config(Path("configs/photos.yaml"), say=silent) == Path("configs/photos.yaml")


def test_a_folder_of_that_name_is_no_configuration() -> None:
    """As the folder of photographs, beside which one begins."""
    Path("photos").mkdir()
    assert find_config(Path("photos"), say=silent) == shipped()["photos"]
    Path("mine.yaml").write_text("")
    assert find_config(Path("mine"), say=silent) == Path("mine.yaml")


def test_paths_are_taken_as_they_are() -> None:
    for given in (Path("a/photos"), Path("/nowhere/photos.yaml"), Path("other.yml")):
        assert find_config(given, say=silent) == given
    with pytest.raises(UserError, match="did you mean photos"):
        find_config(Path("photos.yml"))


def test_an_installed_package_has_configurations_and_pages(tmp_path: Path) -> None:
    """As `pip install` lays it out, with nothing of the checkout within reach."""
    built = tmp_path / "installed"
    code = f"import sys; sys.argv = ['setup.py', '-q', 'build_py', '--build-lib', {str(built)!r}]; import setup"
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "package", "configs", "docs", *FLOORS):
        (copy / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = (
        f"import sys; sys.path.insert(0, {str(built)!r})\n"
        "import ditmoe; assert ditmoe.__file__.startswith(sys.path[0])\n"
        "from pathlib import Path\n"
        "from ditmoe.launcher.commands.lookup.docs import pages\n"
        "from ditmoe.launcher.configuration.run_config import load_config\n"
        "from ditmoe.launcher.configuration.shipped import find_config, shipped\n"
        "assert load_config(find_config(Path('photos')), []).run.dir == Path('runs/photos')\n"
        "print(*shipped(), *shipped('grid'), *pages())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert set(done.stdout.split()) == {*shipped(), *shipped("grid"), *pages}
