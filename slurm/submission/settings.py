"""What a job asks of Slurm: the keys of the site file, each of which an option of `ditmoe submit` overrides."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ditmoe.model.outside.text import counted
from ditmoe.slurm.job_folder import PHASES
from ditmoe.slurm.submission.values import (
    duration_seconds,
    one_line,
    raw_option,
    time_limit_seconds,
)

LONGEST_PREAMBLE: Final = 2**16
USUAL_WARNING: Final = 300
"""Seconds; less where the time limit is short."""


def _text(value: Any) -> Any:
    """YAML reads `time: 60` as a number."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _checked(check: Callable[[str], object]) -> AfterValidator:
    def checked(text: str) -> str:
        check(text)
        return text

    return AfterValidator(checked)


def _matching(pattern: str, expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f"expected {expected}")
        return text

    return AfterValidator(check)


Line = Annotated[str, BeforeValidator(_text), AfterValidator(one_line)]
TimeLimit = Annotated[str, BeforeValidator(_text), _checked(time_limit_seconds)]
Duration = Annotated[str, BeforeValidator(_text), _checked(duration_seconds)]
Memory = Annotated[
    str,
    BeforeValidator(_text),
    _matching(r"\d{1,12}[KMGT]?", "MiB, or a number with K, M, G or T; 0: all that a node has"),
]
Word = Annotated[str, BeforeValidator(_text), _matching(r"[A-Za-z0-9._-]{1,100}", "one plain word")]


def _raw(options: dict[str, Any]) -> dict[str, Any]:
    for key, value in options.items():
        raw_option(key)
        if isinstance(value, str):
            try:
                one_line(value)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    return options


_KEPT_NAMES: Final = (
    "PYTHONPATH",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def _environment(variables: dict[str, Any]) -> dict[str, Any]:
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise ValueError(f"{name!a} is no name of a variable; expected letters, digits and _")
        if name in _KEPT_NAMES or name.startswith(("SLURM_", "DITMOE_")):
            raise ValueError(f"{name} is set for each job and task; expected it left out")
        if not isinstance(value, str) or value:
            one_line(str(value))
    return variables


def _preamble(text: str) -> str:
    for line in text.split("\n"):
        if line.strip():
            one_line(line.replace("\t", " "))
    if len(text) > LONGEST_PREAMBLE:
        raise ValueError(f"expected at most {LONGEST_PREAMBLE:,} characters")
    return text


def _mounts(mounts: tuple[str, ...]) -> tuple[str, ...]:
    for mount in mounts:
        parts = mount.split(":")
        if not 1 <= len(parts) <= 3 or not all(part.startswith("/") for part in parts[:2]) or "," in mount:
            raise ValueError(f"{mount!a}: expected /FOLDER, /FOLDER:/WITHIN or /FOLDER:/WITHIN:ro")
    return mounts


def _limits(limits: dict[str, str]) -> dict[str, str]:
    for phase in limits:
        if phase not in PHASES:
            raise ValueError(f"{phase!a} is no phase; expected {', '.join(PHASES)}")
    return limits


class JobSettings(BaseModel):
    """What a job asks for. The site file gives defaults; options of the same names come before it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    nodes: int = Field(default=1, ge=1, le=2**17)
    """Nodes."""
    gpus_per_node: int = Field(default=0, ge=0, le=1024)
    """GPUs of each node; 0: a job on CPUs."""
    tasks_per_node: int | None = Field(default=None, ge=1, le=4096)
    """Processes that srun starts on each node; null: one per GPU, or one. A single task of a node starts its own
    ranks: `launch.processes` of the configuration, or one per GPU."""
    time: TimeLimit | None = None
    """Time limit of one attempt, as sbatch takes it: minutes, HH:MM:SS, D-HH:MM:SS; null: the partition's."""
    partition: Line | None = None
    """Partition, or several with commas between."""
    account: Line | None = None
    """Account that is charged."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have."""
    mem: Memory | None = None
    """Memory of each node, such as 64G; 0: all that it has."""
    cpus_per_task: int | None = Field(default=None, ge=1, le=4096)
    """CPUs of each task."""
    gpu: Line | None = None
    """Kind of GPU that memory is planned for: a name that `ditmoe plan --gpu` takes; null or none: no check."""
    gpu_type: Word | None = None
    """How the cluster calls that kind, where it must be named: `--gpus-per-node=TYPE:8`."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: `--gpus-per-node=8`, `--gres=gpu:8` (older clusters), or none: nodes come whole."""
    sbatch: Annotated[dict[str, bool | int | str | None], AfterValidator(_raw)] = Field(default_factory=dict)
    """Other options of sbatch by their long names; true or null: an option without a value; false: not given."""
    container: Line | None = None
    """Image that tasks run in: a file, or an address that the runtime takes; null: no container."""
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """`apptainer exec` before each task, or the options that the Pyxis plugin gives to srun."""
    container_mounts: Annotated[tuple[Line, ...], AfterValidator(_mounts)] = ()
    """Folders to be seen in the container, beside the run and the working directory: /DATA or /DATA:/WITHIN."""
    container_python: Line = "python3"
    """The Python within the container; it has what ditmoe needs, while ditmoe itself comes from the job folder."""
    python: Line | None = None
    """The Python of the job, outside of containers; null: the one that submits."""
    environment: Annotated[dict[str, str | int], AfterValidator(_environment)] = Field(default_factory=dict)
    """Variables that the script sets."""
    preamble: Annotated[str, AfterValidator(_preamble)] = ""
    """Lines of shell that run before the job, such as `module load cuda`; the script has them as they are."""
    warning: int | None = Field(default=None, ge=1, le=65535)
    """Seconds before the time limit at which the job is told to save and go on in another attempt; null: 300, or a
    quarter of the time limit where that is less."""
    limits: Annotated[dict[str, Duration], AfterValidator(_limits)] = Field(default_factory=dict)
    """How long a rank may show no sign of life in each phase (start 30m, step 10m, save 30m, evaluation 2h) before
    it counts as hung."""
    attempts: int = Field(default=3, ge=1, le=1000)
    """Attempts in a row that may bring no new checkpoint, after which the job stops."""
    check: bool = True
    """Whether each attempt begins with a check of its nodes."""
    chain: int = Field(default=1, ge=1, le=1000)
    """Jobs that are submitted at once, each after the end of the one before: for clusters where a job cannot ask
    to be queued again."""

    @property
    def tasks(self) -> int:
        """Tasks of a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def warning_seconds(self) -> int:
        """Seconds before the time limit at which the job is warned."""
        if self.warning is not None:
            return self.warning
        limit = time_limit_seconds(self.time) if self.time is not None else None
        return USUAL_WARNING if limit is None else max(1, min(USUAL_WARNING, limit // 4))

    @property
    def limit_seconds(self) -> dict[str, float]:
        """Phase → seconds without a sign of life after which a rank counts as hung."""
        return {
            phase: duration_seconds(self.limits[phase]) if phase in self.limits else seconds
            for phase, seconds in PHASES.items()
        }


def contradictions(settings: JobSettings) -> list[str]:
    """What two of the settings say against each other, a line each, by the options' names."""
    problems = []
    limit = time_limit_seconds(settings.time) if settings.time is not None else None
    if limit is not None and settings.warning is not None and settings.warning >= limit:
        problems.append(
            f"--warning {settings.warning} with --time {settings.time}: the warning would come before the start;"
            f" expected less than the {limit} s of the time limit"
        )
    if settings.gpus_per_node and settings.tasks > settings.gpus_per_node:
        problems.append(
            f"--tasks-per-node {settings.tasks} with --gpus-per-node {settings.gpus_per_node}: each task takes a"
            f" GPU of its own; expected at most {counted(settings.gpus_per_node, 'task')}"
        )
    return problems
