"""The `ditmoe` command: its commands, and what a user sees when something goes wrong.

Their modules are imported when they are used, so that `ditmoe --help` answers at once.
"""

import importlib
import os
import sys
import time
import traceback
from contextlib import suppress
from typing import Any, Final, NamedTuple, NoReturn

import typer

from ditmoe.launcher.command_line.completion import SHELL
from ditmoe.launcher.command_line.groups import Group, single_command
from ditmoe.launcher.command_line.wrong_usage import words_of
from ditmoe.launcher.local.failures import record_failure, refusal
from ditmoe.launcher.local.signals import end_with_parent
from ditmoe.launcher.local.terminal import let_go, prepare_streams
from ditmoe.model.errors import MissingProcessesError, UserError
from ditmoe.model.outside.text import message_lines
from ditmoe.slurm.environment import rank_variables

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""
USER_ERROR: Final = 2
FAILED: Final = 1
LAST_WORDS_SECONDS: Final = 1.0
"""Between a failed task's message and its end, for srun to pass the message on."""


class Verb(NamedTuple):
    """A command: the module that has it as `command` or `app`, and its line of help."""

    module: str
    help: str


SECTIONS: Final[dict[str, dict[str, Verb]]] = {
    "Prepare": {
        "configs": Verb("ditmoe.launcher.commands.lookup.configs", "List the configurations that are shipped."),
        "data": Verb("ditmoe.launcher.commands.data.group", "Make shards of your images, and check them."),
        "models": Verb("ditmoe.launcher.commands.models", "List the presets, their parameters and FLOPs."),
        "plan": Verb("ditmoe.launcher.commands.plan", "Estimate every layout of a run on a number of GPUs."),
    },
    "Train": {
        "train": Verb("ditmoe.launcher.commands.train", "Train, or resume, the run of a configuration."),
        "status": Verb(
            "ditmoe.launcher.commands.jobs.status", "Show where runs stand, and what is wrong with them."
        ),
        "logs": Verb("ditmoe.launcher.commands.jobs.logs", "Show a run's output."),
        "cancel": Verb("ditmoe.launcher.commands.jobs.cancel", "End a run after it saves a checkpoint."),
        "sweep": Verb("ditmoe.launcher.commands.sweep", "Train every combination of some keys' values."),
    },
    "Draw": {
        "sample": Verb("ditmoe.launcher.commands.sample", "Draw images from a run's network."),
        "serve": Verb("ditmoe.launcher.commands.serving.serve", "Draw images for many users, over HTTP."),
        "noise-classifier": Verb(
            "ditmoe.launcher.commands.noise_classifier", "Train the noise-level classifier that DLG chains need."
        ),
    },
    "Score": {
        "evaluate": Verb("ditmoe.launcher.commands.evaluate", "Score a run: FID and the other figures."),
        "score": Verb("ditmoe.launcher.commands.scoring.score", "Score images that other programs drew."),
        "reference": Verb(
            "ditmoe.launcher.commands.scoring.reference", "Make statistics that take the place of real images."
        ),
    },
    "Weights": {
        "checkpoint": Verb("ditmoe.launcher.commands.checkpoint", "Inspect a checkpoint and check every byte."),
        "convert": Verb("ditmoe.launcher.commands.convert", "Convert weights from and to other formats."),
    },
    "Many machines": {
        "submit": Verb("ditmoe.launcher.commands.submit.group", "Run training and other commands as Slurm jobs."),
        "worker": Verb("ditmoe.launcher.commands.worker", "Take a share of the work of other commands."),
    },
    "Look up": {
        "keys": Verb("ditmoe.launcher.commands.lookup.keys", "List the keys of a configuration."),
        "docs": Verb("ditmoe.launcher.commands.lookup.docs", "Show the documentation."),
        "completion": Verb(
            "ditmoe.launcher.commands.lookup.completion", "Set up completion in bash, zsh or fish."
        ),
    },
}
"""Every command, in the order of use."""
VERBS: Final[dict[str, Verb]] = {name: verb for verbs in SECTIONS.values() for name, verb in verbs.items()}


class LazyGroup(Group):
    """The group of all commands; the table above stands in for their modules."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(VERBS[cmd_name].module)
        app: typer.Typer | None = getattr(module, "app", None)
        command = single_command(cmd_name, module.command) if app is None else typer.main.get_command(app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, VERBS)) + 2
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width - 2}}", verb.help) for name, verb in verbs.items()])

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The names come from the table: no module is imported for its line of help."""
        from typer._click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        found = {name: verb for name, verb in VERBS.items() if name.startswith(incomplete)}
        return [CompletionItem(name, help=verb.help) for name, verb in found.items()]


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True, no_args_is_help=True)
def _command(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    """Train, sample and evaluate Mixture-of-Experts diffusion transformers.

    `ditmoe COMMAND --help` shows the options of a command, and examples.

    Examples:
        ditmoe data pack PHOTOS shards/photos --image-size 64
        ditmoe train photos
        ditmoe sample runs/photos
        ditmoe evaluate runs/photos --count 5000
    """
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"ditmoe {installed_version('ditmoe')}")
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit code 0: done; 2: the user's mistake; 75: asked to stop, and saved;
    130: Ctrl-C; 1: the program's."""
    prepare_streams()
    end_with_parent()
    try:
        os.environ.update(rank_variables(os.environ))
        sys.exit(_run())
    except UserError as error:
        _end_with_message(str(error), FAILED if isinstance(error, MissingProcessesError) else USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _end(INTERRUPTED)
    except BrokenPipeError:
        let_go(sys.stdout)  # its reader, such as `head`, has seen enough
        sys.exit(1)
    except Exception as error:
        refused = refusal(error)
        if refused is not None:
            _end_with_message(refused, USER_ERROR)
        if not record_failure(traceback.format_exc(), 1):
            traceback.print_exc()
        _end(1)


def _end_with_message(message: str, code: int) -> NoReturn:
    """End with a message and no traceback: shown here, or by the process that started this one."""
    if not record_failure(message, code):
        print(f"error: {message_lines(message)}", file=sys.stderr)
    _end(code)


def _end(code: int) -> NoReturn:
    """End this process after a failure.

    In a process group at once: its threads may wait for ranks that are gone, and the interpreter's own end would
    cut them short, which C++ answers with SIGABRT in place of the exit code. A task of srun's stays a moment: at
    the first task that fails srun ends the step, and shows nothing of what it has not been sent by then.
    """
    with suppress(OSError):  # it goes nowhere, as on a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    if "SLURM_PROCID" in os.environ:
        time.sleep(LAST_WORDS_SECONDS)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    """Run the command; its exit code."""
    command = typer.main.get_command(app)
    if os.environ.get(SHELL):
        from ditmoe.launcher.command_line.completion import answer

        typer.echo(answer(command, os.environ))
        return 0
    try:
        code = command.main(prog_name="ditmoe", standalone_mode=False)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message(), err=True)
            return USER_ERROR
        raise UserError(words_of(error)) from None
    except typer.Abort:
        return INTERRUPTED
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
