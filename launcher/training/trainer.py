"""One rank's training: steps, records, checkpoints and previews, until the last step or a stop."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from ditmoe.data.encoding.vae import find_vae
from ditmoe.data.storage.workers import Crew
from ditmoe.data.stream.dataset import Dataset
from ditmoe.data.stream.remembered import kept_in_checkpoint
from ditmoe.data.stream.samples import Skip
from ditmoe.launcher.configuration.resolve import layout_of, shown_yaml, start_of
from ditmoe.launcher.configuration.resume import Change
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.configuration.validation import shown
from ditmoe.launcher.local.garbage import GarbageCollection
from ditmoe.launcher.local.signals import StopSignal
from ditmoe.launcher.profiling.session import Profile, Profiled
from ditmoe.launcher.training.best import BestCheckpoints
from ditmoe.launcher.training.feed import Feed, keys_of_all_ranks
from ditmoe.launcher.training.kept_sums import check_same_data, kept_sums
from ditmoe.launcher.training.preview import draw_preview
from ditmoe.launcher.training.report import Reporter
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.training.skips import SkipLedger, skips_of_data_ranks
from ditmoe.launcher.training.state import StateFile
from ditmoe.launcher.training.throughput import Clock, Sums, peak_memory_gib, peak_tflops
from ditmoe.launcher.training.updates import Updates
from ditmoe.model.compiling.blocks import compiled_blocks
from ditmoe.model.count import TRAINING_PASSES, flops_per_image
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.objective import Objective, make_objective
from ditmoe.model.outside.text import counted
from ditmoe.parallel import processes
from ditmoe.parallel.alone import first_rank_works
from ditmoe.parallel.checkpoint.folder import step_of
from ditmoe.parallel.checkpoint.saver import CheckpointSaver
from ditmoe.parallel.checkpoint.training_state import load_training_state
from ditmoe.parallel.engine.training_engine import StepResult, TrainingEngine
from ditmoe.parallel.stages import stage_blocks
from ditmoe.parallel.start.begin import begun
from ditmoe.sampling.drawing.picture import save_picture
from ditmoe.sampling.integrators.advice import sampler_warnings
from ditmoe.slurm.heartbeats import Heart, Phase

SHORTEST_WAIT_LOGGED: Final = 0.1
"""Seconds of waiting for checkpoints, or for what follows the last record, from which on the log says so."""


class Trainer:
    """One rank's part of a run; `state` is rank 0's alone."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        device: torch.device,
        stop: StopSignal,
        heart: Heart,
        state: StateFile | None,
        dataset: Dataset,
        readers: Crew,
    ) -> None:
        self.config = config
        self.folder = folder
        self.device = device
        self.stop = stop
        self.heart = heart
        self.state = state
        self.phase: Phase = "start"
        """Of a step: the first one belongs to the start, for all that it has to prepare."""
        self.layout = layout_of(config)
        self.dataset, self.readers = dataset, readers
        with first_rank_works("looks for the files of the data") as works:
            if works:
                self.dataset.check_files()
                if config.preview.every and self.dataset.index.latents is not None:
                    # Rather now than at the first preview.
                    find_vae(self.dataset.index.latents, config.data.vae, option="data.vae=FOLDER")
        self.objective: Objective = make_objective(config.objective)
        self.stages = stage_blocks(config.model, self.layout.pipe)
        with torch.device("meta"):
            network = DiT(config.model, self.stages[self.layout.stage(dist.get_rank())])
        network.checkpoint_blocks = config.parallel.activation_checkpointing
        if config.train.compile:
            network.compute_block = compiled_blocks(with_gradients=True)
        start = start_of(config, self.dataset.index.class_names)
        with begun(folder.path, start, config.seed) as self.start:
            self.engine = TrainingEngine(
                network,
                self.objective,
                self.layout,
                config.optim,
                config.ema,
                config.train.precision,
                config.deepspeed,
                device,
                self.start.initial,
            )
        best = BestCheckpoints(folder, config.checkpoint, config.train.checkpoint_every)
        self.saver = CheckpointSaver(folder.path, config.checkpoint, best)
        info, self.skipped = load_training_state(folder.path, self.engine)
        if info is None and self.start.initial is None:
            raise UserError(f"{folder.path}: its checkpoints were removed while the run began; start it again")
        if info is not None:
            check_same_data(info, self.dataset.facts)
        self.resumed = None if info is None else info.path
        self.started_from = self.start.facts if info is None else info.started_from
        self.images = 0 if info is None else info.images
        sums = {} if info is None else kept_sums(info)
        load_LN = sums.pop("expert_load", None)
        if load_LN is not None:
            self.engine.keep_load(torch.tensor(load_LN, dtype=torch.float64))
        self.ledger = SkipLedger(self.dataset, sums.pop("skips", {}))
        self.unreported: list[Skip] = []
        """This rank's skips since the last record."""
        self.sums = Sums(**sums)
        self.updates = Updates(config, folder, self.saver, self.engine, lambda result: self.sums.add(result))
        self.clock = Clock()
        self.garbage = GarbageCollection()
        self.network = network
        self.profile = Profile(Profiled(config, self.layout, network, self.engine, device), folder.path)
        self.report: Reporter | None = None

    def open_reports(self, stack: ExitStack, changes: list[Change], lines: list[str]) -> None:
        """Rank 0: open the reports, say how the run starts, and keep what changed in its history.

        Args:
            lines: of what was decided for the run before.
        """
        config = self.config
        self.report = stack.enter_context(
            Reporter(self.folder, config.train.steps, self.engine.step, loggers=config.train.loggers)
        )
        for problem in self.skipped:
            self.report.log(f"skipped a checkpoint: {problem}")
        for key, before, now in changes:
            self.report.log(f"changed since the run was started: {key}: {shown(before)} before, {shown(now)} now")
        self.folder.store_config(config, changes, self.engine.step)
        past = [step for step in config.train.skip_steps if step <= self.engine.step]
        if past:
            self.report.log(f"train.skip_steps: {past} are done already; the run goes on after {self.engine.step}")
        if self.resumed is not None:
            self.report.log(
                f"resumed from {self.resumed}: step {self.engine.step}, {counted(self.images, 'image')} seen"
            )
        else:
            self.report.text("configuration", shown_yaml(config))
        for line in (*lines, *self.start.lines):
            self.report.log(line)
        if self.start.facts is not None:
            self.folder.keep_in_history(self.engine.step, started_from=self.start.facts)
        self.report.log(self.layout.picture(config.model.experts, self.stages))
        if self.layout.accumulation > 1:
            self.report.log(f"each step accumulates {self.layout.accumulation} micro-batches")
        if config.preview.every is not None:
            for warning in sampler_warnings(config.preview.sampler.resolved(config.objective)):
                self.report.log(f"warning: previews: {warning}")

    def train(self) -> bool:
        """Step until the run is complete or a stop is asked for on any rank; whether it is complete."""
        steps = self.config.train.steps
        if self.engine.step >= steps:
            if self.report is not None:
                self.report.outcome = "complete"
            self._say(f"the run is complete: step {self.engine.step} of {steps}")
            self._tell_state(state="complete")
            return True
        self._tell_state(state="training")
        rank = dist.get_rank()
        feed = Feed(
            self.config, self.dataset, self.objective, self.layout, self.device, rank, self.images, self.readers
        )
        self._say(feed.crowding())
        stopped = False
        self._say(self.profile.problem(steps))
        if self.config.train.compile:
            self._compile()
        self.clock = Clock()
        with feed, self.saver, self.garbage, self.profile:
            while self.engine.step < steps and not stopped:
                with self.profile.step(self.engine.step + 1):
                    stopped = self._step(feed) > 0
                    self.garbage.after_step(self.engine.step)
                    self.phase = "step"
                    saved = self._save_if_due(stopped)
                    # After the checkpoint: it takes long, and who asked for a stop may not wait for it.
                    if not stopped:
                        self._preview_if_due()
                if not stopped:
                    self._tell_profile()
            # The last one is complete, or the run fails, before anything is said of it.
            self.heart.beat("save", self.engine.step, "waits for the last checkpoint")
            with self.clock.part("save"):
                self.saver.wait()
                self._tell_saved()
        self._tell_rest()
        complete = self.engine.step >= steps
        if complete and self.report is not None:
            self.report.outcome = "complete"
        if complete:
            self._say(f"the run is complete: step {steps}; saved {saved}")
            self._tell_state(state="complete")
        else:
            reason = f"stopped by {self._asked_by()} at step {self.engine.step}"
            self._say(self.profile.left_out(self.engine.step, steps))
            self._say(f"{reason}; saved {saved}; repeat the command to continue")
            self._tell_state(state="stopped", reason=reason)
        return complete

    def _compile(self) -> None:
        """Before the clock runs: the code of a block."""
        self.heart.beat("start", self.engine.step, "compiles a block")
        seconds = compiled_blocks(with_gradients=True).prepare(self.network, self.layout.micro_batch)
        self._say(f"compiled a block in {seconds:.1f} s, which no rate counts")

    def _save_if_due(self, stopped: bool) -> Path | None:
        """The checkpoint, if this step has one: each that runs end with does."""
        step, saved = self.engine.step, None
        with self.clock.part("save"):
            if stopped or step == self.config.train.steps or step % self.config.train.checkpoint_every == 0:
                self.heart.beat("save", step)
                saved = self._save()
            self._tell_saved()
        return saved

    def _tell_profile(self) -> None:
        """Write and show the profile, if this step was the last that it needs."""
        if not self.profile.is_due(self.engine.step):
            return
        self.heart.beat("evaluation", self.engine.step, "writes a profile")
        with self.clock.part("record"):
            written = self.profile.finish()
            with first_rank_works("shows the profile"):
                if self.report is not None and written is not None:
                    self.report.log(f"profile written to {written.folder}\n{written.table}")
                    self.report.text("profile", written.table, self.engine.step)
                    self.report.image("profile", written.timeline_HWC, self.engine.step)

    def _asked_by(self) -> str:
        """The signal that stopped the run, and where it came if not here; all ranks ask."""
        names = {rank: name for rank, name in enumerate(processes.gather_objects(self.stop.name)) if name}
        rank, name = next(iter(names.items()))
        return name if rank == 0 else f"{name} on rank {rank}"

    def _step(self, feed: Feed) -> int:
        """One step, counted and reported; how many ranks ask to stop after it."""
        step, steps = self.engine.step + 1, self.config.train.steps
        self.heart.beat(self.phase, step, "reads data")
        with self.clock.part("data_wait"):
            batch = feed.next_step()
        self.unreported += batch.skips
        self.heart.beat(self.phase, step, "computes")
        rate = self.config.optim.learning_rate(step, steps)
        # A rank that knows of a failed save stops all, at this step: then all of them meet the failure.
        stop = self.stop.requested or self.saver.failed
        updates = step not in self.config.train.skip_steps
        if updates:
            with self.profile.counted(step):
                requests = self.updates.take(batch, rate, stop)
            result = self.updates.result
        else:
            requests, result = self._skip_step(step, stop), None
        self.images += self.layout.batch
        self.clock.step(update=updates)
        with self.clock.part("record"):
            if self.config.train.log_samples:
                keys = keys_of_all_ranks(batch, self.layout)
                if self.report is not None:
                    self.report.samples(step, keys)
            if step % self.config.train.log_every == 0 or step == steps:
                self._record(result, rate)
            if self.report is not None:
                self.report.advance()
        return requests

    def _skip_step(self, step: int, stop: bool) -> int:
        """A step whose samples are consumed and not trained on."""
        requests = self.updates.look_at_last()
        self.sums.skipped_steps.append(step)
        if self.report is not None:
            self.report.log(f"step {step}: skipped, without an update, as train.skip_steps says")
            self.folder.keep_in_history(step, skipped=True)
        return requests + self.engine.skip_step(stop)

    def _record(self, result: StepResult | None, rate: float) -> None:
        """Report the means since the last record, and the experts' load in the last step, if it was an update."""
        memory = torch.tensor(peak_memory_gib(self.device), device=self.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        self._count_skips()
        progress = self.dataset.progress(self.images)
        trained = self.clock.share_trained()
        rates = self.clock.take(self.layout.batch)
        values: dict[str, Any] = {
            "images": self.images,
            "epoch": progress[self.dataset.sources[0].name].epoch,
            **self.sums.means(),
            "lr": rate,
            **rates,
            "memory_gib": float(memory),
        }
        peak = self.config.train.peak_tflops or peak_tflops(self.device, self.config.train.products)
        if peak is not None:
            images_per_second = trained * rates["images_per_second"]
            flops = TRAINING_PASSES * flops_per_image(self.config.model) * images_per_second
            values["mfu"] = flops / (peak * 1e12 * self.layout.processes)
        if self.sums.skipped_steps:
            values["skipped_steps"] = self.sums.skipped_steps
        if self.config.model.experts and result is not None:
            values["expert_load"] = [[round(share, 5) for share in row] for row in result.load_LN.tolist()]
        values["sources"] = {
            name: {**progress[name]._asdict(), "skipped": self.ledger.total(name)} for name in progress
        }
        if self.report is not None:
            self.report.record(self.engine.step, values)
            self._tell_state(images_per_second=rates["images_per_second"])
        self.sums = Sums()

    def _save(self) -> Path:
        """Save a checkpoint; it is complete once the saver says so."""
        waited = self.saver.wait()
        self._tell_saved()
        if waited > SHORTEST_WAIT_LOGGED:
            self._say(
                f"step {self.engine.step}: training waited {waited:.1f} s for the last checkpoint to be written;"
                " raise train.checkpoint_every to avoid that"
            )
        self._count_skips()
        load_LN = self.engine.load_LN
        sums = {**self.sums.plain(), "skips": self.ledger.plain()}
        sums["expert_load"] = None if load_LN is None else load_LN.tolist()
        return self.saver.save(
            self.engine,
            self.images,
            sums,
            kept_in_checkpoint(self.config.plain()),
            self.dataset.facts,
            self.started_from,
        )

    def _count_skips(self) -> None:
        """Count what all data ranks skipped since the last time, which comes before every checkpoint.

        UserError on all ranks beyond a budget, or where ranks of one data rank skipped different samples.
        """
        rank = dist.get_rank()
        reads = self.layout.stage(rank) in (0, self.layout.pipe - 1)
        mine = (self.layout.data_rank(rank), self.unreported) if reads else None
        skips = skips_of_data_ranks(processes.gather_objects(mine))
        self.unreported = []
        for line in self.ledger.add(skips):
            self._say(line)

    def _tell_saved(self) -> None:
        """Say which checkpoint has become complete."""
        saved = self.saver.finished()
        if saved is not None:
            self._say(
                f"saved {saved.path}: copied in {saved.copy_seconds:.2f} s, written in {saved.write_seconds:.2f} s"
            )
            self._tell_state(checkpoint_step=step_of(saved.path), checkpoint_time=time.time())
        for problem in self.saver.problems():
            self._say(problem)

    def _tell_state(self, **changes: object) -> None:
        if self.state is not None:
            self.state.tell(step=self.engine.step, images=self.images, **changes)

    def _tell_rest(self) -> None:
        """Say what came after the last record, and so is in none."""
        waited = {name: seconds for name, seconds in self.clock.parts().items() if name in ("save", "preview")}
        if sum(waited.values()) > SHORTEST_WAIT_LOGGED:
            self._say("after the last record: " + ", ".join(f"{name} {s:.1f} s" for name, s in waited.items()))

    def _preview_if_due(self) -> None:
        """Draw the grid of fixed seeds and classes from the EMA, if it is time for one."""
        step, every = self.engine.step, self.config.preview.every
        if every is None or step % every:
            return
        self.heart.beat("evaluation", step, "draws a preview")
        with self.clock.part("preview"), self.engine.ema_weights() as network:
            picture = draw_preview(self.config, network, self.layout, self.dataset.index, self.device, step)
            with first_rank_works("shows a preview"):
                if self.report is not None and picture is not None:
                    save_picture(picture, self.folder.samples / f"preview-step-{step:08d}.png")
                    self.report.image("samples from the EMA", np.asarray(picture.convert("RGB")), step)

    def _say(self, message: str | None) -> None:
        if self.report is not None and message is not None:
            self.report.log(message)
