"""`ditmoe completion`: the script by which a shell completes command lines of ditmoe."""

from typing import Annotated, Literal

import typer


def command(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell.", metavar="SHELL")],
) -> None:
    """Print the script that completes commands, options, choices, configurations and their keys.

    Put it where the shell looks for completions; new shells then use it. The first three examples are for bash
    (with the package bash-completion), zsh (a folder of $fpath) and fish; the last is for the current bash
    only.

    Examples:
        ditmoe completion bash > ~/.local/share/bash-completion/completions/ditmoe
        ditmoe completion zsh > ~/.zfunc/_ditmoe
        ditmoe completion fish > ~/.config/fish/completions/ditmoe.fish
        source <(ditmoe completion bash)
    """
    from ditmoe.launcher.command_line.completion import SCRIPTS

    typer.echo(SCRIPTS[shell], nl=False)
