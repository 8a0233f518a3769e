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
    """Path of index.json, if it is not in the folder, for example because that is read-only; null: the one in the
    folder."""
    weight: Annotated[float, NO_UNIT] = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources'."""
    classes: dict[str, str | int | None] = Field(default_factory=dict)
    """Maps a class of this source, by name or number, to a class of the first source, or to null: leave its
    samples out.

    A class that is not listed here becomes the first source's class of the same name."""
    min_score: Annotated[float | None, Unit("score, as the samples have it")] = None
    """Leave out samples with a lower quality score; null: take all."""
    max_samples: Annotated[int | None, Unit("samples")] = Field(default=None, ge=1, le=MOST_SAMPLES)
    """Use at most this many samples, chosen by the seed; null: all."""
    max_per_class: Annotated[int | None, Unit("samples")] = Field(default=None, ge=1, le=MOST_SAMPLES)
    """Use at most this many samples of each class, chosen by the seed; null: all."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens if a sample cannot be used. `stop`: the run stops. `skip`: another sample takes its place,
    up to `skip_budget`."""
    skip_budget: Annotated[int, Unit("samples")] = Field(default=1000, ge=0, le=MOST_SAMPLES)
    """How many samples may be skipped in one epoch of the source; one more stops the run."""
    retries: Annotated[int, Unit("tries")] = Field(default=5, ge=0, le=1000)
    """How often to retry fetching a remote shard, after waits of 1, 2, 4, … seconds, at most 60."""
    timeout: Annotated[float, Unit("seconds")] = Field(default=30.0, gt=0, le=86_400)
    """Seconds without a byte after which an attempt to fetch a shard is given up."""

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
    """What training reads, and in which order."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """The folders of shards. The classes of the first source are the run's."""
    window: Annotated[int | None, Unit("samples")] = Field(default=None, ge=1, le=10_000)
    """Every stretch of this many samples holds the sources' weights exactly; null: the shortest possible."""
    lanes: Annotated[int, Unit("readers")] = Field(default=64, ge=1, le=2**16)
    """The order of samples interleaves this many sequential readers, which are divided among ranks and workers;
    see docs/data.md."""
    shuffle: Annotated[int, Unit("samples")] = Field(default=1024, ge=1, le=2**24)
    """Neighbouring samples of a lane that are shuffled together; this limits how many shards are open at a
    time."""
    flip: bool = False
    """Mirror each image left to right with probability ½, drawn from (seed, position)."""
    workers: Annotated[int, Unit("processes")] = Field(default=1, ge=0, le=1024)
    """Processes per rank that read and decode; 0: the training process does it itself. The order of samples is
    the same."""
    vae: Path | None = None
    """The folder where the VAE of latents is now; null: where it was when they were encoded.

    Training, `sample`, `evaluate`, `serve` and `data synthesize` decode with it. The last four read this key
    from the run's config.yaml, where you may write it at any time."""
    cache: Path | None = None
    """Folder for remote shards while they are read; null: the system's folder for temporary files."""
