"""Bad inputs, random and hand-made, drawn from a seed: what `test_bad_inputs.py` runs the command on.

A family is a function of (random generator, count, workshop) that yields cases; a new one is added to `FAMILIES`.
A case prepares its folder when it is run, and says how the command is called.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

Prepare = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One call of the command that must end in one message and exit code 2."""

    name: str
    arguments: tuple[str, ...]
    prepare: Prepare = lambda folder: None
    """Makes what the arguments name, in the folder that the command runs in."""
    variables: Mapping[str, str] = field(default_factory=dict)
    file_bytes: int | None = None
    """The largest file that the system lets the command write, as a full disk does; None: any."""


@dataclass(frozen=True)
class Workshop:
    """What cases are made of: whole things, which they copy and spoil."""

    shards: Path
    run: Path


Family = Callable[[random.Random, int, Workshop], Iterator[Case]]

VALID: Final[dict[str, Any]] = {
    "run": {"dir": "run"},
    "launch": {"processes": 1, "device": "cpu"},
    "model": {"depth": 1, "hidden": 16, "heads": 2, "patch": 4, "experts": 2, "experts_per_token": 1},
    "data": {"sources": [{"path": "shards"}], "workers": 0},
    "parallel": {"expert": 1},
    "train": {"steps": 1, "batch": 4, "precision": "fp32"},
}
"""A configuration that nothing is wrong with."""

ODD: Final = (
    *(None, True, -1, 0.5, 2**70, "9" * 5000, float("inf"), float("nan"), "", " ", "x", "\x00", "é" * 300),
    *([], [1], {}, {"a": 1}, {3: 4}, {None: None}, [[[]]], "a/" * 3000, "../..", "~", "true", "1e400", "0x"),
    *("2024-01-01", "=", "<<"),
)
"""Values that a key may be given instead of its own."""

BROKEN_TEXT: Final = (
    "[" * 5000,
    "{a: " * 2000,
    "a: &a [*a]",
    "deepspeed: &a {x: *a}",
    "? [1]\n: 2",
    "a: !!python/name:os.system",
    "seed: !!bool x",
    "a: \x07",
    'a: "\\ud800"',
    'a: "\\UFFFFFFFF"',
    "\tseed: 1",
    "a: [1",
    "- 1",
    "x",
    "a: 1\na: 2",
    "---\na: 1\n---\nb: 2",
    "%YAML 9.9\n---\na: 1",
    "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]\n" for n in range(9)),
    "x" * 2**21,
)


def configurations(draw: random.Random, count: int, workshop: Workshop) -> Iterator[Case]:
    """Text that is no configuration, keys that are none, and values that are another's."""
    paths = list(_paths(VALID))
    for number in range(count):
        if number < len(BROKEN_TEXT):
            text = BROKEN_TEXT[number]
        else:
            values = json.loads(json.dumps(VALID))
            for _ in range(draw.randint(1, 3)):
                _set(values, draw.choice(paths), draw.choice(ODD))
            values[draw.choice(("optim", "ema", "preview", "deepspeed", "oops"))] = {draw.choice(("lr", "q")): "x"}
            text = yaml.safe_dump(values, allow_unicode=draw.random() < 0.5)
            if draw.random() < 0.2:
                at = draw.randrange(len(text))
                text = text[:at] + draw.choice("{}[]&*!|>'\"%@`:\x00\x1b\ud800") + text[at:] + "\n'"
        yield Case(f"text {number}", ("train", "bad.yaml", *_dry(draw)), _writes("bad.yaml", text, workshop))


def overrides(draw: random.Random, count: int, workshop: Workshop) -> Iterator[Case]:
    """KEY=VALUE on the command line."""
    keys = [".".join(map(str, path)) for path in _paths(VALID)]
    keys += ["optim.lr", "optim.betas", "ema.decay", "preview.sampler.steps", "preview.sampler.dlg.skip", "seed"]
    odd_keys = [
        "",
        ".",
        "a..b",
        "data.sources.9.path",
        "data.sources.²",
        "data.sources." + "9" * 5000,
        "deepspeed.x",
    ]
    odd_keys += ["deepspeed" + ".a" * 3000, "x" * 100_000, "run", "=", "--", "\udcff", "train.batch.x"]
    for number in range(count):
        key = draw.choice(keys if draw.random() < 0.7 else odd_keys)
        value = draw.choice(["[", "{", "&a [*a]", ".inf", "-1e9999", "[" * 3000, "!!int x", '"\\0"', "x: y", "*a"])
        yield Case(
            f"override {number}",
            ("train", *_dry(draw), "--", "ok.yaml", f"{key}={value}"),
            _writes("ok.yaml", None, workshop),
        )


def environments(draw: random.Random, count: int, workshop: Workshop) -> Iterator[Case]:
    """Variables of a launcher that contradict one another, before every verb that reads them."""
    verbs = [("train", "ok.yaml"), ("train", "ok.yaml", "--dry-run")]
    verbs += [("evaluate", "run", "--count", "4"), ("data", "synthesize", "out", "--from", "run", "--count", "4")]
    right = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    wrong = {
        "RANK": ["abc", "5", "-1", "", "1.0", "9" * 400, "٣"],
        "WORLD_SIZE": ["abc", "0", "-2", "", "1e3"],
        "LOCAL_RANK": ["abc", "-1", " 1", ""],
        "MASTER_PORT": ["abc", "99999", "0", "", "-5"],
    }
    for number in range(count):
        variables = dict(right)
        if number % 4 == 0:
            del variables["RANK"]  # left over in a shell
        else:
            name = draw.choice(list(wrong))
            variables[name] = draw.choice(wrong[name])
        yield Case(f"environment {number}", draw.choice(verbs), _writes("ok.yaml", None, workshop), variables)


def full_disks(draw: random.Random, count: int, workshop: Workshop) -> Iterator[Case]:
    """A system that lets no file grow, at every command that writes one."""
    commands = (
        ("data", "pack", "digits", "out", "--count", "50"),
        ("checkpoint", "export", "run", "weights.safetensors"),
        ("data", "index", "tars"),
        ("sample", "run", "--count", "2", "--steps", "1", "--device", "cpu", "--out", "picture.png"),
    )

    def prepare(folder: Path) -> None:
        _copy(folder, workshop)
        (folder / "tars").mkdir()
        for shard in workshop.shards.glob("*.tar"):
            shutil.copy(shard, folder / "tars")

    for number in range(count):
        command = commands[number % len(commands)]
        yield Case(
            f"disk {number} {' '.join(command[:2])}", command, prepare, file_bytes=draw.choice((0, 1, 40, 100))
        )


def damaged_shards(draw: random.Random, count: int, workshop: Workshop) -> Iterator[Case]:
    """An index.json, or a shard, that is not what was written."""

    def spoil(number: int) -> Prepare:
        own = random.Random(number * 7919 + 1)

        def prepare(folder: Path) -> None:
            _copy(folder, workshop)
            (folder / "ok.yaml").write_text(yaml.safe_dump(VALID))
            index = folder / "shards" / "index.json"
            if number % 3 == 0:
                shard = own.choice(sorted((folder / "shards").glob("*.tar")))
                own.choice(
                    (
                        shard.unlink,
                        lambda: shard.write_bytes(shard.read_bytes()[:-1000]),
                        lambda: shard.write_bytes(b""),
                    )
                )()
            else:
                values = json.loads(index.read_text())
                path = own.choice(
                    [p for p in _paths(values) if p[0] in ("format", "version", "image_size", "shards")]
                )
                _set(values, path, own.choice(("x", -1, [], {"a": 1}, 10**30)))
                index.write_text(json.dumps(values))

        return prepare

    for number in range(count):
        verb = (
            ("data", "verify", "shards")
            if number % 3 == 0
            else draw.choice(
                (("train", "ok.yaml"), ("data", "verify", "shards"), ("train", "ok.yaml", "--dry-run"))
            )
        )
        yield Case(f"shards {number}", verb, spoil(number))


def damaged_runs(draw: random.Random, count: int, workshop: Workshop) -> Iterator[Case]:
    """A run's folder in which a file is missing, cut short, changed, or a folder."""
    verbs = [("checkpoint", "inspect", "run"), ("checkpoint", "export", "run", "out.safetensors")]

    def spoil(number: int) -> Prepare:
        own = random.Random(number * 104_729 + 5)

        def prepare(folder: Path) -> None:
            _copy(folder, workshop)
            files = sorted(path for path in (folder / "run" / "checkpoints").rglob("*") if path.is_file())
            file = own.choice(files)
            content = file.read_bytes()
            file.unlink()
            kind = own.randrange(4)
            if kind == 1:
                file.mkdir()
            elif kind == 2:
                file.write_bytes(content[: own.randrange(len(content))])
            elif kind == 3:
                file.write_bytes(bytes(own.randrange(256) for _ in range(len(content))))

        return prepare

    for number in range(count):
        yield Case(f"run {number}", draw.choice(verbs), spoil(number))


FAMILIES: Final[dict[str, tuple[Family, int]]] = {
    "configurations": (configurations, 90),
    "overrides": (overrides, 70),
    "environments": (environments, 50),
    "full disks": (full_disks, 16),
    "damaged shards": (damaged_shards, 44),
    "damaged runs": (damaged_runs, 40),
}
"""Each family, and how many of its cases are run: more than 300 together."""


def cases(name: str, seed: int, workshop: Workshop) -> list[Case]:
    """A family's cases."""
    family, count = FAMILIES[name]
    return list(family(random.Random(f"{seed}/{name}"), count, workshop))


def _dry(draw: random.Random) -> tuple[str, ...]:
    return ("--dry-run",) if draw.random() < 0.5 else ()


def _writes(name: str, text: str | None, workshop: Workshop) -> Prepare:
    """Writes a configuration (None: the valid one) beside the shards and the run."""

    def prepare(folder: Path) -> None:
        _copy(folder, workshop)
        content = yaml.safe_dump(VALID) if text is None else text
        (folder / name).write_text(content, encoding="utf-8", errors="surrogatepass")

    return prepare


def _copy(folder: Path, workshop: Workshop) -> None:
    shutil.copytree(workshop.shards, folder / "shards")
    shutil.copytree(workshop.run, folder / "run")


def _paths(values: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of each value of plain data."""
    if path:
        yield path
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        yield from _paths(value, (*path, key))


def _set(values: Any, path: tuple[str | int, ...], value: Any) -> None:
    for key in path[:-1]:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return  # another change took the place away
    if isinstance(values, dict) or (
        isinstance(values, list) and isinstance(path[-1], int) and path[-1] < len(values)
    ):
        values[path[-1]] = value
