"""What the planner takes from a configuration: its workload, and its layout on a number of processes."""

from collections.abc import Callable
from dataclasses import replace

from pydantic import ValidationError

from ditmoe.launcher.configuration.checks import layout_problems
from ditmoe.launcher.configuration.resolve import layout_of
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.configuration.sections import TrainConfig
from ditmoe.launcher.local.processor import Choice, choose_precision
from ditmoe.model.count import count
from ditmoe.model.settings import message_of
from ditmoe.parallel.config import ParallelConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.memory import Workload
from ditmoe.parallel.planner.zero import ZeroSettings


def workload_of(config: RunConfig, recompute: bool | None = None, imbalance: float = 1.0) -> Workload:
    """What decides memory and traffic beside the layout.

    Args:
        config: with a complete model.
        recompute: whether blocks are computed again; None: as the configuration says.
        imbalance: the fullest expert rank gets this many times the mean.
    """
    zero = ZeroSettings.from_extra(config.deepspeed)
    if config.launch.device == "cpu":
        # The system gives memory only where something is written: of a bucket, the gradients that there are.
        zero = replace(zero, reduce_bucket=min(zero.reduce_bucket, count(config.model).total))
    assert config.train.precision != "auto", "of a run that starts it is chosen before, of a plan by `planned`"
    if recompute is None:
        recompute = config.parallel.activation_checkpointing
    experts = config.deepspeed.get("expert_parallel") or {}  # an empty section reads as null
    return Workload(
        config.train.precision,
        recompute,
        imbalance,
        zero,
        deep_ep=experts.get("comm_backend") == "deepep",
        stops_for_sizes=experts.get("async_split_plan") is False,
    )


def planned(config: RunConfig, device: str | None = None) -> tuple[RunConfig, str | None]:
    """A configuration as it is planned, with the number type that its `auto` would be, and a line on that.

    Args:
        device: the type that the run computes on; None: as it says, otherwise GPUs. A CPU is this machine's.
    """
    if config.train.precision != "auto":
        return config, None
    kind = device or ("cpu" if config.launch.device == "cpu" else "cuda")
    return with_choice(config, choose_precision(kind, config.model.hidden, config.parallel.zero))


def with_choice(config: RunConfig, choice: Choice) -> tuple[RunConfig, str]:
    """A configuration with the number type that its `auto` was found to be, and a line on that."""
    train = config.train.model_copy(update={"precision": choice.precision})
    line = f"train.precision = auto: {choice.precision}, for {choice.reason}"
    return config.model_copy(update={"train": train}), line


def legality(config: RunConfig) -> Callable[[Layout, Workload], list[str]]:
    """What `ditmoe train` would say to a layout of this configuration: nothing, if it can run."""
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}

    def problems(layout: Layout, workload: Workload) -> list[str]:
        try:
            parallel = ParallelConfig(
                pipe=layout.pipe,
                tensor=layout.tensor,
                expert=layout.expert,
                data=layout.data,
                zero=layout.zero,
                offload=layout.offload,
                activation_checkpointing=workload.recompute,
            )
        except ValidationError as error:
            return [f"parallel.{'.'.join(map(str, e['loc']))}: {message_of(e)}" for e in error.errors()]
        train: TrainConfig = config.train.model_copy(update={"micro_batch": layout.micro_batch})
        return layout_problems({**sections, "parallel": parallel, "train": train}, layout.processes)

    return problems


def own_layout(config: RunConfig, processes: int) -> Layout | list[str]:
    """The configuration's own layout on so many processes, or what keeps it from running there."""
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    problems = layout_problems(sections, processes)
    if problems:
        return problems
    data = processes // (config.parallel.pipe * config.parallel.tensor)
    parallel = config.parallel.model_copy(update={"data": data})
    train = config.train.model_copy(update={"micro_batch": config.train.micro_batch or config.train.batch // data})
    return layout_of(config.model_copy(update={"parallel": parallel, "train": train}))
