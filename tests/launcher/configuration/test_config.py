"""Reading a configuration: every problem at once, in words that name key, value and what was expected."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.launcher.configuration.resolve import config_yaml, shown_yaml
from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.launcher.configuration.yaml_reader import parse_yaml
from ditmoe.model.errors import UserError

Write = Callable[..., Path]


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without its heading."""
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"{path}: {len(lines)} problem{'' if len(lines) == 1 else 's'}"
    return [line.strip() for line in lines]


def test_valid(write_config: Write) -> None:
    config = load_config(write_config(), [])
    assert config.run.dir == Path("runs/tiny")
    assert config.train.batch == 16 and config.optim.lr == 1e-4 and config.seed == 0


def test_five_wrong_keys_give_five_messages(write_config: Write) -> None:
    path = write_config(
        train={"steps": "many", "micro_batch": 0, "precission": "fp32"},
        optim={"lr": -1e-4},
        objectiv={"kind": "ddpm"},
    )
    assert problems(path) == [
        "objectiv = {'kind': 'ddpm'}: no such key; did you mean objective?",
        "train.steps = 'many': expected an integer >= 1",
        "train.micro_batch = 0: expected an integer >= 1, or null",
        "train.precission = 'fp32': no such key; did you mean train.precision?",
        "optim.lr = -0.0001: expected a number > 0",
    ]


def test_no_message_hides_another(write_config: Write) -> None:
    """A section's own check, the checks across sections and plain values are all reported together."""
    path = write_config(
        model={"preset": "DiT-S/2-8E2A", "heads": 7},
        parallel={"expert": 3, "zero": 0},
        train={"batch": 16, "micro_batch": 4, "precision": "bf16"},
        optim={"eps": "small"},
    )
    assert problems(path) == [
        "model: hidden = 384 must be a multiple of heads = 7",
        "optim.eps = 'small': expected a number > 0",
        "parallel.expert = 3 must divide the data ranks, parallel.data = 2",
        "train.precision = bf16 with parallel.zero = 0 does not compute correctly;"
        " expected parallel.zero = 1 or more, or train.precision = fp32",
    ]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"train": {"batch": True}}, "train.batch = true: expected an integer >= 1"),
        ({"parallel": {"zero": 7}}, "parallel.zero = 7: expected one of 0, 1, 2, 3"),
        ({"train": {"precision": "fp16"}}, "train.precision = 'fp16': expected fp32 or bf16"),
        ({"optim": {"betas": [0.9]}}, "optim.betas.1 is missing; expected a number"),
        ({"optim": {"betas": [0.9, "x"]}}, "optim.betas.1 = 'x': expected a number"),
        ({"optim": {"betas": 0.9}}, "optim.betas = 0.9: expected a list of 2 values, each a number"),
        ({"optim": {"betas": [0.9, 1.5]}}, "optim.betas.1 = 1.5: expected a number >= 0 and < 1"),
        ({"data": {"sources": "x"}}, "data.sources = 'x': expected a list of {path: …}"),
        ({"data": {"sources": []}}, "data.sources = []: expected a list of {path: …}"),
        ({"data": {"sources": [{}]}}, "data.sources.0.path is missing; expected a string"),
        ({"data": None}, "data.sources is missing; expected a list of {path: …}"),
        ({"model": {"depth": 2, "hidden": 30, "heads": 2, "patch": 2}}, None),
        ({"model": 3}, "model = 3: expected a section of keys"),
        ({"ema": {"warmup": "maybe"}}, "ema.warmup = 'maybe': expected true or false"),
        ({"seed": -1}, "seed = -1: expected an integer >= 0"),
        ({"seed": True}, "seed = true: expected an integer >= 0"),
        ({"deepspeed": 3}, "deepspeed = 3: expected a section of free keys"),
        ({"launch": {"device": "gpu"}}, "launch.device = 'gpu': expected one of auto, cpu, cuda"),
        (
            {"preview": {"sampler": {"seeds": 3}}},
            "preview.sampler.seeds = 3: no such key; did you mean preview.sampler.seed?",
        ),
        ({"lr": 1}, "lr = 1: no such key; did you mean optim.lr?"),
    ],
)
def test_values(write_config: Write, section: dict[str, object], line: str | None) -> None:
    line = line or "model.hidden = 30: expected an integer >= 4 and that is a multiple of 4"
    assert problems(write_config(**section)) == [line]


def test_unknown_preset_names_the_form(write_config: Write) -> None:
    (line,) = problems(write_config(model={"preset": "DiT-Q/2"}))
    assert line.startswith("model.preset: 'DiT-Q/2' is not a preset; expected DiT-SIZE/PATCH")


def test_overrides(write_config: Write) -> None:
    overrides = ["optim.lr=2e-4", "optim.betas=[0.9, 0.95]", "parallel.expert=4", "launch.processes=4"]
    overrides += ["train.micro_batch=null", "run.dir=elsewhere", "data.sources.0.path=x=y"]
    overrides += ["deepspeed.zero_optimization.overlap_comm=false"]
    config = load_config(write_config(), overrides)
    assert (config.optim.lr, config.optim.betas) == (2e-4, (0.9, 0.95))
    assert config.parallel.expert == config.launch.processes == 4
    assert config.train.micro_batch is None
    assert config.run.dir == Path("elsewhere")
    assert config.data.sources[0].path == "x=y"
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": False}}


def test_wrong_overrides(write_config: Write) -> None:
    path = write_config()
    assert problems(path, "lr=1", "optim.betass=[1]", "train", "train.steps=x", "a.b=1", "seed=[", "seed.x=1") == [
        "lr=1: no such key; did you mean optim.lr?",
        "optim.betass=[1]: no such key; did you mean optim.betas?",
        "'train' is not an override; expected KEY=VALUE, such as optim.lr=2e-4",
        "a.b=1: no such key; expected one of run, launch, model, objective, data, parallel, train, optim, ema,"
        " checkpoint, preview, deepspeed, seed",
        "seed=[: the value is not YAML; expected a scalar or [a, list]",
        "seed.x=1: no such key; seed has no keys below it",
        "train.steps = 'x': expected an integer >= 1",
    ]
    assert problems(path, "data.sources.1.path=x", "optim.betas.1=0.5") == [
        "data.sources.1.path=x: data.sources in the file has the length 1; expected a position below",
        "optim.betas.1=0.5: the file has no optim.betas; expected its whole list",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "data.sources=[{path: 'https://u:secret@h/x?secret', wieght: 1}]",
        "data.sources.7.path=https://u:secret@h/x",
        "data.source=pipe:curl -u secret {}",
        "data.sources=pipe:curl -u secret {}",
        "data.sources=[{path: 'pipe:curl -u secret {}', weight: 0}]",
        "data.sources.0.path.x=https://u:secret@h/x",
        "data.flip=https://u:secret@h/x",
        "data.sources=[{path: 'pipe:curl -u secret {}', weight: 0}",
    ],
)
def test_messages_have_no_secrets_of_sources(write_config: Write, override: str) -> None:
    path = write_config(data={"sources": [{"path": "https://user:secret@host/shards?token=secret"}]})
    told = problems(path, override)
    assert told and "secret" not in "".join(told)


def test_what_is_shown_of_a_configuration_has_no_secrets(write_config: Write) -> None:
    config = load_config(write_config(), ["data.sources=[{path: 'pipe:curl -u secret {}'}]"])
    assert "secret" in config_yaml(config) and "secret" not in shown_yaml(config)
    assert "path: pipe:curl …" in shown_yaml(config)


def test_duplicate_keys_are_refused_with_their_lines(write_config: Write) -> None:
    path = write_config()
    text = path.read_text() + "seed: 1\noptim:\n  lr: 1e-3\n  eps: 1e-8\n  lr: 1e-4\nseed: 2\n"
    path.write_text(text)
    first = text.splitlines().index("seed: 1") + 1
    assert sorted(problems(path)) == [
        f"lr is given twice, in line {first + 2} and line {first + 4}; expected once",
        f"seed is given twice, in line {first} and line {first + 5}; expected once",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E3", -2500.0),
        ("12", 12),
        ("400_000", 400_000),
        ("yes", "yes"),
        ("true", True),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("null", None),
        ("[1, a]", [1, "a"]),
        (".5", 0.5),
    ],
)
def test_yaml_scalars(text: str, value: object) -> None:
    parsed, _ = parse_yaml(text)
    assert parsed == value and type(parsed) is type(value)


def test_yaml_runs_no_code() -> None:
    with pytest.raises(Exception, match="python/object"):
        parse_yaml("!!python/object/apply:os.system ['true']")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 2: not YAML"),
        ("- 1", "found a list; expected keys"),
        ("a: !!python/name:os.system", "not YAML"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        load_config(path, [])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml", [])


def test_empty_sections_are_defaults(write_config: Write) -> None:
    assert load_config(write_config(optim=None, run=None, deepspeed={}), []).optim.lr == 1e-4


def test_written_configuration_reads_back(write_config: Write, tmp_path: Path) -> None:
    config = load_config(write_config(), ["optim.lr=1e-5", "preview.every=3"])
    path = tmp_path / "again.yaml"
    path.write_text(config_yaml(config))
    assert load_config(path, []) == config == RunConfig.model_validate(config.plain())


EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert load_config(path, []).run.dir == Path("runs") / path.stem
