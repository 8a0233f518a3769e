"""What may be asked for: strictly typed, with every unknown field refused."""

from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.outside.text import counted
from ditmoe.sampling.evaluation.keeping import Keep
from ditmoe.sampling.integrators.samplers import planned_nfe, planned_passes
from ditmoe.sampling.metrics.reference import OnError
from ditmoe.sampling.service.errors import ServiceError, of_validation
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import FeatureName, ResizeName, StatedNetwork

LONGEST_CLASS: Final = 1000
"""Characters of a class's name."""
LARGEST_NUMBER: Final = 2**31 - 1
CHUNK: Final = 64
"""Images of a draw that are written, and are in the queue, at once; of long chains those of one."""
LONGEST_CHAIN: Final = 1024
"""Samples of a chain of a draw."""
ADAPTIVE_NFE: Final = 1000
"""What an image of rk45, which finds its own steps, counts for."""

_OTHERWISE: Final = {"n": ", or a job (POST /v1/jobs)", "count": ""}

ClassGiven = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)] | Annotated[str, Field(max_length=LONGEST_CLASS)]
RunName = Annotated[str, Field(min_length=1, max_length=255)]
Request = TypeVar("Request", bound=BaseModel)


class Asked(SamplerConfig):
    """What images and jobs have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    model: RunName | None = None
    """Name of the run; null where there is only one."""
    step: int | None = Field(default=None, ge=0)
    """Training step of the checkpoint; null: the newest."""
    weights: Literal["ema", "weights"] = "ema"
    """The moving average, or the weights themselves."""
    user: str = Field(default="", max_length=64)
    """Users take turns; without tokens, those of one address are told apart by this."""

    @field_validator("compile")
    @classmethod
    def _not_compiled(cls, compile: bool) -> bool:
        if compile:
            raise ValueError("the service draws images of many users in one pass, by code that is not compiled")
        return compile

    @model_validator(mode="before")
    @classmethod
    def _no_prompt(cls, given: Any) -> Any:
        if isinstance(given, dict) and "prompt" in given:
            raise ValueError("prompt: the networks draw classes, not texts; expected class or labels")
        return given

    def sampler_config(self) -> SamplerConfig:
        """What they are drawn by."""
        given = SamplerConfig.model_fields.keys() & self.model_fields_set
        return SamplerConfig.model_validate({name: getattr(self, name) for name in given})


class ImageRequest(Asked):
    """Images that are answered at once: OpenAI's form, with classes in place of the prompt."""

    n: int = Field(default=1, ge=1, le=LARGEST_NUMBER)
    """Images; left out where `labels` says how many."""
    first: int = Field(default=0, ge=0, le=LARGEST_NUMBER)
    """Number of the first image: image i depends on the seed, i and its class alone."""
    one_class: ClassGiven | None = Field(default=None, alias="class")
    """Number or name of the class of all images; null: the classes in turn."""
    labels: list[ClassGiven] | None = Field(default=None, min_length=1)
    """Number or name of the class of each image."""
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.labels is not None and self.one_class is not None:
            raise ValueError("class and labels: expected one of them")
        if self.labels is not None and "n" in self.model_fields_set and self.n != len(self.labels):
            raise ValueError(f"n = {self.n} with {len(self.labels)} labels: expected as many, or n left out")
        return self

    @property
    def count(self) -> int:
        """Images."""
        return self.n if self.labels is None else len(self.labels)


class JobKind(BaseModel):
    """What kind of a job is asked for."""

    model_config = ConfigDict(extra="ignore", strict=True)

    kind: Literal["draw", "evaluate"]


class JobRequest(Asked):
    """What jobs have in common."""

    count: int = Field(ge=1, le=LARGEST_NUMBER)
    """Images."""
    key: str | None = Field(default=None, min_length=1, max_length=128)
    """A name of the client's own: a request that comes again with it is the same job."""


class DrawJob(JobRequest):
    """Many images, with the bits that the images route gives them."""

    kind: Literal["draw"]
    one_class: ClassGiven | None = Field(default=None, alias="class")
    """As of images."""

    @model_validator(mode="after")
    def _check_chains(self) -> Self:
        if self.images_per_unit > LONGEST_CHAIN:
            raise ValueError(
                f"dlg.samples_per_chain = {self.images_per_unit:,}: draws hold whole chains; expected "
                f"{LONGEST_CHAIN:,} at most"
            )
        return self

    @property
    def chunk(self) -> int:
        """Images that are written as one: whole chains."""
        return max(1, CHUNK // self.images_per_unit) * self.images_per_unit


class EvaluationJob(JobRequest):
    """An evaluation, as `ditmoe evaluate` has it."""

    kind: Literal["evaluate"]
    labels: Literal["random", "balanced"] = "random"
    """Classes drawn at random, or in turn."""
    recogniser: bool = True
    """Also report the share that an independent classifier recognises."""
    features: FeatureName | Annotated[list[FeatureName], Field(min_length=1)] = "classifier"
    """Feature networks; those that come from a file are there where the service was started with theirs."""
    resize: ResizeName | None = None
    """How Inception-v3 gets its images."""
    reference: str | None = Field(default=None, min_length=1, max_length=255)
    """Name of what drawn images are compared with, as /v1/evaluators lists them; null: the run's images."""
    reference_network: StatedNetwork | None = None
    """What statistics in an npz file are of."""
    neighbour_images: int | None = Field(default=None, ge=8, le=LARGEST_NUMBER)
    """Real images that precision and recall look at."""
    on_error: OnError | None = None
    """Real images that cannot be used: stop, or skip."""
    keep: Keep = "chunks"
    """What is left of the images when all is scored."""

    @model_validator(mode="after")
    def _check_timestep(self) -> Self:
        if self.ddpm_timestep != "interpolate":
            raise ValueError("ddpm_timestep: evaluations have interpolate alone; expected it left out")
        if len(set(self.networks)) < len(self.networks):
            raise ValueError(f"features: {', '.join(self.networks)}: expected each once")
        if self.resize is not None and "inception" not in self.networks:
            raise ValueError("resize: goes with features inception; expected both, or neither")
        if self.reference_network is not None and self.reference is None:
            raise ValueError("reference_network: goes with reference; expected both, or neither")
        return self

    @property
    def networks(self) -> list[FeatureName]:
        """The feature networks."""
        return self.features if isinstance(self.features, list) else [self.features]


def parse_job(body: bytes) -> DrawJob | EvaluationJob:
    """A job from its JSON. ServiceError as `parse`."""
    if parse(JobKind, body).kind == "draw":
        return parse(DrawJob, body)
    return parse(EvaluationJob, body)


def options_of(config: SamplerConfig) -> list[str]:
    """A sampler as options of the command line; what is left out has its default."""
    options = []
    for name, value in config.model_dump(mode="json").items():
        option = f"--{name.replace('_', '-')}"
        if name == "ddpm_timestep":
            assert value == "interpolate"  # no option has it
        elif name == "dlg":
            options += [f"--dlg={key}={_word(each)}" for key, each in value.items()] if config.chains else []
        elif value is True:
            options.append(option)
        elif value is not None and value is not False:
            options.append(f"{option}={value}")
    return options


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def parse(kind: type[Request], body: bytes) -> Request:
    """A request from its JSON. ServiceError naming all fields that are wrong."""
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise of_validation(error, kind) from None


def passes_of(
    config: SamplerConfig, count: int, first: int = 0, objective: ObjectiveConfig | None = None
) -> float:
    """Rows of passes through the network that images are planned to take; guidance takes two each time.

    Evaluations whose blocks are extrapolated count too, as a tenth: nothing is free in such numbers.
    Of chains with all samples before the first that is asked for.
    """
    if not config.chains:
        return count * _passes_per_image(config, objective)
    samples = config.images_per_unit
    last_chain, last_place = divmod(first + count - 1, samples)
    whole = last_chain - first // samples
    return whole * _passes_of_chain(config, samples) + _passes_of_chain(config, last_place + 1)


def _passes_of_chain(config: SamplerConfig, samples: int) -> float:
    """Those of a chain that goes so far."""
    dlg = config.dlg.model_copy(update={"samples_per_chain": samples})
    return samples * _passes_per_image(config.model_copy(update={"dlg": dlg}))


def _passes_per_image(config: SamplerConfig, objective: ObjectiveConfig | None = None) -> float:
    if config.paced:
        assert objective is not None
        passes = planned_passes(config, objective)
        assert passes is not None
        return passes.full + passes.cached / 10
    nfe = planned_nfe(config)
    return (ADAPTIVE_NFE if nfe is None else nfe) * (1 if config.cfg_scale == 1 else 2)


def check_cost(
    count: int,
    config: SamplerConfig,
    objective: ObjectiveConfig,
    most_images: int,
    most_passes: int,
    field: str = "n",
    first: int = 0,
) -> None:
    """Refuse what is too much; the configuration is resolved. ServiceError."""
    if count > most_images:
        raise ServiceError(
            400,
            f"{field}: {counted(count, 'image')}; expected {most_images:,} at most{_OTHERWISE[field]}",
            param=field,
        )
    passes = passes_of(config, count, first, objective)
    if passes > most_passes:
        raise ServiceError(
            400,
            f"steps: {counted(count, 'image')} take {passes:,.0f} passes through the network; expected "
            f"{most_passes:,} at "
            f"most{_OTHERWISE[field]}",
            param="steps",
        )
