"""The updates of a run, each looked at after the next one was started: so a GPU always has something to do."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ditmoe.data.storage.files import replacing
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.training.feed import StepBatch
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError
from ditmoe.parallel import processes
from ditmoe.parallel.checkpoint.folder import newest_checkpoint
from ditmoe.parallel.checkpoint.saver import CheckpointSaver
from ditmoe.parallel.engine import training_engine
from ditmoe.parallel.engine.training_engine import NonFiniteLossError, StepResult, StepUnderWay, TrainingEngine


class Updates:
    """Takes the steps of an engine, and ends the run at one whose loss or gradient is not finite.

    On a GPU such a step is met one step later, by all ranks. It changed nothing, and nor did the one after it.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        saver: CheckpointSaver,
        engine: TrainingEngine,
        count: Callable[[StepResult], None],
    ) -> None:
        """Take what each result is given to."""
        self._config, self._folder, self._saver, self._engine = config, folder, saver, engine
        self._count = count
        self._ahead = training_engine.runs_ahead(engine.device) and not engine.layout.offload
        self._last: tuple[int, list[str], StepUnderWay] | None = None
        """The step that is not yet looked at, with its number and the keys of its samples."""
        self.result: StepResult | None = None
        """What the last step saw that was looked at."""

    def take(self, batch: StepBatch, rate: float, stop: bool) -> int:
        """Start a step; how many ranks are known to ask for a stop.

        After a step that a record, a checkpoint or a preview follows, everything is looked at.

        UserError on all ranks where the loss or gradient of a step that is looked at is not finite.
        """
        step = self._engine.step + 1
        with self._naming_not_finite(step, batch.keys):
            under_way = self._engine.start_step(batch.micro_batches, rate, stop)
        requests = self.look_at_last()
        self._last = (step, batch.keys, under_way)
        if requests or not self._ahead or self._is_followed(step):
            requests += self.look_at_last()
        return requests

    def look_at_last(self) -> int:
        """Count the step that is not yet looked at, if there is one; how many ranks asked for a stop in it."""
        if self._last is None:
            return 0
        (step, keys, under_way), self._last = self._last, None
        with self._naming_not_finite(step, keys):
            result = under_way.result()
        if not math.isfinite(result.grad_norm):
            raise self._not_finite(f"the gradient's norm is {result.grad_norm}", step, keys)
        self._count(result)
        self.result = result
        return result.requests

    def _is_followed(self, step: int) -> bool:
        train, preview = self._config.train, self._config.preview
        rhythms = (train.log_every, train.checkpoint_every, preview.every)
        return step == train.steps or any(every and step % every == 0 for every in rhythms)

    @contextmanager
    def _naming_not_finite(self, step: int, keys: list[str]) -> Iterator[None]:
        try:
            yield
        except NonFiniteLossError as error:
            raise self._not_finite(f"the loss is {error.loss}", step, keys) from None

    def _not_finite(self, what: str, step: int, own: list[str]) -> UserError:
        """The message of a run that met NaN or infinity; the batch's sample keys go to a file of their own."""
        keys = list(dict.fromkeys(key for part in processes.gather_objects(own) for key in part))
        self._saver.wait()  # it may be the last good one
        file = self._folder.path / f"not-finite-step-{step:08d}.json"
        if dist.get_rank() == 0:
            with replacing(file) as written:
                written.write(
                    json.dumps({"step": step, "problem": what, "samples": keys}, indent=1).encode() + b"\n"
                )
        newest = newest_checkpoint(self._folder.path)
        names = ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "")
        return UserError(
            f"step {step}: {what}; nothing of this step was saved. "
            f"The last good checkpoint is {newest or 'none yet'}. "
            f"Samples of the batch: {names} (all {len(keys)} in {file}). If this comes again, go on without this"
            f" step (train.skip_steps = {[*self._config.train.skip_steps, step]}), or with another optim"
        )
