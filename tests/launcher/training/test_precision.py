"""`train.precision: auto`: chosen where a run starts, kept by the run, and the same on all ranks."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ditmoe.launcher.cli import app
from ditmoe.launcher.configuration.run_config import load_config
from ditmoe.launcher.local import processor
from ditmoe.launcher.local.processor import NARROWEST_IN_BF16
from ditmoe.launcher.planning.workload import planned
from ditmoe.launcher.training import precision
from ditmoe.launcher.training.precision import agreed, with_precision
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.marker import MARKER

Write = Callable[..., Path]
AUTO = {"steps": 20, "batch": 16, "precision": "auto"}


@pytest.fixture
def has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives this machine a processor with these flags."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", file)

    def give(flags: str) -> None:
        file.write_text(f"flags\t: fpu {flags}\n")

    return give


@pytest.mark.parametrize(
    ("flags", "device", "keys", "expected", "why"),
    [
        ("amx_bf16", "cpu", [f"model.hidden={NARROWEST_IN_BF16}"], "bf16", "has amx_bf16"),
        ("avx512_bf16", "cpu", ["model.hidden=384"], "bf16", "384 wide"),
        ("avx512_bf16", "cpu", [f"model.hidden={NARROWEST_IN_BF16 - 32}"], "fp32", "model.hidden = 64"),
        ("avx2", "cpu", ["model.hidden=384"], "fp32", "no instructions for bf16"),
        ("avx2", "cuda", [], "bf16", "a GPU"),
        ("amx_bf16", "cuda", ["parallel.zero=0"], "fp32", "parallel.zero = 0"),
        ("amx_bf16", "cpu", ["model.hidden=384", "parallel.zero=0"], "fp32", "parallel.zero = 0"),
    ],
)
def test_it_is_chosen_by_processor_width_and_zero(
    has: Callable[[str], None],
    write_config: Write,
    flags: str,
    device: str,
    keys: list[str],
    expected: str,
    why: str,
) -> None:
    has(flags)
    config = load_config(write_config(train=AUTO), keys)
    for choose in (with_precision, planned):
        found, line = choose(config, device)
        assert found.train.precision == expected
        assert line is not None and line.startswith(f"train.precision = auto: {expected}, for ") and why in line
    assert config.train.precision == "auto"


def test_a_system_that_does_not_say_computes_in_fp32(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    found, line = with_precision(load_config(write_config(train=AUTO), ["model.hidden=384"]), "cpu")
    assert found.train.precision == "fp32" and line is not None and "does not say" in line


def test_what_is_said_is_left_as_it_is(write_config: Write) -> None:
    config = load_config(write_config(), ["train.precision=bf16"])
    assert with_precision(config, "cpu") == planned(config) == (config, None)


def test_a_run_keeps_it_on_another_processor(has: Callable[[str], None], write_config: Write) -> None:
    """Once it has a checkpoint; and nobody changes it by saying another."""
    wide = ["model.hidden=384"]
    config = load_config(write_config(train=AUTO), wide)
    has("amx_bf16")
    folder, begun = RunFolder(config.run.dir), with_precision(config, "cpu")[0]
    folder.path.mkdir(parents=True)
    folder.store_config(begun)
    has("avx2")
    assert with_precision(config, "cpu")[0].train.precision == "fp32", "nothing was trained yet"
    checkpoint = folder.checkpoints / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / MARKER).touch()
    resumed, line = with_precision(config, "cpu")
    assert resumed.train.precision == "bf16" and line is not None and "the run was started with it" in line
    assert folder.compare_config(resumed) == []
    with pytest.raises(UserError, match=r"train\.precision = 'fp32', but the run was started with 'bf16'"):
        folder.compare_config(load_config(write_config(), ["train.precision=fp32", *wide]))
    with pytest.raises(UserError, match=r"no instructions.*another processor.*emulated_bf16"):
        processor.check_bf16(resumed.train.precision, emulated=False)


def test_ranks_with_unlike_processors_compute_in_fp32(
    has: Callable[[str], None], write_config: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    has("amx_bf16")
    config, line = with_precision(load_config(write_config(train=AUTO), ["model.hidden=384"]), "cpu")
    for others, expected in ((["bf16"], "bf16"), (["fp32"], "fp32")):
        monkeypatch.setattr(precision, "gather_objects", lambda mine, others=others: [mine, *others])
        found, said = agreed(config, line)
        assert found.train.precision == expected
        assert said is not None and said.startswith(f"train.precision = auto: {expected}, for ")
    monkeypatch.setattr(precision, "gather_objects", SimpleNamespace())  # what is said is not asked about
    assert agreed(config, None) == (config, None)


def test_plans_and_dry_runs_say_it(has: Callable[[str], None], write_config: Write) -> None:
    has("avx512_bf16")
    model = {"preset": "DiT-S/2-8E2A", "image_size": 32, "channels": 4, "num_classes": 10}
    path = str(write_config(train={**AUTO, "batch": 64}, model=model, parallel={}, launch={}))
    said = CliRunner().invoke(app, ["plan", path, "--gpus", "2"]).stdout
    assert said.startswith("train.precision = auto: bf16, for a GPU") and "256 tokens, bf16" in said
    small = CliRunner().invoke(app, ["train", str(write_config(train=AUTO)), "--dry-run"]).stdout
    assert "precision: fp32" in small and "# train.precision = auto: fp32, for a network of model.hidden" in small


def test_bf16_between_ranks_wants_bf16_said(write_config: Write) -> None:
    with pytest.raises(UserError, match=r"communication_data_type.*train\.precision = auto"):
        load_config(write_config(train=AUTO, deepspeed={"communication_data_type": "bf16"}), [])
