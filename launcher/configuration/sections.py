"""The launcher's own sections of the configuration: `run`, `launch` and `train`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ditmoe.model.outside.text import is_address
from ditmoe.model.settings import MOST_IMAGES, MOST_STEPS, Settings, Unit

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


class RunSection(Settings):
    """Where the run's files go."""

    dir: Path
    """The run folder, relative to the current directory; `runs/NAME` of `NAME.yaml` when left out.

    Repeating a command on an existing folder resumes its run."""

    @field_validator("dir")
    @classmethod
    def _check_dir(cls, path: Path) -> Path:
        if is_address(path):
            raise ValueError("is an address; expected a folder of this machine")
        return path


class LaunchConfig(Settings):
    """The processes that `ditmoe train` starts on this machine, or under srun on each node of one task."""

    processes: Annotated[int | None, Unit("processes")] = Field(default=None, ge=1, le=2**20)
    """Processes of a machine; null: one per GPU, or one where there is none. Under torchrun theirs count, and so
    do the tasks of srun where a node has several."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a GPU, otherwise the CPU."""
    check_memory: bool = True
    """Before anything starts, refuse a run that this machine's GPUs or memory cannot hold by the planner's count;
    false: start it all the same."""
    threads: Annotated[int | None, Unit("threads")] = Field(default=None, ge=1, le=4096)
    """Threads of each process; null: OMP_NUM_THREADS where it is set, otherwise cores / processes."""


class TrainConfig(Settings):
    """Length, batch and rhythm of training."""

    steps: Annotated[int, Unit("optimiser steps")] = Field(default=400_000, ge=1, le=MOST_STEPS)
    """Optimiser steps after which the run is complete."""
    start_from: Path | None = None
    """Weights that a new run starts from: a run (its newest checkpoint), a checkpoint, or a file, folder or name
    on the hub as `ditmoe convert` reads it (docs/fine-tuning.md). Weights and EMA both start from them; a resume
    ignores it."""
    start_weights: Literal["ema", "weights"] | None = None
    """Which set of them: the EMA or the weights themselves; null: the EMA if there is one."""
    start_objective: Literal["ddpm", "rectified_flow", "sit"] | None = None
    """What a published file was trained to predict, where it does not say so itself. `sit`: SiT's files, whose
    time is turned round."""
    batch: Annotated[int, Unit("images")] = Field(default=256, ge=1, le=MOST_IMAGES)
    """Images of one optimiser step, over all ranks and micro-steps."""
    micro_batch: Annotated[int | None, Unit("images")] = Field(default=None, ge=1, le=MOST_IMAGES)
    """Images that a rank computes at once; null: batch / data ranks, so no accumulation."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number type of the computation; the optimiser and the EMA are fp32 always."""
    skip_steps: Annotated[tuple[int, ...], Unit("optimiser steps")] = ()
    """Steps (from 1) that pass without an update: their samples are consumed and their number counts, and weights,
    moments and EMA stay as they are. For a step that is not finite whenever it is repeated."""
    log_every: Annotated[int, Unit("optimiser steps")] = Field(default=100, ge=1, le=MOST_STEPS)
    """Steps between two records of stats.jsonl, log.txt and the loggers."""
    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    """Where figures are shown besides: `tensorboard`, `wandb` (Weights & Biases), `mlflow` (docs/training.md). The
    last two are extras of the package."""
    log_samples: bool = False
    """Write the keys of each step's samples to samples.jsonl, in the global order: what the run has read."""
    checkpoint_every: Annotated[int, Unit("optimiser steps")] = Field(default=5_000, ge=1, le=MOST_STEPS)
    """Steps between two checkpoints; the last step and a stop by signal write one too."""
    peak_tflops: Annotated[float | None, Unit("TFLOP/s")] = Field(default=None, gt=0)
    """Peak TFLOP/s of one device in this precision, for the MFU; null: of known GPUs, otherwise no MFU."""
