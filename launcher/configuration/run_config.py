"""The run configuration: one YAML file, composed of the sections that each folder declares."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ditmoe.data.stream.config import DataConfig
from ditmoe.launcher.configuration.checks import static_problems
from ditmoe.launcher.configuration.overrides import apply_overrides
from ditmoe.launcher.configuration.problems import problem_list
from ditmoe.launcher.configuration.sections import LaunchConfig, RunSection, TrainConfig
from ditmoe.launcher.configuration.validation import validate_sections
from ditmoe.model.config import EmaConfig, ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.outside.yaml_reader import read_yaml
from ditmoe.model.settings import LARGEST_SEED, NO_UNIT, Settings
from ditmoe.parallel.config import CheckpointConfig, OptimConfig, ParallelConfig
from ditmoe.sampling.settings.config import PreviewConfig


class RunConfig(Settings):
    """A run: every section of its configuration."""

    run: RunSection
    """Where the run's files go."""
    launch: LaunchConfig = LaunchConfig()
    """The processes on this machine."""
    model: ModelConfig
    """The network."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the network is trained to predict."""
    data: DataConfig
    """What training reads, and in which order."""
    parallel: ParallelConfig = ParallelConfig()
    """The grid of ranks, and which parts of the training state are sharded over it."""
    train: TrainConfig = TrainConfig()
    """How long training runs, its batch, and how often it reports and saves."""
    optim: OptimConfig = OptimConfig()
    """AdamW and the learning rate."""
    ema: EmaConfig = EmaConfig()
    """The average of the weights that sampling uses."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Which checkpoints are kept."""
    preview: PreviewConfig = PreviewConfig()
    """The grid of images drawn while training."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own settings, merged into the generated ones. Only the settings that docs/training.md lists
    are allowed: they do not change the loss curve."""
    seed: Annotated[int, NO_UNIT] = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of the initial weights, the order of the samples, and each sample's noise, timestep, label drop and
    flip."""

    def plain(self) -> dict[str, Any]:
        """The configuration as plain data, as config.yaml and checkpoints hold it."""
        return self.model_dump(mode="json")


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read a configuration file, apply dotted overrides such as `optim.lr=2e-4`, and check all of it.

    Raises:
        UserError: the file cannot be read, or something in it is wrong: every problem at once, a line each.
    """
    values, problems = read_yaml(path)
    values, override_problems = apply_overrides(RunConfig, values, overrides)
    problems += override_problems
    _name_run_folder(values, path)
    sections, section_problems = validate_sections(RunConfig, values)
    problems += section_problems + static_problems(sections)
    if problems:
        raise UserError(problem_list(str(path), problems))
    return RunConfig(**sections)


def _name_run_folder(values: dict[Any, Any], path: Path) -> None:
    """Name the run folder after the file where the configuration leaves it out."""
    if values.get("run") is None:
        values["run"] = {}
    section = values["run"]
    if isinstance(section, dict) and section.get("dir") is None:
        section["dir"] = str(Path("runs") / path.stem)
