"""A wrong command line: what was found, what was expected, the nearest; exit code 2, and no traceback."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.launcher.cli import main
from ditmoe.launcher.submission.asked import _of_pair
from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import expected_name, nearest
from ditmoe.sampling.settings.config import sampler_from_options
from ditmoe.sampling.settings.networks import choices_of

Say = Callable[[str], list[str]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Say:
    """The lines of the message on a command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ditmoe.launcher.cli.prepare_streams", lambda: None)
    monkeypatch.setattr("ditmoe.launcher.cli.end_with_parent", lambda: None)

    def run(arguments: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["ditmoe", *arguments.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("error: "), shown
        return shown.err.removeprefix("error: ").splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "trian",
            "ditmoe trian: no such command; expected a command of those that `ditmoe --help` lists; did you mean"
            " train?",
        ),
        (
            "checkpoint inpsect r",
            "ditmoe checkpoint inpsect: no such command; expected inspect; did you mean inspect?",
        ),
        (
            "train photos --dryrun",
            "ditmoe train --dryrun: no such option; expected --dry-run or --help; did you mean --dry-run?",
        ),
        (
            "sample r --weight ema",
            "ditmoe sample --weight: no such option; expected one of those that `ditmoe sample --help` lists; did"
            " you mean --weights?",
        ),
        ("sample r --weights emma", "--weights emma: expected ema or weights; did you mean ema?"),
        ("sample r --precision int8", "--precision int8: expected fp32 or bf16"),
        ("completion fsh", "SHELL fsh: expected one of bash, zsh, fish; did you mean fish?"),
        ("sample r --batch 0", "--batch 0: expected an integer >= 1"),
        ("sample r --batch many", "--batch many: expected an integer >= 1"),
        ("sample r --cfg-scale x", "--cfg-scale x: expected a number >= 0"),
        ("sample", "ditmoe sample: RUN is missing; expected ditmoe sample [OPTIONS] {RUN}"),
        (
            "data encode a b",
            "ditmoe data encode: --vae is missing; expected ditmoe data encode [OPTIONS] {SHARDS} {OUT}",
        ),
        (
            "sample a b",
            "ditmoe sample: got unexpected extra argument(s) (b); `ditmoe sample --help` shows its usage",
        ),
        ("sample r --batch", "option '--batch' requires an argument"),
        (
            "train phtoos",
            "phtoos: no such file, and no shipped configuration; expected a YAML file, or a configuration of those"
            " that `ditmoe configs` lists; did you mean photos?",
        ),
        (
            "evaluate r --grid dmcm",
            "dmcm: no such file, and no shipped grid; expected a YAML file, or a grid of those that `ditmoe"
            " configs` lists; did you mean dmcmc?",
        ),
        (
            "configs demos",
            "demos: no shipped configuration; expected one of those that `ditmoe configs` lists; did you mean"
            " demo?",
        ),
        (
            "docs trainig",
            "trainig: no such page; expected a page of those that `ditmoe docs` lists; did you mean training?",
        ),
        ("keys optim.lrr", "optim.lrr: no key begins so; did you mean optim.lr?"),
        ("keys lr", "lr: no key begins so; did you mean optim.lr?"),
        (
            "models DiT-XXL/2",
            "'DiT-XXL/2' is not a preset; expected DiT-SIZE/PATCH or DiT-SIZE/PATCH-NeKa with SIZE of S, B, L, XL,"
            " G and PATCH of 2, 4, 8, such as DiT-S/2-8E2A or DiT-XL/2; did you mean DiT-XL/2-8E2A?",
        ),
    ],
)
def test_messages(arguments: str, message: str, say: Say) -> None:
    assert say(arguments) == [message]


def test_values_and_keys_of_a_configuration(say: Say) -> None:
    assert say("train demo optim.lrr=1 objective.kind=rectified-flow")[1:] == [
        "    optim.lrr=1: no such key; did you mean optim.lr?",
        "    objective.kind = 'rectified-flow': expected ddpm or rectified_flow; did you mean rectified_flow?",
    ]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: choices_of("dino"),
            "dino is no feature network; expected one of classifier, inception, dinov2; did you mean dinov2?",
        ),
        (lambda: sampler_from_options(sampler="dlg:euler", dlg=("skpi=3",)), "skpi=3: no such setting; expected"),
        (lambda: _of_pair("limits", "sav", True), "no such phase; expected "),
    ],
)
def test_names_that_commands_read_themselves(ask: Callable[[], object], message: str) -> None:
    try:
        found = str(ask())
    except UserError as error:
        found = str(error)
    assert message in found and "; did you mean " in found


def test_the_nearest_name() -> None:
    assert nearest("Train", ["train", "sample"]) == "train"
    assert nearest("rectified-flow", ["ddpm", "rectified_flow"]) == "rectified_flow"
    assert nearest("eval", ["evaluate", "score"]) == "evaluate"
    assert nearest("large-model", ["other", "large-model-a", "large-model-b"]) == "large-model-a"
    assert nearest("skpi", ["skip", "sampler"]) == "skip"
    assert nearest("s", ["sample", "serve"]) is None
    assert nearest("gpu", ["auto", "cpu", "cuda"]) is None  # another word, not a slip of the finger
    assert nearest("", ["train"]) is None and nearest("train", []) is None
    assert nearest("x" * 10**6, ["train"] * 100) is None


def test_expected_names() -> None:
    assert expected_name("b", ["aa", "bb"]) == "expected aa or bb"
    assert expected_name("ab", ["aa", "abb", "c"]) == "expected one of aa, abb, c; did you mean abb?"
    many = [f"name{number}" for number in range(13)]
    assert expected_name("x", many, "`list`", "a name") == "expected a name of those that `list` lists"
    assert expected_name("x", many).endswith("name11, name12")
