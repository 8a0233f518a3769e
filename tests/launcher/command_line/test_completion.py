"""Completion: what is answered, and that shells make of it the line that is meant."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ditmoe.launcher.cli import VERBS, app
from ditmoe.launcher.command_line.completion import LINE, SHELL, WORD, answer
from ditmoe.launcher.command_line.groups import single_command
from ditmoe.launcher.commands.lookup import completion
from ditmoe.launcher.configuration.shipped import shipped
from tests.launcher.command_line.shells import CLEAR, Shell, with_ditmoe


def answered(line: str, word: str | None = None) -> tuple[list[str], bool]:
    """Words, and whether paths are asked for."""
    import typer

    told = {SHELL: "zsh", LINE: line, **({} if word is None else {WORD: word})}
    lines = [each.split("\t") for each in answer(typer.main.get_command(app), told).splitlines()]
    return [each[1] for each in lines if each[0] == "word"], ["file"] in lines


def test_commands_and_options() -> None:
    assert answered("ditmoe ") == (list(VERBS), False)
    assert answered("ditmoe tr") == (["train"], False)
    assert answered("ditmoe data ver") == (["verify"], False)
    assert answered("ditmoe train --dr") == (["--dry-run"], False)
    assert "--help" in answered("ditmoe sample --")[0]


def test_choices() -> None:
    assert answered("ditmoe sample r --weights ") == (["ema", "weights"], False)
    assert answered("ditmoe sample r --weights=e") == (["--weights=ema"], False)
    assert answered("ditmoe completion ") == (["bash", "zsh", "fish"], False)
    assert answered("ditmoe docs train") == (["training"], False)


def test_configurations_and_files() -> None:
    """Those that are shipped, beside the files that are here."""
    assert answered("ditmoe train ") == (list(shipped()), True)
    assert answered("ditmoe submit train pho")[0] == [name for name in shipped() if name.startswith("pho")]
    assert answered("ditmoe convert a b --config dem") == (["demo"], True)
    assert answered("ditmoe evaluate r --grid ") == (list(shipped("grid")), True)
    assert answered("ditmoe sample ") == ([], True)


@pytest.mark.parametrize("command", ["train photos", "plan photos", "sweep photos", "submit train photos"])
def test_keys(command: str) -> None:
    assert answered(f"ditmoe {command} mod") == (["model."], False)
    found, _ = answered(f"ditmoe {command} model.")
    assert "model.depth=" in found and not any(word.count(".") > 1 for word in found)
    assert answered(f"ditmoe {command} preview.sampler.ste") == (["preview.sampler.steps="], False)
    assert answered(f"ditmoe {command} objective.kind=")[0] == [
        "objective.kind=ddpm",
        "objective.kind=rectified_flow",
    ]
    assert answered(f"ditmoe {command} data.flip=t") == (["data.flip=true"], False)


def test_keys_without_values() -> None:
    assert answered("ditmoe keys optim.l") == (["optim.lr"], False)


def test_bash_takes_the_end_of_a_word_for_the_word() -> None:
    """It cuts words at = and :."""
    assert answered("ditmoe train photos objective.kind=d", "d") == (["ddpm"], False)
    assert answered("ditmoe train photos objective.kind=", "") == (["ddpm", "rectified_flow"], False)
    assert answered("ditmoe sample r --sampler dlg:kar", "kar") == (["kar1", "kar2"], False)


def test_it_answers_without_torch() -> None:
    code = (
        "import os, sys\n"
        f"os.environ.update({SHELL}='bash', {LINE}='ditmoe train photos model.')\n"
        "from ditmoe.launcher.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "model.depth=" in done.stdout, done.stderr


def test_help_says_where_scripts_go() -> None:
    shown = single_command("completion", completion.command)
    assert all(f"ditmoe completion {name} >" in " ".join(shown.examples) for name in ("bash", "zsh", "fish"))


@pytest.mark.parametrize("name", ["bash", "zsh"])
def test_a_shell(name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "phobia.yaml").write_text("")
    with Shell(name, tmp_path) as shell:
        shell.type("ditmoe tra\t", "ditmoe train ")
        shell.type("phob\t", "phobia.yaml ")
        shell.type("model.hid\t", "model.hidden=")
        shell.type(f"8 objective.kind=d\t{CLEAR}", "objective.kind=ddpm ")
        shell.type("ditmoe sample r --sampler dlg:rk\t", "dlg:rk45 ")


def test_fish(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    program = "ditmoe completion fish | source; complete -C 'ditmoe train photos model.he'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", program], env=with_ditmoe(tmp_path), capture_output=True, text=True
    )
    assert done.stdout == "model.heads=\tAttention heads\n", done.stderr
