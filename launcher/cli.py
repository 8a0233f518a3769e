"""The `ditmoe` command: its verbs, and what a user sees when something goes wrong.

Modules of verbs are imported when their verb is used, so that `ditmoe --help` answers at once.
"""

import importlib
import os
import sys
import traceback
from contextlib import suppress
from typing import Any, Final, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

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


class Verb(NamedTuple):
    """A verb: the module that has it as `command` or `app`, and its line of help."""

    module: str
    help: str


VERBS: Final[dict[str, Verb]] = {
    "data": Verb("ditmoe.launcher.commands.data.group", "Pack images into shards, and verify shards."),
    "train": Verb("ditmoe.launcher.commands.train", "Train, or resume, the run of a configuration."),
    "submit": Verb("ditmoe.launcher.commands.submit.group", "Hand training and other verbs to Slurm."),
    "sweep": Verb("ditmoe.launcher.commands.sweep", "Train every combination of some keys' values."),
    "status": Verb("ditmoe.launcher.commands.jobs.status", "Show where runs stand, and what is wrong with them."),
    "logs": Verb("ditmoe.launcher.commands.jobs.logs", "Print what a run printed."),
    "cancel": Verb("ditmoe.launcher.commands.jobs.cancel", "End a run, with a checkpoint."),
    "sample": Verb("ditmoe.launcher.commands.sample", "Draw images from a run's network."),
    "evaluate": Verb("ditmoe.launcher.commands.evaluate", "Score a run: FID and the other figures."),
    "score": Verb("ditmoe.launcher.commands.scoring.score", "Score images that others drew."),
    "worker": Verb("ditmoe.launcher.commands.worker", "Make parts for the commands that lead a crew."),
    "reference": Verb("ditmoe.launcher.commands.scoring.reference", "Make a file that stands for real images."),
    "serve": Verb("ditmoe.launcher.commands.serving.serve", "Draw images for many users, over HTTP."),
    "noise-classifier": Verb(
        "ditmoe.launcher.commands.noise_classifier", "Train the noise-level classifier that DLG chains need."
    ),
    "checkpoint": Verb("ditmoe.launcher.commands.checkpoint", "Look into a checkpoint, and check every byte."),
    "plan": Verb("ditmoe.launcher.commands.plan", "Estimate every layout of a run on a number of GPUs."),
    "models": Verb("ditmoe.launcher.commands.models", "List the presets, their parameters and FLOPs."),
    "convert": Verb("ditmoe.launcher.commands.convert", "Bring weights in, and take them out again."),
}


class LazyGroup(TyperGroup):
    """The group of all verbs; the table above stands in for their modules."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(VERBS[cmd_name].module)
        app: typer.Typer | None = getattr(module, "app", None)
        if app is None:
            app = typer.Typer(add_completion=False)
            app.command(cmd_name)(module.command)
        # Plain help: rich would take a third of the time that help may take.
        app.rich_markup_mode = None
        app._add_completion = False
        command = typer.main.get_command(app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # The base class looks for near names in its own table, which only needs the names.
        names: dict[str, Any] = dict.fromkeys(VERBS)
        self.commands = names
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True, no_args_is_help=True)
def _command(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    """Train, sample and evaluate Mixture-of-Experts diffusion transformers."""
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
    cut them short, which C++ answers with SIGABRT in place of the exit code.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        with suppress(OSError):  # it goes nowhere, as on a full disk
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    """Run the verb; its exit code."""
    command = typer.main.get_command(app)
    try:
        code = command.main(prog_name="ditmoe", standalone_mode=False)
    except typer.TyperException as error:
        show = getattr(error, "show", None)
        assert show is not None
        show()
        return error.exit_code
    except typer.Abort:
        return INTERRUPTED
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
