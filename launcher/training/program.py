"""What every rank of a run does: join the others, train, leave; and what the run's folder says of how it ended."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from ditmoe.data.storage.stopping import EXIT_STOPPED
from ditmoe.data.storage.workers import Crew
from ditmoe.data.stream.dataset import Dataset, open_dataset
from ditmoe.data.stream.stream import start_readers
from ditmoe.launcher.configuration.resume import Change
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.local.memory import keep_freed_memory
from ditmoe.launcher.local.processor import check_bf16
from ditmoe.launcher.local.signals import StopSignal, keep_exit_code
from ditmoe.launcher.training.precision import agreed
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.training.state import RunState, StateFile
from ditmoe.launcher.training.trainer import Trainer
from ditmoe.model.compiling.tools import check_tools
from ditmoe.model.errors import UnwritableError, UserError
from ditmoe.parallel import processes
from ditmoe.parallel.alone import first_rank_works
from ditmoe.parallel.checkpoint.folder import newest_checkpoint, step_of
from ditmoe.parallel.checkpoint.saver import write_failure
from ditmoe.parallel.ranks import own_device, this_process
from ditmoe.slurm.heartbeats import Heart

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED: Final = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
DISK_ERRORS: Final = (*_FULL, *_REFUSED)
"""What a disk says when the run's reports cannot be written; nothing that was saved is lost by it."""


def run_training(config: RunConfig, line: str | None = None) -> int:
    """Train a resolved configuration to its last step, or to a signal; the exit code, 0 or `EXIT_STOPPED`.

    Every process of the run calls it. Repeated, it resumes from the newest intact checkpoint.

    Args:
        line: on the number type, where the machine chose it (`with_precision`).

    Raises:
        UserError: the run is in use, cannot be resumed with this configuration, or met data, a loss or a disk
            that stopped it; nothing that was saved before is lost.
    """
    process = this_process()
    with Heart.of_this_process(process.rank, process.ranks) as heart, ExitStack() as stack:
        # Processes are forked before anything of CUDA is here, which no fork may use.
        data = _opened_data(config, stack)
        device = own_device(config.launch.device, "launch.processes =")
        if device.type == "cpu":
            check_bf16(config.train.precision, config.train.emulated_bf16)
        if config.train.compile:
            check_tools(device.type, "train.compile = true")
        set_tf32(device, config.train.tf32)
        processes.join(device)
        config, line = agreed(config, line)
        folder = RunFolder(config.run.dir)
        changes: list[Change] = []
        state = None
        with telling_checkpoint(folder.path), first_rank_works("opens the run's folder") as works:
            if works:
                stack.enter_context(folder.lock())
                changes = folder.compare_config(config)
                if not folder.config.exists():
                    folder.store_config(config)
                state = StateFile(folder.path, _at_the_start(folder.path, config.train.steps))
        dist.barrier()
        stop = stack.enter_context(StopSignal())
        try:
            if isinstance(data, UserError):
                raise data
            trainer = Trainer(config, folder, device, stop, heart, state, *data)
            with telling_checkpoint(folder.path):
                with first_rank_works("opens the reports") as works:
                    if works:
                        trainer.open_reports(stack, changes, [] if line is None else [line])
                if device.type == "cpu":
                    keep_freed_memory()  # not before: what the start frees is not needed again
                complete = trainer.train()
        except (Exception, KeyboardInterrupt) as error:
            if state is not None:
                state.fail(str(error) or type(error).__name__)
            raise
        # While signals are heard: one that comes after the last checkpoint must not end the others in a wait.
        processes.leave()
        if not complete:
            keep_exit_code()
    return 0 if complete else EXIT_STOPPED


def _opened_data(config: RunConfig, stack: ExitStack) -> tuple[Dataset, Crew] | UserError:
    """The data and the processes that read them, which end with the stack; or what is wrong with them."""
    try:
        dataset = open_dataset(config.data, config.seed)
    except UserError as error:
        return error
    readers = start_readers(dataset)
    stack.callback(readers.close)
    return dataset, readers


def set_tf32(device: torch.device, allowed: bool) -> None:
    """Let a GPU round what it multiplies in fp32 to TF32, or not."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def telling_checkpoint(run: Path) -> Iterator[None]:
    """Where a file of a run cannot be written, say from which checkpoint it will go on, and what is to be done.

    Raises:
        UserError: the disk refused, whoever met it.
    """
    try:
        yield
    except UnwritableError as error:
        raise write_failure(error.__cause__ or error, run, error.path) from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise write_failure(error, run, Path(error.filename or run)) from error


def _at_the_start(run: Path, steps: int) -> RunState:
    """The state of a run that has not yet loaded anything."""
    newest = newest_checkpoint(run)
    step = None if newest is None else step_of(newest)
    written = None if newest is None else newest.stat().st_mtime
    return RunState("starting", step or 0, steps, None, checkpoint_step=step, checkpoint_time=written)
