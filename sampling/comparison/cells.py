"""A comparison of samplers: its configuration, and the cells that it is made of.

A cell is one evaluation: a sampler, alone or finishing the states of Denoising Langevin Gibbs chains, in as many
steps as a number of evaluations of the denoiser per image (NFE) pays for.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.outside.text import counted, exact_number
from ditmoe.model.settings import LARGEST_SEED, Settings, message_of
from ditmoe.sampling.evaluation.job import LabelSampling
from ditmoe.sampling.integrators.samplers import planned_nfe
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import CHAIN_PREFIX, IntegratorName, ScheduleName

PLAIN: Final = "plain"
"""The variant of a sampler without chains."""
_ADAPTIVE: Final = "rk45"
_NOT_OF_ONE_SAMPLER: Final = {
    "steps": "`nfe` sets them",
    "tolerance": "`tolerances` sets it",
    "dlg": "`chains` has the chains, for every sampler",
    "seed": "it is one for the whole comparison",
    "cache_interval": "`nfe` counts evaluations, and does not tell apart what is extrapolated",
    "cache_order": "it goes with cache_interval",
    "compile": "times of cells would not be of the same network",
}
_COMMON: Final = (
    "cfg_scale",
    "cfg_channels",
    "cfg_sigma_min",
    "cfg_sigma_max",
    "schedule",
    "precision",
    "tweedie",
    "ddpm_timestep",
    "seed",
)
_NAME: Final = re.compile(r"[\w.+-]+( [\w.+-]+)*")


class ComparedSampler(SamplerConfig):
    """One of the samplers: its name alone, or a mapping with more keys, which hold for it only."""

    sampler: IntegratorName
    """As in the configuration of a sampler, without `dlg:`."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"sampler": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _leave_lengths_to_the_comparison(self) -> Self:
        for key, reason in _NOT_OF_ONE_SAMPLER.items():
            if key in self.model_fields_set:
                raise ValueError(f"{key} is not for one sampler: {reason}")
        return self

    @property
    def label(self) -> str:
        """Its name, with what was set beside it: `kar2 (churn 20)`."""
        own = [f"{key} {_shown(getattr(self, key))}" for key in self._own_keys()]
        return f"{self.sampler} ({', '.join(own)})" if own else self.sampler

    @property
    def settings(self) -> dict[str, Any]:
        """What was set, as keys of a `SamplerConfig`."""
        return {key: getattr(self, key) for key in ("sampler", *self._own_keys())}

    def _own_keys(self) -> list[str]:
        return sorted(self.model_fields_set - {"sampler"})


class ChainVariant(DlgConfig):
    """Chains that every sampler finishes: settings of chains, and how an NFE is dealt out."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """In place of `skip`: this share of what is left of an NFE after the chain's start goes into steps of the
    chain, at least one of them, and the rest into finishing. Null: `skip` steps at every NFE."""

    @model_validator(mode="before")
    @classmethod
    def _check_given(cls, values: Any) -> Any:
        """Before a preset gives a `skip` of its own."""
        if isinstance(values, dict) and values.get("share") is not None and "skip" in values:
            raise ValueError(
                f"share = {values['share']} and skip = {values['skip']} are both given; expected one of them"
            )
        return values

    @model_validator(mode="after")
    def _check_initial(self) -> Self:
        if self.initial == _ADAPTIVE:
            raise ValueError(f"initial = {_ADAPTIVE}: what it costs is not known beforehand; expected another")
        return self

    def chains(self, skip: int | None = None) -> DlgConfig:
        """The settings of the chains, with another `skip` where one is given."""
        values = {name: getattr(self, name) for name in DlgConfig.model_fields}
        return DlgConfig.model_validate(values | ({} if skip is None else {"skip": skip}))


class ComparisonConfig(Settings):
    """What is compared: every sampler, alone and with every variant of chains, at every NFE."""

    count: int = Field(default=5000, ge=1, le=10**9)
    """Images of each evaluation."""
    labels: LabelSampling = "balanced"
    """Classes in turn, or drawn at random."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Of all images; of the first of several evaluations."""
    repeats: int = Field(default=1, ge=1, le=1000)
    """Evaluations of each cell, at `seed`, `seed` + 1, …: figures are then means, with how far seeds lie apart."""
    nfe: tuple[Annotated[int, Field(le=10**6)], ...] = ()
    """Evaluations per image to aim at, each at least 1: a sampler takes the most steps that cost no more."""
    tolerances: tuple[float, ...] = ()
    """What rk45 takes in place of `nfe`, each between 0 and 1."""
    samplers: tuple[ComparedSampler, ...] = Field(min_length=1)
    """Names, or mappings of `sampler` and further keys."""
    plain: bool = True
    """Each sampler alone."""
    chains: dict[str, ChainVariant] = Field(default_factory=dict)
    """Variants of chains by name."""
    cfg_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; 1: none."""
    cfg_channels: int | None = Field(default=None, ge=1, le=1024)
    """Channels that guidance acts on; null: all."""
    cfg_sigma_min: float = Field(default=0.0, ge=0)
    """Guidance acts at steps from a σ above this alone."""
    cfg_sigma_max: float | None = Field(default=None, gt=0)
    """Guidance acts at steps from a σ up to this alone; null: from any."""
    schedule: ScheduleName | None = None
    """Noise levels; null: each sampler's own choice."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's weights and arithmetic."""
    tweedie: bool = False
    """End every image with one more denoising at the smallest σ."""
    ddpm_timestep: Literal["interpolate", "nearest"] = "interpolate"
    """The timestep that a DDPM network gets between two of its levels."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = problems_between({name: getattr(self, name) for name in type(self).model_fields})
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def seeds(self) -> range:
        """Those of each cell."""
        return range(self.seed, self.seed + self.repeats)

    def sampler_config(self, sampler: ComparedSampler, chains: DlgConfig | None) -> SamplerConfig:
        """One of the samplers with what is common to all, alone or finishing chains."""
        return _joined({key: getattr(self, key) for key in _COMMON}, sampler, chains)


def _joined(common: Mapping[str, Any], sampler: ComparedSampler, chains: DlgConfig | None) -> SamplerConfig:
    """A sampler with what is common to all. pydantic's ValidationError where the two contradict each other."""
    values = {**common, **sampler.settings}
    if chains is not None:
        values |= {"sampler": f"{CHAIN_PREFIX}{sampler.sampler}", "dlg": chains}
    return SamplerConfig.model_validate(values)


def problems_between(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with keys of a `ComparisonConfig` that are valid by themselves: a line each.

    Args:
        values: those that are valid, by name.
    """
    problems = [f"nfe = {value}: expected numbers of at least 1" for value in values.get("nfe", ()) if value < 1]
    problems += [
        f"tolerances = {value:g}: expected numbers between 0 and 1"
        for value in values.get("tolerances", ())
        if not 0 < value < 1
    ]
    samplers: Sequence[ComparedSampler] = values.get("samplers", ())
    adaptive = [sampler.label for sampler in samplers if sampler.sampler == _ADAPTIVE]
    planned = [sampler.label for sampler in samplers if sampler.sampler != _ADAPTIVE]
    if planned and values.get("nfe") == ():
        problems.append(f"nfe is missing; expected what {planned[0]} is to aim at, such as [10, 20]")
    if adaptive and values.get("tolerances") == ():
        problems.append(f"tolerances is missing; expected those of {adaptive[0]}, such as [1e-2, 1e-3]")
    seen: dict[str, str] = {}
    for place, sampler in enumerate(samplers):
        same = sampler.label.replace("kar1", "heun")
        if same in seen:
            problems.append(f"samplers.{place} = {sampler.label}: is the same as {seen[same]}; expected it once")
        seen.setdefault(same, sampler.label)
    chains: Mapping[str, ChainVariant] | None = values.get("chains")
    problems += [
        f"chains.{name}: expected a name of letters, digits, spaces and . + - _, other than {PLAIN}"
        for name in chains or ()
        if not _NAME.fullmatch(name) or name == PLAIN
    ]
    if values.get("plain") is False and chains == {}:
        problems.append("plain = false without chains: nothing is left to compare; expected one of them")
    return problems + _contradictions(values)


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """What no sampler can be given, of what is common to all and what is its own: a line each."""
    common = {key: values[key] for key in _COMMON if key in values}
    variants: list[ChainVariant | None] = [*(values.get("chains") or {}).values()]
    found = []
    for place, sampler in enumerate(values.get("samplers", ())):
        for chains in [None, *variants] if values.get("plain", True) else variants:
            try:
                _joined(common, sampler, None if chains is None else chains.chains())
            except ValidationError as error:
                found += [f"samplers.{place}: {message_of(problem)}" for problem in error.errors()]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Cell:
    """One evaluation of a comparison."""

    sampler: str
    """Label of the sampler."""
    variant: str
    """`plain`, or the name of the chains."""
    targets: tuple[float, ...]
    """The NFE that it is the best for, or of rk45 the tolerance."""
    config: SamplerConfig
    """Resolved."""

    @property
    def name(self) -> str:
        """For people: `kar2, published, 7 steps`."""
        adaptive = self.config.integrator == _ADAPTIVE
        length = f"tolerance {self.config.tolerance:g}" if adaptive else counted(self.config.steps, "step")
        return f"{self.sampler}, {self.variant}, {length}"


def cells_of(comparison: ComparisonConfig, objective: ObjectiveConfig) -> tuple[list[Cell], list[str]]:
    """The cells, sampler by sampler and variant by variant, and a line for each that cannot be.

    Two targets that one number of steps is the best for are one cell.
    """
    cells: list[Cell] = []
    left_out: list[str] = []
    variants: dict[str, ChainVariant | None] = {PLAIN: None} if comparison.plain else {}
    variants |= comparison.chains
    for sampler in comparison.samplers:
        adaptive = sampler.sampler == _ADAPTIVE
        for variant, chains in variants.items():
            if adaptive and chains is not None and chains.share is not None:
                left_out.append(f"{sampler.label}, {variant}: its NFE is not known beforehand, to take a share of")
                continue
            found: list[Cell] = []
            for target in sorted(set(comparison.tolerances if adaptive else comparison.nfe)):
                config = comparison.sampler_config(sampler, None if chains is None else chains.chains())
                config = config.resolved(objective)
                if adaptive:
                    best: SamplerConfig | None = config.model_copy(update={"tolerance": target})
                elif chains is not None and chains.share is not None:
                    best = longest_with_share(config, chains, target)
                else:
                    best = longest(config, target)
                if best is None:
                    left_out.append(f"{sampler.label}, {variant}, NFE {target}: one step costs more")
                elif found and found[-1].config == best:
                    found[-1] = replace(found[-1], targets=(*found[-1].targets, target))
                else:
                    found.append(Cell(sampler.label, variant, (target,), best))
            cells += found
    return cells, left_out


def longest(config: SamplerConfig, nfe: float) -> SamplerConfig | None:
    """A resolved configuration with the most steps that cost no more than `nfe`; None: one step costs more."""

    def with_steps(steps: int) -> SamplerConfig:
        return config.model_copy(update={"steps": steps})

    def fits(steps: int) -> bool:
        return cost(with_steps(steps)) <= nfe

    if not fits(1):
        return None
    most, beyond = 1, math.floor(nfe) + 1  # a step is an evaluation at least
    while beyond - most > 1:
        middle = (most + beyond) // 2
        most, beyond = (middle, beyond) if fits(middle) else (most, middle)
    return with_steps(most)


def longest_with_share(config: SamplerConfig, variant: ChainVariant, nfe: float) -> SamplerConfig | None:
    """As `longest`, with the steps of the chain that `share` says; None: no step of each kind fits."""
    assert variant.share is not None
    walking = config.dlg.skip * config.dlg.thin
    finishing = cost(config.model_copy(update={"sampler": config.integrator, "dlg": DlgConfig()}))
    left = nfe - (cost(config) - walking - finishing)
    skip = max(1, math.floor(variant.share * left / config.dlg.thin))
    return longest(config.model_copy(update={"dlg": variant.chains(skip)}), nfe)


def cost(config: SamplerConfig) -> float:
    """The planned NFE of a resolved configuration that has one."""
    planned = planned_nfe(config)
    assert planned is not None, config.sampler
    # The start's share of an image is a fraction: what is whole in total shall not lose a step to its rounding.
    return round(planned, 9)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return exact_number(value) if isinstance(value, int | float) else str(value)
