"""Commands that tell what there is: keys, configurations, pages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditmoe.launcher.command_line.groups import single_command
from ditmoe.launcher.commands.lookup import completion, configs, docs, keys
from ditmoe.launcher.configuration.fields import is_number, unit_of, walk
from ditmoe.launcher.configuration.keys import all_keys
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.configuration.shipped import FOLDER, shipped
from ditmoe.sampling.settings.config import SamplerConfig

ROOT = Path(__file__).resolve().parents[3]
Print = Callable[..., str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Print:
    def run(module: Any, *arguments: str) -> str:
        name = module.__name__.rpartition(".")[2]
        single_command(name, module.command).main(list(arguments), prog_name="ditmoe", standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_every_key_is_listed_with_what_it_takes(printed: Print) -> None:
    shown = printed(keys)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for key in all_keys():
        assert f"\n{key.name}: {key.takes}" in f"\n{shown}" and f"**`{key.name}`**: {key.takes}" in page
        assert len(key.sentence) > 3 and "\n" not in key.sentence


def test_keys_by_their_beginning(printed: Print) -> None:
    lines = printed(keys, "train.log_").splitlines()
    assert lines[0].startswith("train.log_every: an integer >= 1") and "default 100" in lines[0]
    assert lines[1].startswith("    Steps between two records of stats.jsonl, log.txt and ")
    names = [line.split(":")[0] for line in lines[::2]]
    assert {"train.log_every", "train.log_samples"} <= set(names)
    assert names == [key.name for key in all_keys() if key.name.startswith("train.log_")]


def test_numbers_have_a_unit_or_are_declared_to_have_none(printed: Print) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    shown = printed(keys).splitlines()
    units = {key.name: key.unit for key in all_keys()}
    assert units["data.sources.0.timeout"] == "seconds" and units["optim.lr"] == "learning rate"
    assert units["train.batch"] == "images" and units["model.label_dropout"] == "share" and not units["seed"]
    numbers = 0
    for model in (RunConfig, SamplerConfig):
        for name, field in walk(model):
            unit = unit_of(field)
            if is_number(field.annotation):
                assert unit is not None, f"{name}: say its unit, or NO_UNIT"
                numbers += 1
            else:
                assert unit is None, f"{name} is no number, and has a unit"
    assert numbers > 80
    for name, unit in units.items():
        line = next(each for each in shown if each.startswith(f"{name}: "))
        entry = next(each for each in page.splitlines() if each.startswith(f"- **`{name}`**: "))
        assert (f"; unit: {unit}" in line and f"; unit: {unit}" in entry) if unit else "unit:" not in line + entry
    assert {key["name"]: key["unit"] for key in json.loads(printed(keys, "--json"))} == units


def test_a_key_alone_shows_all_of_its_text(printed: Print) -> None:
    shown = printed(keys, "train.skip_steps")
    assert "for a step whose loss is not finite" in " ".join(shown.split())


def test_choices_of_keys(printed: Print) -> None:
    assert printed(keys, "objective.kind").startswith("objective.kind: ddpm or rectified_flow")
    found = {key["name"]: key for key in json.loads(printed(keys, "--json"))}
    assert found["objective.kind"]["choices"] == ["ddpm", "rectified_flow"]
    assert found["data.flip"]["choices"] == ["true", "false"]
    assert found["preview.sampler.sampler"]["choices"][-1] == "null"
    assert found["optim.lr"]["choices"] == []


def test_configurations(printed: Print) -> None:
    shown = printed(configs)
    assert all(f"\n  {name} " in shown for name in (*shipped(), *shipped("grid")))
    assert printed(configs, "photos") == (FOLDER / "photos.yaml").read_text(encoding="utf-8")
    assert printed(configs, "dmcmc", "--path") == f"{FOLDER / 'grids' / 'dmcmc.yaml'}\n"
    assert printed(configs, "--path") == f"{FOLDER}\n"


def test_pages(printed: Print) -> None:
    shown = printed(docs)
    for path in (ROOT / "docs").glob("*.md"):
        assert f"\n{path.stem} " in f"\n{shown}"
        assert printed(docs, path.stem) == path.read_text(encoding="utf-8")
    assert printed(docs, "docs/training.md") == printed(docs, "training")
    assert printed(docs, "training", "--path") == f"{ROOT / 'docs' / 'training.md'}\n"
    assert printed(docs, "--path") == f"{ROOT / 'docs'}\n"
    lines = printed(docs, "--search", "SKIP_STEPS").splitlines()
    assert any(line.startswith("configuration:") for line in lines)
    assert all("skip_steps" in line for line in lines)


def test_pages_come_in_the_order_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "FOLDER", tmp_path)
    for name in ("a", "b", "index"):
        (tmp_path / f"{name}.md").write_text(f"# Page {name}\n")
    (tmp_path / "index.md").write_text("# All\n\n[b](b.md), [b](b.md#x), [gone](gone.md)\n")
    assert list(docs.pages()) == ["index", "b", "a"]
    assert docs.title(tmp_path / "b.md") == "Page b"


def test_scripts_of_shells(printed: Print) -> None:
    assert printed(completion, "zsh").startswith("#compdef ditmoe\n")
