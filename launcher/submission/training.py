"""The job of a training run: its configuration on so many tasks, checked by the planner before anything waits."""

from dataclasses import dataclass
from pathlib import Path

from ditmoe.data.places.redaction import has_secrets
from ditmoe.data.stream.dataset import open_dataset
from ditmoe.launcher.configuration.resolve import config_yaml, layout_of, resolve, start_of
from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.launcher.planning.train_dry_run import largest_stage
from ditmoe.launcher.planning.workload import planned
from ditmoe.launcher.submission.request import job_request
from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import expected_name
from ditmoe.model.outside.text import counted
from ditmoe.parallel.planner.estimate import Machine
from ditmoe.parallel.planner.gpus import GPUS
from ditmoe.parallel.stages import stage_blocks
from ditmoe.parallel.start.begin import check_start
from ditmoe.slurm.job_folder import training_folder
from ditmoe.slurm.submission.script import Request
from ditmoe.slurm.submission.settings import JobSettings

_GIB = 2**30


@dataclass(frozen=True)
class TrainingJob:
    """A training run as a job."""

    config: RunConfig
    """Resolved on the job's processes."""
    request: Request
    verdict: list[str]
    """What the planner says of it, a line each."""

    @property
    def config_text(self) -> str:
        """What the job trains."""
        return config_yaml(self.config)

    @property
    def private(self) -> bool:
        """Whether the configuration has secrets."""
        return has_secrets(self.config.plain())


def training_job(path: Path, overrides: list[str], settings: JobSettings) -> TrainingJob:
    """The job that trains a configuration.

    Raises:
        UserError: the configuration does not fit the data, the processes or the GPUs.
    """
    ranks = _ranks_of_node(path, overrides, settings)
    processes = settings.nodes * ranks
    origin = f"{path} on {counted(settings.nodes, 'node')} × {counted(ranks, 'process')}"
    raw = load_config(path, [*overrides, f"launch.processes={processes}"])
    dataset = open_dataset(raw.data, raw.seed)
    dataset.check_files()
    config = resolve(raw, dataset.index, processes, origin=origin)
    check_start(config.run.dir, start_of(config))
    device = "cuda" if settings.gpus_per_node else "cpu"
    if config.launch.device not in ("auto", device):
        raise UserError(
            f"launch.device = {config.launch.device} with --gpus-per-node {settings.gpus_per_node}: expected"
            f" {'GPUs' if device == 'cpu' else '0'}, or launch.device = auto"
        )
    # A node whose GPUs cannot be seen must not train on its CPUs, nor a job without GPUs on those of others.
    launch = config.launch.model_copy(update={"processes": ranks, "device": device})
    config = config.model_copy(update={"launch": launch})
    folder = training_folder(config.run.dir.absolute())
    arguments = ("train", "--", str(folder.config))
    request = job_request("train", arguments, folder, settings, config.run.dir.absolute())
    # The job's configuration leaves the number type to the nodes that it starts on.
    as_planned, line = planned(config)
    return TrainingJob(config, request, ([] if line is None else [line]) + _verdict(as_planned, settings))


def _ranks_of_node(path: Path, overrides: list[str], settings: JobSettings) -> int:
    """Ranks on each node: its tasks; or those that its only task starts."""
    if settings.tasks > 1:
        return settings.tasks
    # Whatever it is on one machine, it has to be known before the configuration can be checked on all of them.
    from ditmoe.launcher.configuration.overrides import apply_overrides
    from ditmoe.launcher.configuration.validation import validate_sections
    from ditmoe.model.outside.yaml_reader import read_yaml

    values, _ = read_yaml(path)
    values, _ = apply_overrides(RunConfig, values, overrides)
    sections, _ = validate_sections(RunConfig, values)
    launch = sections.get("launch")
    ranks = (None if launch is None else launch.processes) or settings.gpus_per_node or 1
    if settings.gpus_per_node and ranks > settings.gpus_per_node:
        raise UserError(
            f"launch.processes = {ranks} with --gpus-per-node {settings.gpus_per_node}: each process takes a GPU"
            f" of its own; expected at most {settings.gpus_per_node}, or launch.processes = null"
        )
    return ranks


def _verdict(config: RunConfig, settings: JobSettings) -> list[str]:
    """What the planner says of layout and memory. UserError where a rank's memory does not fit."""
    layout = layout_of(config)
    lines = [
        "rank grid",
        *layout.picture(config.model.experts, stage_blocks(config.model, layout.pipe)).splitlines(),
    ]
    stage, memory = largest_stage(config)
    need = f"memory: {memory.peak / _GIB:.1f} GiB on a rank of stage {stage}, as `ditmoe plan` counts it"
    if not settings.gpus_per_node:
        return [*lines, f"{need}; not checked: the job has no GPUs"]
    if settings.gpu in (None, "none"):
        return [*lines, f"{need}; not checked: neither --gpu nor the site file says which GPU it is"]
    if settings.gpu not in GPUS:
        raise UserError(f"--gpu {settings.gpu}: not known; {expected_name(settings.gpu, [*GPUS, 'none'])}")
    gpu = GPUS[settings.gpu]
    if not Machine(gpu).fits(memory):
        gpus = settings.nodes * settings.gpus_per_node
        raise UserError(
            f"a rank of stage {stage} needs {memory.peak / _GIB:.1f} GiB, and a GPU has {gpu.memory_gib:g}"
            f" ({gpu.name}), 92% of them for a run; expected a layout that fits, as"
            f" `ditmoe plan … --gpus {gpus} --gpu {settings.gpu}` lists them (--gpu none: no check)"
        )
    return [*lines, f"{need}, of {gpu.memory_gib:g} ({gpu.name}): it fits"]
