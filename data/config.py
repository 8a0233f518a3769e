"""Configuration of the training data (`data`)."""

from pydantic import Field

from ditmoe.model.settings import Settings


class SourceConfig(Settings):
    """One folder of shards."""

    path: str
    """Folder with `index.json`, as `ditmoe data pack` writes it."""


class DataConfig(Settings):
    """What is read, and in which order."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, max_length=1)
    """The folders of shards. One for now."""
    flip: bool = False
    """Mirror each image left to right with probability ½, drawn from (seed, position)."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Shards that are shuffled together; all of a run's shards are open for reading within this window."""
    workers: int = Field(default=1, ge=0)
    """Processes per rank that read and decode; 0: the training process itself. The order is the same."""
