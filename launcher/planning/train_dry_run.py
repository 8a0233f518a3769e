"""`ditmoe train --dry-run`: what a run would be, without starting it: grid, parameters, and memory of a rank."""

from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.stream.dataset import open_index
from ditmoe.launcher.configuration.resolve import layout_of, resolve, shown_yaml, start_of
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.planning.workload import workload_of
from ditmoe.launcher.processes import process_count
from ditmoe.model.count import count
from ditmoe.model.errors import UserError
from ditmoe.parallel.planner.estimate import fullest_stage
from ditmoe.parallel.planner.memory import RankMemory
from ditmoe.parallel.ranks import this_process
from ditmoe.parallel.stages import stage_blocks
from ditmoe.parallel.start.begin import check_start

_GIB = 2**30


def dry_run(raw: RunConfig, origin: str, *lines: str) -> str:
    """The text that `--dry-run` prints for a configuration, the lines among it.

    It needs neither the GPUs of a layout that the configuration spells out, nor the data of a network that says
    all of its input.

    Raises:
        UserError: something does not fit, or is not known without the data.
    """
    index, missing = _index(raw)
    config = resolve(raw, index, _processes(raw), origin)
    layout = layout_of(config)
    counts = count(config.model)
    stage, memory = largest_stage(config)
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimizer,
        "EMA": memory.ema,
        "activations": memory.activations,
        "buffers": memory.buffers,
        "peak": memory.peak,
    }
    where = f"each rank of stage {stage}, which needs most" if layout.pipe > 1 else "each rank"
    facts = "\n".join(
        [
            *missing,
            *(text for line in lines for text in (line, "")),
            *_start(config, index),
            "rank grid",
            layout.picture(config.model.experts, stage_blocks(config.model, layout.pipe)),
            "",
            "parameters",
            f"total      {counts.total:>15,}",
            f"activated  {counts.activated:>15,}",
            "",
            f"memory of {where}, GiB, as `ditmoe plan` counts it; the peak is the most at once, not the sum",
            *(f"{name:<11}{size / _GIB:>15.3f}" for name, size in rows.items()),
        ]
    )
    # As comments, so that all of the output is YAML.
    return shown_yaml(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in facts.splitlines())


def _start(config: RunConfig, index: DatasetIndex | None) -> list[str]:
    """What the run starts from, where that is not nothing."""
    start = start_of(config, () if index is None else index.class_names)
    lines = check_start(config.run.dir, start)
    return ["first weights", *lines, ""] if lines else []


def largest_stage(config: RunConfig) -> tuple[int, RankMemory]:
    """The pipeline stage of a resolved configuration that needs most memory, and what it needs."""
    return fullest_stage(config.model, layout_of(config), workload_of(config))


def _index(config: RunConfig) -> tuple[DatasetIndex | None, list[str]]:
    """The data's index; where it cannot be read and is not needed, None and the lines that say so."""
    try:
        return open_index(config.data.sources[0]), []
    except UserError as error:
        if not config.model.complete:
            raise
        return None, [f"without data: {error}", ""]


def _processes(config: RunConfig) -> int:
    """The processes that the layout asks for, where the configuration says no other number."""
    parallel = config.parallel
    if parallel.data is None or config.launch.processes is not None or this_process().started:
        return process_count(config.launch.processes, config.launch.device)
    return parallel.data * parallel.pipe * parallel.tensor
