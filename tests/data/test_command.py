"""`ditmoe data` as a user types it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from ditmoe.launcher.commands.data.group import app
from ditmoe.model.errors import UserError

runner = CliRunner()


def test_pack_then_verify_digits(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    packed = runner.invoke(app, ["pack", "digits", str(out), "--image-size", "16", "--channels", "3"])
    assert packed.exit_code == 0, packed.output
    assert "packed 1,797 images of 16×16×3 in 10 classes: 2 shards" in packed.output
    assert (out / "preview.png").is_file() and str(out / "preview.png") in packed.output
    verified = runner.invoke(app, ["verify", str(out)])
    assert verified.exit_code == 0
    assert "good: 1,797 images of 16×16×3 in 2 shards, 10 classes" in verified.output
    assert len(verified.output.splitlines()) == 11


def test_pack_shapes_and_an_npz(tmp_path: Path) -> None:
    shapes = ["pack", "shapes", str(tmp_path / "s"), "--classes", "12", "--count", "36", "--image-size", "24"]
    result = runner.invoke(app, [*shapes, "--format", "jpg", "--shard-samples", "20", "--name", "my shapes"])
    assert "packed 36 images of 24×24×3 in 12 classes: 2 shards" in result.output
    assert (tmp_path / "s" / "my-shapes-00001.tar").is_file()

    np.savez(tmp_path / "x.npz", np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))
    result = runner.invoke(app, ["pack", str(tmp_path / "x.npz"), str(tmp_path / "x"), "--format", "npy"])
    assert "packed 3 images of 8×8×3 in 3 classes" in result.output


def test_verify_lists_problems_and_exits_2(digits: Path, rewrite: Callable[..., str]) -> None:
    key = rewrite(digits, 0, 0, lambda members: {**members, "cls": b"99"})
    result = runner.invoke(app, ["verify", str(digits)])
    assert result.exit_code == 2
    assert f"digits-00000.tar, sample {key}: label 99 is outside" in result.output
    assert result.output.endswith(f"{digits}: 1 problem\n")


def test_wrong_input_is_one_message(digits: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["pack", "digits", str(digits)], "already holds a packed dataset"),
        (["pack", "digits", str(tmp_path / "o"), "--channels", "2"], "--channels is 2, expected 1"),
        (["pack", "digits", str(tmp_path / "o"), "--name", "a\nb"], r"--name is 'a\nb', expected"),
        (["pack", "digits", str(tmp_path / "o"), "--classes", "2"], "--classes is for the source `shapes`"),
        (["pack", str(tmp_path / "no"), str(tmp_path / "o")], "not there; a source is"),
        (["verify", str(tmp_path / "no")], "no such folder"),
    ):
        error = runner.invoke(app, arguments).exception
        assert isinstance(error, UserError) and message in str(error)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from ditmoe.launcher.commands.data import group as data; "
        "print([name for name in ('torch', 'numpy', 'PIL', 'webdataset', 'sklearn') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
