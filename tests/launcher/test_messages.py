"""What a message shows of names that others chose."""

from pathlib import Path

from PIL import Image

from tests.forked import DITMOE, run_forked


def test_a_file_name_controls_no_terminal_and_forges_no_message(tmp_path: Path) -> None:
    """As `error:` in a name after a line break would, or a character that clears the screen."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "a" / "good.png")
    name = "x\nerror: all is lost\x1b[2J\r.png"
    (tmp_path / "photos" / "a" / name).write_bytes(b"no image")
    pack = [*DITMOE, "data", "pack", str(tmp_path / "photos")]
    stopped = run_forked([*pack, str(tmp_path / "out")], tmp_path / "output")
    listed = run_forked([*pack, str(tmp_path / "out"), "--skip-unreadable"], tmp_path / "output")
    index = run_forked([*DITMOE, "data", "pack", str(tmp_path / "no\nerror: forged"), "out"], tmp_path / "output")
    assert (stopped.returncode, listed.returncode, index.returncode) == (2, 0, 2)
    for result in (stopped, listed, index):
        assert "\x1b" not in result.stderr and "\r" not in result.stderr
        lines = result.stderr.splitlines()
        assert sum(line.startswith("error:") for line in lines) == (result.returncode == 2), lines
    assert r"x\nerror: all is lost\x1b[2J\r.png: not a readable" in stopped.stderr
    assert r"x\nerror: all is lost\x1b[2J\r.png: not a readable" in listed.stderr
