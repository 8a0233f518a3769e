"""The header of every file of configs/ says what the planner says: hardware, memory, hours, and the commands."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.launcher.planning.needs import Sample, needs
from ditmoe.launcher.planning.workload import own_layout, workload_of
from ditmoe.parallel.planner.estimate import Machine, plan
from ditmoe.parallel.planner.gpus import CPU_CORE, GPUS

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
GRIDS = sorted((ROOT / "configs" / "grids").glob("*.yaml"))
KEYS = ("hardware", "memory", "hours", "result", "data", "command")
"""Of a header, in this order, a line each; a sentence stands before them, and what else is to say after them."""
BAND = 0.05
"""Share by which the hours of a header may differ from the planner's: they are rounded."""
KINDS = {gpu.name: gpu for gpu in (*GPUS.values(), CPU_CORE)}
GIB = 2**30
SMALL = {"demo": (8, 1), "shapes": (32, 3), "photos": (64, 3), "photos-cpu": (32, 3)}
"""Side and channels of the images that the other runs take from their data."""


def header(text: str, keys: tuple[str, ...] = KEYS) -> dict[str, str]:
    """The lines of a header by key, `what` being the first."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    found = {"what": lines[0]}
    for key, line in zip(keys, lines[1:], strict=False):
        name, _, value = line.partition(": ")
        assert name == key and value, f"{line!r}: expected a line that begins with {key}:"
        found[key] = value
    return found


def problems(path: Path, text: str, config: RunConfig) -> list[str]:
    """What the planner does not say as a header does."""
    said = header(text)
    hardware = re.fullmatch(r"(\d+) × (.+) \((\d+) GiB each\)", said["hardware"])
    assert hardware is not None, said["hardware"]
    number, each = int(hardware[1]), float(hardware[3])
    machine = Machine(replace(KINDS[hardware[2]], memory_gib=each))
    layout = own_layout(config, number)
    if isinstance(layout, list):
        return layout
    found = plan(config.model, layout, workload_of(config), machine)
    needed = needs(config, found, machine, Sample(1, "here"))
    taken = needed.host_of_machine if machine.gpu.is_cpu else found.memory.peak
    have = each * number if machine.gpu.is_cpu else 0.92 * each
    listed = []
    if taken > have * GIB:
        listed.append(f"{taken / GIB:.1f} GiB do not fit into {have:.1f}")
    if not said["memory"].startswith(f"{taken / GIB:.1f} GiB of "):
        listed.append(f"memory: {taken / GIB:.1f} GiB")
    hours = float(re.match(r"[\d.]+", said["hours"])[0])  # type: ignore[index]
    if abs(hours / needed.hours - 1) > BAND:
        listed.append(f"hours: {needed.hours:.3g}")
    if "the planner's estimate" not in said["hours"]:
        listed.append("hours: an estimate is to be called one")
    return listed


def configuration(path: Path, *overrides: str) -> RunConfig:
    given = []
    if path.stem in SMALL:
        side, channels = SMALL[path.stem]
        given = [f"model.image_size={side}", f"model.channels={channels}", "model.num_classes=10"]
    return load_config(path, [*given, *overrides])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_header_is_what_the_planner_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    config = configuration(path)
    assert problems(path, text, config) == []
    said = header(text)
    assert re.fullmatch(r"[^.]*(\.\d[^.]*)*\.", said["what"]), "one sentence"
    assert len(said["result"]) > 20
    number = int(said["hardware"].split()[0])
    words = shlex.split(said["command"])
    assert words[0] == "ditmoe" and f"configs/{path.name}" in words
    if "submit" in words:
        nodes, gpus = (int(words[words.index(option) + 1]) for option in ("--nodes", "--gpus-per-node"))
        assert nodes * gpus == number
    else:
        assert words[1:] == ["train", f"configs/{path.name}"]
    assert config.data.sources[0].path in shlex.split(said["data"])
    if size := re.search(r"--image-size (\d+)", said["data"]):
        assert int(size[1]) == config.model.image_size and f"{size[1]}×{size[1]}" in said["what"]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_header_of_an_evaluation_s_grid(path: Path) -> None:
    """The planner does not count evaluations: so there is no memory, and hours say how they are known."""
    said = header(path.read_text(encoding="utf-8"), tuple(key for key in KEYS if key != "memory"))
    assert re.fullmatch(r"\d+ × CPU core \(2 GiB each\)", said["hardware"]) and said["what"].endswith(".")
    assert re.match(r"[\d.]+, (measured|reckoned)", said["hours"]) and len(said["result"]) > 20
    words, classifier = shlex.split(said["command"]), shlex.split(said["data"])
    assert words[:2] == ["ditmoe", "evaluate"] and words[4] == f"configs/grids/{path.name}"
    assert classifier[:3] == ["ditmoe", "noise-classifier", "train"] and classifier[3] == words[2]
    run = load_config(ROOT / "configs" / f"{Path(words[2]).name}.yaml", [])
    assert run.run.dir == Path(words[2])


def test_a_header_that_is_wrong_is_noticed() -> None:
    path = ROOT / "configs" / "photos.yaml"
    text = path.read_text(encoding="utf-8")
    for change, words in (
        (("24 GiB each", "12 GiB each"), "do not fit"),
        (("memory: 11.8", "memory: 35.0"), "memory: 11.8"),
        (("hours: 9.1", "hours: 1.9"), "hours: 9.1"),
        (("1 × RTX", "3 × RTX"), "train.batch = 256"),
    ):
        assert change[0] in text
        found = problems(path, text.replace(*change), configuration(path))
        assert len(found) == 1 and words in found[0], (change, found)
    heavy = problems(path, text, configuration(path, "train.micro_batch=256"))
    assert "do not fit" in heavy[0]


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_photographs_take_a_gpu_of_16_gib_or_several(gpus: int) -> None:
    path = ROOT / "configs" / "photos.yaml"
    assert "on 1, 2 or 4 GPUs of 16 GiB or more" in " ".join(path.read_text(encoding="utf-8").split())
    config = configuration(path)
    layout = own_layout(config, gpus)
    assert not isinstance(layout, list)
    machine = Machine(replace(GPUS["rtx4090"], memory_gib=16))
    assert machine.fits(plan(config.model, layout, workload_of(config), machine).memory)
