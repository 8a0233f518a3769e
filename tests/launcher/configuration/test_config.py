"""Reading a configuration: every problem at once, in words that name key, value and what was expected."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.launcher.configuration.fields import expected, walk
from ditmoe.launcher.configuration.overrides import apply_overrides
from ditmoe.launcher.configuration.resolve import config_yaml, shown_yaml
from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.model.errors import UserError
from ditmoe.model.outside.yaml_reader import parse_yaml

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
        "train.steps = 'many': expected an integer >= 1 and <= 100000000000",
        "train.micro_batch = 0: expected an integer >= 1 and <= 16777216, or null",
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
        ({"train": {"batch": True}}, "train.batch = true: expected an integer >= 1 and <= 16777216"),
        ({"parallel": {"zero": 7}}, "parallel.zero = 7: expected one of 0, 1, 2, 3"),
        ({"train": {"precision": "fp16"}}, "train.precision = 'fp16': expected one of auto, fp32, bf16"),
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
        ({"seed": -1}, "seed = -1: expected an integer >= 0 and <= 9223372036854775807"),
        ({"seed": True}, "seed = true: expected an integer >= 0 and <= 9223372036854775807"),
        ({"deepspeed": 3}, "deepspeed = 3: expected a section of free keys"),
        ({"launch": {"device": "gpu"}}, "launch.device = 'gpu': expected one of auto, cpu, cuda"),
        (
            {"preview": {"sampler": {"seeds": 3}}},
            "preview.sampler.seeds = 3: no such key; did you mean preview.sampler.seed?",
        ),
        ({"lr": 1}, "lr = 1: no such key; did you mean optim.lr?"),
        (
            {"preview": {"sampler": {"sampler": "dlg:kar1"}}},
            "preview.sampler.sampler = 'dlg:kar1': chains need a noise-level classifier, which is trained after"
            " the run; expected kar1",
        ),
        (
            {"parallel": {"expert": 2, "activation": {"checkpointing": True}}},
            "parallel.activation = {'checkpointing': True}: no such key; did you mean"
            " parallel.activation_checkpointing?",
        ),
    ],
)
def test_values(write_config: Write, section: dict[str, object], line: str | None) -> None:
    line = line or "model.hidden = 30: expected an integer >= 4 and <= 1048576 and that is a multiple of 4"
    assert problems(write_config(**section)) == [line]


HOSTILE = {
    "deep flow lists": "seed: " + "[" * 5000 + "]" * 5000,
    "deep flow mappings": "seed: " + "{a: " * 3000 + "1" + "}" * 3000,
    "deep block": "\n".join("  " * depth + "a:" for depth in range(2000)),
    "depth by aliases": "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(500)),
    "refers to itself": "deepspeed: &a {x: *a}",
    "is a list of itself": "seed: &a [*a]",
    "merges itself": "deepspeed: &a {<<: *a}",
    "a key of itself": "? &a [*a]\n: 1",
    "many aliases": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]\n" for n in range(9)),
    "long": "a: " + "x" * (2**20 + 1),
    "tag": "seed: !!bool x",
    "tag of a time": "seed: !!timestamp x",
    "tag of Python": "seed: !!python/name:os.system",
    "escape": 'a: "\\UFFFFFFFF"',
    "half a pair": 'a: "\\ud800"',
    "zero": 'a: "\\0"',
    "control character": "a: \x07",
    "list as a key": "? [1, 2]\n: 3",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_one_message(write_config: Write, text: str) -> None:
    """In a file of its own, in a section, and as an override; none of it is built before it is refused."""
    path = write_config()
    (path.parent / "bad.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match=r"not YAML|cannot be read"):
        load_config(path.parent / "bad.yaml", [])
    value = text.partition(": ")[2]
    if "\n" not in text:
        (line,) = problems(path, f"deepspeed.x={value}")
        assert line.startswith("deepspeed.x=") and "the value is not YAML" in line and len(line) < 250


def test_aliases_within_limits_are_what_they_stand_for() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: [*x]}")[0] == {"a": {"b": 1}, "c": {"b": 1, "d": [{"b": 1}]}}


def test_keys_are_the_text_that_stands_there(write_config: Write) -> None:
    assert parse_yaml("{3: 4, null: 1, 1e3: x, true: 2}")[0] == {"3": 4, "null": 1, "1e3": "x", "true": 2}
    path = write_config(data={"sources": [{"path": "shards", "classes": {3: None, "4": 5, "cat": "dog"}}]})
    assert load_config(path, []).data.sources[0].classes == {"3": None, "4": 5, "cat": "dog"}
    assert problems(write_config(optim={3: 4}), "data.sources.0.classes.3=1.5") == [
        "data.sources.0.classes.3 = 1.5: expected a string or an integer, or null",
        "optim.3 = 4: no such key; expected one of optim.lr, optim.warmup_steps, optim.decay_steps, optim.betas,"
        " optim.eps, optim.weight_decay, optim.clip",
    ]


def test_every_number_is_finite_and_bounded(write_config: Write) -> None:
    """Whatever is added: no field takes an infinity, and no integer is beyond what arrays and files can count."""
    path, numbers = write_config(), 0
    for key, field in walk(RunConfig):
        words = expected(field)
        if words.startswith("a number"):
            numbers += 1
            for value in (".inf", "-.inf", ".nan", "1e400"):
                assert problems(path, f"{key}={value}")[0].startswith(f"{key} = "), key
        elif words.startswith("an integer"):
            numbers += 1
            for value in (f"{2**63}", "-1", "9" * 5000, "0x" + "f" * 5000):
                assert any(line.startswith(f"{key} = ") for line in problems(path, f"{key}={value}")), (key, value)
    assert numbers > 40


def test_a_free_section_holds_plain_values(write_config: Write) -> None:
    assert problems(write_config(), "deepspeed.zero_optimization={reduce_bucket_size: .inf}") == [
        "deepspeed.zero_optimization.reduce_bucket_size = inf: expected an integer >= 1"
    ]


@pytest.mark.parametrize("text", ["''", "' '", "a" * 256, "a/" * 1500])
@pytest.mark.parametrize("key", ["run.dir", "data.cache", "data.sources.0.index", "data.sources.0.path"])
def test_paths(write_config: Write, key: str, text: str) -> None:
    (line,) = problems(write_config(), f"{key}={text}")
    assert line.startswith(f"{key} = ") and "expected a" in line and len(line) < 250


def test_many_problems_are_counted(write_config: Write) -> None:
    path = write_config(optim={f"x{n}": 1 for n in range(5000)}, **{f"y{n}": 1 for n in range(200)})
    lines = problems(path)
    assert "… and 4,950 more problems of optim" in lines and "… and 150 more unknown keys" in lines
    assert len(lines) == 102


@pytest.mark.parametrize(
    "override",
    [
        "data.sources.²=1",
        f"data.sources.{'9' * 5000}.path=x",
        "deepspeed" + ".a" * 5000 + "=1",
        "x" * 10**6 + "=1",
    ],
)
def test_odd_overrides(write_config: Write, override: str) -> None:
    (line,) = problems(write_config(), override)
    assert len(line) < 300


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


@pytest.mark.parametrize("key", ["preview.sampler.grid", "preview.sampler.dlg.skip", "preview.sampler.dlg"])
def test_a_hint_is_no_key_that_only_its_section_is_alike_with(write_config: Write, key: str) -> None:
    """`preview.sampler.grid` was answered with `preview.sampler.dlg`, which previews refuse."""
    (line,) = problems(write_config(), f"{key}=3")
    assert line.startswith(
        f"{key}=3: no such key; expected one of preview.sampler.sampler, preview.sampler.steps,"
    )


def test_every_misspelt_key_is_answered_with_itself_or_one_of_its_section(write_config: Write) -> None:
    """A letter less: the hint is the key, or another key as near to what was written."""
    for key in (key for key, _ in walk(RunConfig) if ".0" not in key and len(key.rpartition(".")[2]) > 3):
        section, _, leaf = key.rpartition(".")
        wrong = ".".join(filter(None, (section, leaf[:2] + leaf[3:])))
        _, lines = apply_overrides(RunConfig, {}, [f"{wrong}=1"])
        if not lines:
            continue  # free keys of a section
        assert f"did you mean {key}?" in lines[0], lines


def test_wrong_overrides(write_config: Write) -> None:
    path = write_config()
    assert problems(path, "lr=1", "optim.betass=[1]", "train", "train.steps=x", "a.b=1", "seed=[", "seed.x=1") == [
        "lr=1: no such key; did you mean optim.lr?",
        "optim.betass=[1]: no such key; did you mean optim.betas?",
        "'train' is not an override; expected KEY=VALUE, such as optim.lr=2e-4",
        "a.b=1: no such key; expected one of run, launch, model, objective, data, parallel, train, optim, ema,"
        " checkpoint, preview, deepspeed, seed",
        "seed=[: the value is not YAML: expected the node content, but found '<stream end>'; expected a scalar"
        " or [a, list]",
        "seed.x=1: no such key; seed has no keys below it",
        "train.steps = 'x': expected an integer >= 1 and <= 100000000000",
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


def test_a_run_lies_on_this_machine(write_config: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"run\.dir = 's3://bucket/run': is an address; expected a folder"):
        load_config(write_config(), ["run.dir=s3://bucket/run"])
