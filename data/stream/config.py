"""Configuration of the training data (`data`)."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from ditmoe.data.places.redaction import shown_place
from ditmoe.model.settings import NO_UNIT, Settings, Unit, check_path

MOST_SAMPLES: Final = 10**12


class SourceConfig(Settings):
    """One folder of shards, wherever it lies."""

    path: str = Field(min_length=1, max_length=8192)
    """The folder with `index.json` and the shards: a local path, `http(s)://…`, any other URL that fsspec knows
    (`s3://…`, `gs://…`), or `pipe:COMMAND {}`, a shell command that writes the file named `{}` to its output."""
    index: Path | None = None
    """An index.json elsewhere, for shards that lie where nothing can be written; null: in the folder."""
    weight: Annotated[float, NO_UNIT] = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources'."""
    classes: dict[str, str | int | None] = Field(default_factory=dict)
    """Class of this source, by name or number → class of the first source, or null: leave its samples out.

    A class that is not named here is the first source's class of the same name."""
    min_score: Annotated[float | None, Unit("score, as the samples have it")] = None
    """Leave out samples whose quality score is lower; null: take all."""
    max_samples: Annotated[int | None, Unit("samples")] = Field(default=None, ge=1, le=MOST_SAMPLES)
    """Use at most so many samples, chosen by the seed; null: all."""
    max_per_class: Annotated[int | None, Unit("samples")] = Field(default=None, ge=1, le=MOST_SAMPLES)
    """Use at most so many samples of each class, chosen by the seed; null: all."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens to a sample that cannot be used: the run stops, or another takes its place, up to a budget."""
    skip_budget: Annotated[int, Unit("samples")] = Field(default=1000, ge=0, le=MOST_SAMPLES)
    """Most samples that are skipped in one epoch of the source before the run stops."""
    retries: Annotated[int, Unit("tries")] = Field(default=5, ge=0, le=1000)
    """Times that fetching a remote shard is tried again, after 1, 2, 4, … seconds, at most 60."""
    timeout: Annotated[float, Unit("seconds")] = Field(default=30.0, gt=0, le=86_400)
    """Seconds without a byte after which fetching is given up, or tried again."""

    @field_validator("path")
    @classmethod
    def _check_folder(cls, path: str) -> str:
        """A path of this machine is one that its file system takes."""
        if "://" not in path and not path.startswith("pipe:"):
            check_path(path)
        return path

    @property
    def shown(self) -> str:
        """Its path for messages and files that others read: without secrets."""
        return shown_place(self.path)


class DataConfig(Settings):
    """What is read, and in which order."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """The folders of shards. The first one's classes are the run's."""
    window: Annotated[int | None, Unit("samples")] = Field(default=None, ge=1, le=10_000)
    """Samples over which the sources' weights hold exactly, in every stretch of so many; null: the fewest."""
    lanes: Annotated[int, Unit("readers")] = Field(default=64, ge=1, le=2**16)
    """Sequential readers that the order of samples is made of, dealt to ranks and workers; see docs/data.md."""
    shuffle: Annotated[int, Unit("samples")] = Field(default=1024, ge=1, le=2**24)
    """Neighbouring samples of a lane that are shuffled together; bounds the shards that are open at a time."""
    flip: bool = False
    """Mirror each image left to right with probability ½, drawn from (seed, position)."""
    workers: Annotated[int, Unit("processes")] = Field(default=1, ge=0, le=1024)
    """Processes per rank that read and decode; 0: the training process itself. The order is the same."""
    vae: Path | None = None
    """Folder in which the VAE of latents lies now; null: where it lay when they were encoded.

    Training, `sample`, `evaluate`, `serve` and `data synthesize` decode with it; the latter four read it from the
    run's config.yaml, where it may be written at any time."""
    cache: Path | None = None
    """Folder for remote shards while they are read; null: the system's folder for temporary files."""
