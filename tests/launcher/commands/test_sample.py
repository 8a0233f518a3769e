"""`ditmoe sample`: which images it draws, the files that it writes, and what it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe.data.storage import progress
from ditmoe.launcher.commands.pictures.choice import choose_seeds, ranges
from ditmoe.launcher.commands.pictures.naming import image_name
from ditmoe.launcher.commands.pictures.progress import DrawingProgress
from ditmoe.launcher.commands.sample import command
from ditmoe.model.errors import UserError
from ditmoe.sampling.drawing.files import LAST_FRAME_SECONDS, find_target
from tests.sampling.small_run import write_noise_classifier, write_run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("sample") / "digits")
    write_noise_classifier(run)
    return run


def sample(run: Path, out: Path | str | None, **more: Any) -> None:
    command(
        run, **{"classes": "3,1", "steps": 3, "device": "cpu", "out": None if out is None else str(out), **more}
    )


def test_seeds_are_ranges_and_single_ones() -> None:
    assert choose_seeds("0-3") == [0, 1, 2, 3] and choose_seeds(" 1,5 , 9-12,5") == [1, 5, 9, 10, 11, 12]
    assert ranges([1, 5, 9, 10, 11, 12]) == "1,5,9-12" and ranges([4, 4, 4]) == "4"
    for text, told in (("3-1", "expected 1-3"), ("a", "'a' found"), ("-1", "'-1' found"), ("", "'' found")):
        with pytest.raises(UserError, match=told):
            choose_seeds(text)
    with pytest.raises(UserError, match="100,000 seeds at most"):
        choose_seeds("0-99999,100000")


def test_a_folder_gets_a_file_of_each_class_and_seed_with_what_it_is(run: Path, tmp_path: Path) -> None:
    sample(run, f"{tmp_path}/imgs/", seeds="4-5", batch=4)
    names = [f"class-{label}_seed-{seed}.png" for label in (1, 3) for seed in (4, 5)]
    assert sorted(path.name for path in (tmp_path / "imgs").iterdir()) == names
    sample(run, tmp_path / "one.png", classes="3", seeds="5", batch=4)
    sample(run, tmp_path / "alone", classes="3", seed=5, count=1, batch=4)  # no dot: a folder
    with Image.open(tmp_path / "imgs" / "class-3_seed-5.png") as picture:
        assert picture.size == (8, 8)
        text = picture.text  # type: ignore[attr-defined]
        pixels = np.asarray(picture)
    expected = {"run": "digits", "step": "0", "class": "3", "label": "3", "seed": "5", "image": "0", "steps": "3"}
    expected |= {"sampler": "euler", "guidance": "1.0", "weights": "ema", "nfe": "3.0", "Software": "ditmoe"}
    assert text.items() >= expected.items() and json.loads(text["settings"])["steps"] == 3
    with Image.open(tmp_path / "one.png") as grid:
        assert np.array_equal(np.asarray(grid)[2 : 2 + 64 : 8, 2 : 2 + 64 : 8, 0], pixels)
    with Image.open(tmp_path / "alone" / "class-3_seed-5.png") as picture:
        assert np.abs(np.asarray(picture).astype(int) - pixels).max() <= 1  # of a batch of one


def test_names_of_classes_become_no_paths() -> None:
    assert image_name(3, "../../etc/Passwd\n", 7, 0, "png") == "class-3-etc-passwd_seed-7.png"
    assert image_name(3, "ß", 7, 12, "webp") == "class-3_seed-7_image-12.webp"
    assert len(image_name(3, "a" * 1000, 7, 0, "png")) < 70


def test_pictures_by_extension_hold_the_same_images(run: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.webp", "a.jpg", "a.npz", "a.npy", "b.png"):
        labels = True if name == "b.png" else None
        sample(run, tmp_path / name, seeds="0-1", labels=labels)
    png, webp, jpg = (
        np.asarray(Image.open(tmp_path / f"a.{form}")).astype(int) for form in ("png", "webp", "jpg")
    )
    assert np.array_equal(png, webp) and png.shape == jpg.shape and np.abs(png - jpg).mean() < 5
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == [3, 1, 3, 1] and arrays["seeds"].tolist() == [0, 0, 1, 1]
        assert json.loads(str(arrays["facts"]))["seed"] == "0-1"
        images = arrays["arr_0"]
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), images) and images.shape == (4, 8, 8, 1)
    for form in ("webp", "jpg"):
        assert json.loads(Image.open(tmp_path / f"a.{form}").getexif()[0x010E])["label"] == "3,1"
    assert np.asarray(Image.open(tmp_path / "b.png")).shape == (2 + 2 * (96 + 34), 2 + 2 * 98, 3)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.apng", "a.mp4"])
def test_animations_last_as_long_as_asked_and_end_with_the_image(run: Path, tmp_path: Path, name: str) -> None:
    if name == "a.mp4":
        pytest.importorskip("av")
    sample(run, tmp_path / "still.png", seeds="0", steps=4, labels=False)
    sample(run, tmp_path / name, seeds="0", steps=4, labels=False, animate=True, seconds=2, fps=10)
    still = np.asarray(Image.open(tmp_path / "still.png").convert("RGB")).astype(int)
    if name == "a.mp4":
        import av

        with av.open(str(tmp_path / name)) as container:
            assert json.loads(container.metadata["comment"])["seed"] == "0"
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == (2 + LAST_FRAME_SECONDS) * 10
        height, width = still.shape[:2]
        last = frames[-1][:height, :width].astype(int)
    else:
        with Image.open(tmp_path / name) as picture:
            seconds = []
            for frame in range(picture.n_frames):  # type: ignore[attr-defined]
                picture.seek(frame)
                picture.load()
                seconds.append(picture.info["duration"] / 1000)
            assert 2 <= len(seconds) <= 4 and abs(sum(seconds) - 2 - LAST_FRAME_SECONDS) < 0.05
            last = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(last - still).mean() < 6


def test_each_seed_is_a_chain_of_its_own(run: Path, tmp_path: Path) -> None:
    dlg = ("skip=2", "initial_steps=2", "burn_in_first=1", "burn_in=1")
    chains = {"sampler": "dlg:euler", "steps": 2}
    sample(run, tmp_path / "first.npz", seeds="4-5", **chains, dlg=dlg)
    sample(run, tmp_path / "three.npz", seeds="4-5", **chains, dlg=(*dlg, "samples_per_chain=3"))
    sample(run, tmp_path / "imgs", seeds="4-5", **chains, dlg=(*dlg, "samples_per_chain=3"))
    with np.load(tmp_path / "first.npz") as first, np.load(tmp_path / "three.npz") as three:
        assert first["seeds"].tolist() == [4, 4, 5, 5] and first["arr_1"].tolist() == [3, 1, 3, 1]
        assert three["seeds"].tolist() == [4] * 6 + [5] * 6 and three["arr_1"].tolist() == [3, 1] * 6
        first_images, three_images = first["arr_0"].astype(int), three["arr_0"].astype(int)
    assert np.abs(first_images - three_images[[0, 1, 6, 7]]).max() <= 1
    assert len(np.unique(three_images.reshape(12, -1), axis=0)) == 12
    sample(run, tmp_path / "alone.npz", classes="1", seed=5, count=3, **chains, dlg=(*dlg, "samples_per_chain=3"))
    with np.load(tmp_path / "alone.npz") as alone:
        assert np.abs(alone["arr_0"].astype(int) - three_images[[7, 9, 11]]).max() <= 1
    names = {path.name for path in (tmp_path / "imgs").iterdir()}
    assert len(names) == 12 and {"class-3_seed-4.png", "class-1_seed-5_image-2.png"} < names
    sample(run, tmp_path / "grid.png", seeds="4-5", **chains, dlg=(*dlg, "samples_per_chain=3"), overwrite=True)
    sample(run, tmp_path / "moves.gif", seeds="4", **chains, dlg=dlg, animate=True, seconds=1, fps=5)
    with Image.open(tmp_path / "moves.gif") as picture:
        assert 2 <= picture.n_frames <= 5  # type: ignore[attr-defined]


def test_nothing_is_written_over_unasked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(run, tmp_path / "imgs" / "", seeds="0")
    before = {path: path.read_bytes() for path in (tmp_path / "imgs").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("ditmoe.sampling.drawing.generate.draw", None)  # told before anything is drawn
        with pytest.raises(UserError, match=r"class-3_seed-0.png, and 1 more of the 4: there already"):
            sample(run, tmp_path / "imgs", seeds="0-1", weights="weights")
    assert before == {path: path.read_bytes() for path in (tmp_path / "imgs").iterdir()}
    capsys.readouterr()
    sample(run, tmp_path / "imgs", seeds="0-1", weights="weights", overwrite=True)
    assert "imgs (2 replaced)" in capsys.readouterr().out
    assert {Image.open(path).text["weights"] for path in (tmp_path / "imgs").iterdir()} == {"weights"}  # type: ignore[attr-defined]
    sample(run, None, seeds="0-1")
    assert "replaced" not in capsys.readouterr().out
    sample(run, None, seeds="0-1")
    out = capsys.readouterr().out
    assert "step-00000000_euler_3steps_cfg1_seeds-0-1_classes-3-1.png (1 replaced)" in out


def test_what_does_not_fit_is_told_with_the_nearest(run: Path, tmp_path: Path) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("x.pgn", {}, "; did you mean png?"),
        ("x.exr", {}, "expected one of png, jpg, jpeg, webp, gif, apng, mp4, npz, npy, or a folder"),
        ("x.jpg", {"animate": True}, "jpg does not move; expected one of webp, gif, apng, png, mp4"),
        ("x.png", {"format": "jpg"}, "goes with --out FOLDER/"),
        ("x/", {"format": "jepg"}, "--format jepg: 'jepg' is no known kind of file; expected one of png, jpg"),
        ("x.png", {"seeds": "1", "count": 3}, "--seeds 1 with --count 3"),
        ("x.png", {"seeds": "1", "seed": 3}, "--seeds 1 with --seed 3"),
        ("x.png", {"classes": "thre"}, "'thre' found"),
    ]
    for name, more, told in refused:
        with pytest.raises(UserError) as raised:
            sample(run, f"{tmp_path}/{name}", **more)
        assert told in str(raised.value) and len(str(raised.value).splitlines()) == 1
    with pytest.raises(UserError, match="an address"):
        find_target("s3://bucket/x.png")
    assert not any(tmp_path.iterdir())


def test_progress_moves_within_a_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 10.0)
    now = [0.0]
    shown = DrawingProgress(10, 4, passes=2, clock=lambda: now[0])
    for images, drawn in ((4, 4), (4, 8), (2, 10)):
        for _ in range(2):
            now[0] += 6
            shown.evaluated(images)
        shown.drawn(drawn)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "0 of 10 images drawn (40% of the work)",
        "4 of 10 images drawn (80% of the work)",
        "8 of 10 images drawn (100% of the work)",
    ]
