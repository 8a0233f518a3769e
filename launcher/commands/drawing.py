"""The options of every command that draws or scores images, declared once.

A command that is marked `@draws_images()` gets those of the sampler, in place of its argument `drawing`,
which holds what they were. They are named as the fields of `SamplerConfig`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from ditmoe.launcher.commands.shared_options import with_options
from ditmoe.sampling.settings.names import SAMPLE_STEPS, DiffusionForm, LastStep, SamplerName, ScheduleName

if TYPE_CHECKING:
    from ditmoe.sampling.settings.config import SamplerConfig

WeightsOption = Annotated[
    Literal["ema", "weights"], typer.Option(help="Use the moving average (EMA), or the weights themselves.")
]
StepOption = Annotated[
    int | None, typer.Option(min=0, help="Training step of the checkpoint. [default: the newest]")
]
VaeOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the VAE that decodes latents. [default: the run's data.vae, or where it was]"),
]

IndexOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder of the shards' index.json, if it is not with them."),
]
OnErrorOption = Annotated[
    Literal["stop", "skip"] | None,
    typer.Option(help="If a real image cannot be used: stop, or leave it out. [default: as the run did]"),
]
FeaturesOption = Annotated[
    str,
    typer.Option(
        metavar="NAME[,NAME…]",
        help="Feature networks: classifier (trained here on the real images), inception or dinov2 (from a file). "
        "Several share one pass over the images.",
    ),
]
FeaturesPathOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="[NAME=]FILE", help="The file of a feature network; repeat it for each one. See docs/evaluate.md."
    ),
]
ResizeOption = Annotated[
    Literal["pytorch-fid", "tensorflow"] | None,
    typer.Option(
        help="How images are resized for Inception-v3; see docs/evaluate.md. [default: depends on its file]"
    ),
]
ReferenceNetworkOption = Annotated[
    Literal["inception-tensorflow", "inception-pytorch-fid", "dinov2"] | None,
    typer.Option(
        help="The network that made an npz reference of mu and sigma; the file does not say. [default: inception]"
    ),
]
NeighbourImagesOption = Annotated[
    int | None,
    typer.Option(
        min=8, help="Real images used for precision and recall; ADM uses 10000. [default: all, up to 50000]"
    ),
]
SharedWeightsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where processes that draw on CPUs keep the copy of the weights that they share. "
        "[default: RUN/shared-weights, if there are several]",
    ),
]
ExpertParallelOption = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="E",
        help="Divide the experts among this many processes that draw together, if one cannot hold the network.",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(help="Folder of trained classifiers and statistics of real images. [default: ~/.cache/ditmoe]"),
]

_FewSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps of the sampler; rk45 chooses its own. [default: as many as it needs: "
        f"euler {SAMPLE_STEPS['euler']}, dpm-solver++ {SAMPLE_STEPS['dpm-solver++']}, …]",
    ),
]
_SAMPLER_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "sampler": (
        Annotated[
            SamplerName | None,
            typer.Option(
                help="See docs/sample.md. dlg:NAME draws with chains, see docs/dmcmc.md. [default: "
                "euler for flow runs, "
                "ddpm for DDPM runs]"
            ),
        ],
        None,
    ),
    "steps": (Annotated[int, typer.Option(min=1, help="Steps of the sampler; rk45 chooses its own.")], 250),
    "schedule": (
        Annotated[
            ScheduleName | None,
            typer.Option(
                help="Noise levels: the objective's own, or EDM's (karras). [default: own for euler, "
                "ddim, ddpm and sit-sde, else karras]"
            ),
        ],
        None,
    ),
    "ddim_eta": (
        Annotated[
            float, typer.Option(min=0, max=1, help="Fresh noise in each DDIM step: 0 none, 1 as much as ddpm.")
        ],
        0.0,
    ),
    "churn": (Annotated[float, typer.Option(min=0, help="S_churn of kar2: how much σ grows in a step.")], 80.0),
    "churn_min": (Annotated[float, typer.Option(min=0, help="S_tmin of kar2: a smaller σ does not grow.")], 0.1),
    "churn_max": (Annotated[float, typer.Option(min=0, help="S_tmax of kar2: a larger σ does not grow.")], 2.0),
    "churn_noise": (
        Annotated[float, typer.Option(min=0, help="S_noise of kar2: standard deviation of its noise.")],
        1.007,
    ),
    "tolerance": (Annotated[float, typer.Option(help="Error that rk45 allows in a step.")], 1e-5),
    "corrector_steps": (
        Annotated[
            int, typer.Option(min=0, help="Langevin steps of reverse-diffusion and euler-maruyama at each level.")
        ],
        0,
    ),
    "corrector_snr": (
        Annotated[float, typer.Option(help="Signal-to-noise ratio of the corrector's steps.")],
        0.16,
    ),
    "diffusion_form": (
        Annotated[DiffusionForm, typer.Option(help="Diffusion of sit-sde over time; see docs/sample.md.")],
        "sigma",
    ),
    "diffusion_norm": (Annotated[float, typer.Option(min=0, help="Size of that diffusion.")], 1.0),
    "last_step": (
        Annotated[LastStep, typer.Option(help="Last step of sit-sde: the mean of a step, or x ← D (tweedie).")],
        "mean",
    ),
    "last_step_size": (
        Annotated[float, typer.Option(help="Size of that last step, in SiT's time from 0 to 1.")],
        0.04,
    ),
    "tweedie": (
        Annotated[
            bool, typer.Option("--tweedie", help="End with x ← D(x, smallest σ), which costs one more evaluation.")
        ],
        False,
    ),
    "dlg": (
        Annotated[
            list[str],
            typer.Option(metavar="KEY=VALUE", help="A setting of chains, such as skip=10; may be repeated."),
        ],
        (),
    ),
    "cfg_scale": (
        Annotated[
            float,
            typer.Option(
                min=0, help="Scale of classifier-free guidance; 1 is none, anything else costs twice as much."
            ),
        ],
        1.0,
    ),
    "cfg_channels": (
        Annotated[
            int | None, typer.Option(min=1, help="Guide only this many channels, from the first. [default: all]")
        ],
        None,
    ),
    "cfg_sigma_min": (
        Annotated[float, typer.Option(min=0, help="Guide only steps that start above this σ.")],
        0.0,
    ),
    "cfg_sigma_max": (
        Annotated[
            float | None, typer.Option(help="Guide only steps that start at this σ or below. [default: any]")
        ],
        None,
    ),
    "cache_interval": (
        Annotated[
            int,
            typer.Option(min=1, help="Run the network's blocks only at every N-th step; extrapolate between."),
        ],
        1,
    ),
    "cache_order": (
        Annotated[int, typer.Option(min=0, help="Degree of that extrapolation; 0 repeats the last full step.")],
        1,
    ),
    "precision": (
        Annotated[Literal["fp32", "bf16"], typer.Option(help="Number type in which the network computes.")],
        "fp32",
    ),
    "compile": (
        Annotated[
            bool,
            typer.Option(
                "--compile", help="Let torch compile a block first, which takes a minute: for many images."
            ),
        ],
        False,
    ),
    "seed": (
        Annotated[
            int, typer.Option(min=0, help="Seed of the noise: image i depends only on (seed, i) and its class.")
        ],
        0,
    ),
}
"""Option → its type with its help, and its default."""


@dataclass(frozen=True)
class Drawing:
    """What the sampler's options were."""

    values: Mapping[str, Any]

    def config(self) -> "SamplerConfig":
        """The sampler. UserError naming every option that is out of range."""
        from ditmoe.sampling.settings.config import sampler_from_options

        given = {name: value for name, value in self.values.items() if name != "steps" or value is not None}
        return sampler_from_options(**given)

    def arguments(self) -> list[str]:
        """The options again, for a command line."""
        arguments = []
        for name, value in self.values.items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                arguments.append(option)
            elif isinstance(value, tuple):
                arguments += [f"{option}={part}" for part in value]
            elif value is not None and value is not False:
                arguments.append(f"{option}={value}")
        return arguments


def draws_images(*, few_steps: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the sampler's options where it has its argument `drawing`.

    Args:
        few_steps: the default is no number, and the command takes as many steps as its sampler needs
            (`SamplerConfig.for_a_look`).
    """
    options = {**_SAMPLER_OPTIONS, "steps": (_FewSteps, None)} if few_steps else _SAMPLER_OPTIONS
    return with_options(options, "drawing", Drawing)
