"""Jobs that share out their work over the tasks: evaluations, encoding, synthesis."""

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ditmoe.launcher.command_line.groups import single_command
from ditmoe.launcher.submission.request import job_request
from ditmoe.model.errors import UserError
from ditmoe.slurm.job_folder import JobFolder, dataset_folder, evaluation_folder
from ditmoe.slurm.submission.script import Request
from ditmoe.slurm.submission.settings import JobSettings


def evaluation_job(arguments: list[str], settings: JobSettings) -> Request:
    """The job of `ditmoe evaluate ARGUMENTS`: of the checkpoint that is the newest now, unless they name one."""
    from ditmoe.launcher.commands.evaluate import command
    from ditmoe.sampling.network.load import find_checkpoint, home_of

    given = _parsed("evaluate", command, arguments)
    if given["watch"]:
        return _watch_job(given["run"].absolute(), arguments, settings)
    if given["crew"] is not None:
        settings = _alone(f"--crew {given['crew']}: one task leads it", settings)
    checkpoint = find_checkpoint(given["run"], given["step"])
    arguments = _of_checkpoint(arguments, given["run"], given["step"], checkpoint)
    run = home_of(checkpoint).absolute()
    folder = evaluation_folder(run, arguments)
    return job_request("evaluate", ("evaluate", *arguments), folder, settings, run)


def _of_checkpoint(arguments: list[str], source: Path, step: int | None, checkpoint: Path) -> list[str]:
    """The arguments with the step of the checkpoint that was found, where they name none.

    Each task looks by itself, and the job may wait: training would write a newer one meanwhile.
    """
    if step is not None or checkpoint.resolve() == source.resolve():
        return arguments
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return [*arguments[:place], f"--step={int(checkpoint.name.removeprefix('step-'))}", *arguments[place:]]


def following_evaluation(run: Path, options: str, settings: JobSettings) -> Request:
    """The job that scores a run's newest checkpoint once its training is complete.

    Args:
        run: absolute; it need not be there yet.
        options: of `ditmoe evaluate`, as on a command line.
    """
    from ditmoe.launcher.commands.evaluate import command

    try:
        arguments = [*shlex.split(options), "--", str(run)]
    except ValueError as error:
        raise UserError(f"--evaluate {options!a}: {error}; expected options of `ditmoe evaluate`") from None
    given = _parsed("evaluate", command, arguments)
    for name in ("watch", "step", "crew"):
        if given[name] not in (None, False):
            raise UserError(
                f"--evaluate {options!a}: the job follows the training, and scores its last step; expected no"
                f" --{name}" + (" (`ditmoe submit evaluate RUN --watch` scores all)" if name == "watch" else "")
            )
    settings = settings.model_copy(update={"chain": 1})
    return job_request("evaluate", ("evaluate", *arguments), evaluation_folder(run, arguments), settings, run)


def _watch_job(run: Path, arguments: list[str], settings: JobSettings) -> Request:
    """The job that scores every checkpoint of a run, which may have none yet: a task that starts its processes."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; expected a run folder")
    settings = _alone("--watch: starts the processes of each evaluation itself", settings)
    return job_request("evaluate", ("evaluate", *arguments), evaluation_folder(run, arguments), settings, run)


def _alone(why: str, settings: JobSettings) -> JobSettings:
    """The settings of a job of one task, which starts its own processes; UserError where they ask for more."""
    if settings.nodes > 1 or (settings.tasks_per_node or 1) > 1:
        raise UserError(
            f"{why}, on one node; expected --nodes 1 and no --tasks-per-node, and found"
            f" {settings.nodes} × {settings.tasks}"
        )
    return settings.model_copy(update={"tasks_per_node": 1})


def encoding_job(arguments: list[str], settings: JobSettings) -> Request:
    """The job of `ditmoe data encode ARGUMENTS`; UserError where images or VAE do not fit."""
    from ditmoe.data.encoding.plan import EncodeSettings, prepare_encoding
    from ditmoe.data.encoding.vae import read_facts
    from ditmoe.launcher.commands.data.encode import command

    given = _parsed("data encode", command, arguments)
    request = _dataset_job("encode", given, arguments, settings)
    own = {name: given[name] for name in ("dtype", "flips", "format", "seed", "batch", "on_error")}
    asked = EncodeSettings(**{name: getattr(value, "value", value) for name, value in own.items()})
    prepare_encoding(given["shards"], given["out"], read_facts(given["vae"]), asked, given["index"])
    return request


def synthesis_job(arguments: list[str], settings: JobSettings) -> Request:
    """The job of `ditmoe data synthesize ARGUMENTS`: of the newest checkpoint, unless they name one."""
    from ditmoe.launcher.commands.data.synthesize import command
    from ditmoe.sampling.network.load import find_checkpoint

    given = _parsed("data synthesize", command, arguments)
    checkpoint = find_checkpoint(given["source"], given["step"])
    arguments = _of_checkpoint(arguments, given["source"], given["step"], checkpoint)
    return _dataset_job("synthesize", given, arguments, settings)


def _dataset_job(verb: str, given: Mapping[str, Any], arguments: list[str], settings: JobSettings) -> Request:
    if given["overwrite"]:
        raise UserError("--overwrite: every attempt of the job would begin anew; expected OUT removed beforehand")
    if given.get("crew") is not None:
        settings = _alone(f"--crew {given['crew']}: one task leads it", settings)
    out = Path(os.path.abspath(given["out"]))  # without `..`, which is no name of a folder
    return job_request(verb, ("data", verb, *arguments), _beside(out), settings, out.parent)


def _beside(out: Path) -> JobFolder:
    if not out.name:
        raise UserError(f"{out}: expected a folder with a name, beside which that of the job lies")
    return dataset_folder(out)


def _parsed(verb: str, command: Callable[..., None], arguments: list[str]) -> Mapping[str, Any]:
    """The values of a verb's arguments, read as the verb itself reads them; its own message where it cannot."""
    context = single_command(verb, command).make_context(f"ditmoe {verb}", list(arguments))
    starts_its_own = context.params.get("watch") or context.params.get("crew") is not None
    if context.params["processes"] is not None and not starts_its_own:
        raise UserError(
            "--processes: the tasks of the job are its processes; expected --nodes and --tasks-per-node"
        )
    values: Mapping[str, Any] = context.params
    return values
