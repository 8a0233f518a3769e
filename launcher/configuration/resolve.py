"""A configuration with all that follows from the data and the number of processes filled in."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ditmoe.data.places.redaction import without_secrets
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.launcher.configuration.checks import check_data, run_checks, with_input_of
from ditmoe.launcher.configuration.problems import problem_list
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.model.errors import UserError
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.start.source import Start
from ditmoe.sampling.exchange.hub import local_folder


def resolve(
    config: RunConfig, index: DatasetIndex | None, processes: int, origin: str = "configuration"
) -> RunConfig:
    """Fill in what follows from the data and the number of processes, after checking that all of it fits.

    `model.{image_size,channels,num_classes}`, `parallel.data` and `train.micro_batch` are numbers afterwards.

    Args:
        index: of the data; None where they are not there and the model says all of its input.

    Raises:
        UserError: something does not fit: every problem at once, a line each.
    """
    values = {name: getattr(config, name) for name in type(config).model_fields}
    assert index is not None or config.model.complete
    filled = config.model if index is None else with_input_of(config.model, index)
    problems = run_checks({**values, "model": filled, "processes": processes})
    problems += [] if index is None else check_data(config.data, config.model, index)
    if problems:
        raise UserError(problem_list(origin, problems))
    data = processes // (config.parallel.pipe * config.parallel.tensor)
    micro_batch = config.train.micro_batch or config.train.batch // data
    return config.model_copy(
        update={
            "model": filled,
            "parallel": config.parallel.model_copy(update={"data": data}),
            "train": config.train.model_copy(update={"micro_batch": micro_batch}),
        }
    )


def layout_of(config: RunConfig) -> Layout:
    """The rank grid of a resolved configuration."""
    parallel, train = config.parallel, config.train
    assert parallel.data is not None and train.micro_batch is not None, "the configuration is not resolved"
    return Layout(
        pipe=parallel.pipe,
        data=parallel.data,
        expert=parallel.expert,
        tensor=parallel.tensor,
        zero=parallel.zero,
        offload=parallel.offload,
        micro_batch=train.micro_batch,
        accumulation=train.batch // (train.micro_batch * parallel.data),
    )


def start_of(config: RunConfig, class_names: Sequence[str] = ()) -> Start | None:
    """Where a resolved configuration has a new run start from; None: anew.

    Args:
        class_names: of the data, where they are known.
    """
    train = config.train
    if train.start_from is None:
        return None
    said = train.start_objective
    return Start(
        train.start_from,
        train.start_weights,
        said,
        config.model,
        config.objective,
        tuple(class_names),
        local_folder,
    )


def config_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every key written out, with the secrets of its sources."""
    return _yaml(config.plain())


def shown_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every key written out, for all to see."""
    return _yaml(without_secrets(config.plain()))


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)
