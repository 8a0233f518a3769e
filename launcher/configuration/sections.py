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
    """The run folder, relative to the current directory. If left out: `runs/NAME` for a configuration
    `NAME.yaml`.

    If the folder exists, the command resumes its run."""

    @field_validator("dir")
    @classmethod
    def _check_dir(cls, path: Path) -> Path:
        if is_address(path):
            raise ValueError("is an address; expected a folder of this machine")
        return path


class LaunchConfig(Settings):
    """The processes that `ditmoe train` starts on this machine, or on each node if srun starts one task per
    node."""

    processes: Annotated[int | None, Unit("processes")] = Field(default=None, ge=1, le=2**20)
    """Processes on each machine; null: one per GPU, or one if there is no GPU. Ignored under torchrun, and
    under srun with several tasks per node: these set the number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if there is a GPU, otherwise the CPU."""
    check_memory: bool = True
    """Before anything starts, refuse a run that, by the planner's estimate, does not fit into this machine's
    GPUs or memory; false: start it anyway."""
    threads: Annotated[int | None, Unit("threads")] = Field(default=None, ge=1, le=4096)
    """Threads of each process; null: OMP_NUM_THREADS if it is set, otherwise cores / processes."""


class TrainConfig(Settings):
    """How long training runs, its batch, and how often it reports and saves."""

    steps: Annotated[int, Unit("optimiser steps")] = Field(default=400_000, ge=1, le=MOST_STEPS)
    """Optimiser steps after which the run is complete."""
    start_from: Path | None = None
    """Weights that a new run starts from: a run (its newest checkpoint), a checkpoint, or anything that
    `ditmoe convert` reads: a file, a folder or a name on the hub (docs/fine-tuning.md). Both the weights and
    the EMA start from them. A resumed run ignores this key."""
    start_weights: Literal["ema", "weights"] | None = None
    """Which weights of `start_from` to take: the EMA or the weights themselves; null: the EMA if there is
    one."""
    start_objective: Literal["ddpm", "rectified_flow", "sit"] | None = None
    """What the network in a published file was trained to predict, if the file does not say so itself. `sit`:
    for SiT's files, whose time runs backwards."""
    batch: Annotated[int, Unit("images")] = Field(default=256, ge=1, le=MOST_IMAGES)
    """Images of one optimiser step, over all ranks and micro-steps."""
    micro_batch: Annotated[int | None, Unit("images")] = Field(default=None, ge=1, le=MOST_IMAGES)
    """Images that a rank computes at once; null: batch / data ranks, so no accumulation."""
    precision: Literal["auto", "fp32", "bf16"] = "bf16"
    """Number type of the computation; the optimiser and the EMA are always fp32. `auto`: where a new run starts,
    bf16 on GPUs, and on a CPU that has instructions for it, from `model.hidden` = 96 on; otherwise fp32, and so
    with `parallel.zero` = 0. The log says why, config.yaml says which, and a resume keeps it on any machine."""
    tf32: bool = True
    """On GPUs: round the factors of fp32 products to TF32 (10 bits of fraction; sums stay fp32). Tensor cores
    multiply them up to 8 times as fast, and TF32 is more exact than bf16. false: fp32 throughout."""
    emulated_bf16: bool = False
    """Allow bf16 on a CPU without instructions for it (AMX, AVX512-BF16 or Arm's BF16), where training is 44 to
    500 times slower than in fp32. false: such a run is refused."""
    compile: bool = False
    """At each start, let torch compile one block of the network; all blocks use its code. This takes about a
    minute, which the log states, and needs a C++ compiler (on GPUs triton and a C compiler). docs/performance.md
    says what is gained. Not with `parallel.zero` = 3 or `parallel.tensor` > 1."""
    skip_steps: Annotated[tuple[int, ...], Unit("optimiser steps")] = ()
    """Steps (counted from 1) that pass without an update: they consume their samples and count as steps, but
    weights, moments and EMA stay as they are. Meant for a step whose loss is not finite whenever it is
    repeated."""
    log_every: Annotated[int, Unit("optimiser steps")] = Field(default=100, ge=1, le=MOST_STEPS)
    """Steps between two records of stats.jsonl, log.txt and the loggers."""
    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    """Where figures are shown, besides the log: `tensorboard`, `wandb` (Weights & Biases), `mlflow`
    (docs/training.md). The last two are optional extras of the package."""
    profile: Annotated[int | None, Unit("optimiser steps")] = Field(default=None, ge=1, le=100)
    """Steps to profile, beginning three steps after each start. A table and a timeline (also in the loggers) and
    traces in the run's `profile/` show where their time goes (docs/profiling.md). null: none."""
    log_samples: bool = False
    """Write the keys of each step's samples to samples.jsonl, in the global order, to record what the run has
    read."""
    checkpoint_every: Annotated[int, Unit("optimiser steps")] = Field(default=5_000, ge=1, le=MOST_STEPS)
    """Steps between two checkpoints; the last step and a stop by signal write one too."""
    peak_tflops: Annotated[float | None, Unit("TFLOP/s")] = Field(default=None, gt=0)
    """Peak TFLOP/s of one device in this precision, for the MFU; null: that of the GPU if it is known, otherwise
    no MFU."""

    @property
    def products(self) -> Literal["fp32", "tf32", "bf16"]:
        """Number type of what a GPU multiplies."""
        assert self.precision != "auto", "not yet chosen"
        return "tf32" if self.precision == "fp32" and self.tf32 else self.precision
