"""The number type of a run whose configuration leaves it to the machine: chosen once, and kept by the run."""

from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.local.processor import Choice, choose_precision
from ditmoe.launcher.planning.workload import with_choice
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.parallel.processes import gather_objects


def with_precision(config: RunConfig, device: str) -> tuple[RunConfig, str | None]:
    """A configuration whose `train.precision` says fp32 or bf16, and what the log says of that.

    A run that has a checkpoint keeps what it was started with, on whatever machine it goes on.

    Args:
        config: of a run that this process starts, resumes or is a part of.
        device: the type that it computes on, `cpu` or `cuda`.

    Returns:
        The configuration, and a line; None: nothing was left to the machine.

    Raises:
        UserError: the run was started, and its configuration cannot be read.
    """
    if config.train.precision != "auto":
        return config, None
    kept = RunFolder(config.run.dir).trained_config()
    if kept is not None and kept.train.precision != "auto":
        return with_choice(config, Choice(kept.train.precision, "the run was started with it"))
    return with_choice(config, choose_precision(device, config.model.hidden, config.parallel.zero))


def agreed(config: RunConfig, line: str | None) -> tuple[RunConfig, str | None]:
    """The same on all ranks, whose processors may differ; a collective call of those of a run.

    Args:
        config: as `with_precision` gives it, with its line.
    """
    if line is None or len(set(gather_objects(config.train.precision))) == 1:
        return config, line
    return with_choice(config, Choice("fp32", "not every process has a processor with instructions for bf16"))
