"""A trained model in Python: `ditmoe.load(…).sample(…)`, which draws the images that `ditmoe sample` draws."""

import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from ditmoe.data.shards.images import to_pillow
from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import meant
from ditmoe.model.settings import message_of
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.parallel.start.source import Objective
from ditmoe.sampling.drawing.generate import Generated, check_finite, generate
from ditmoe.sampling.drawing.picture import image_grid
from ditmoe.sampling.exchange.hub import local_folder
from ditmoe.sampling.integrators.advice import sampler_warnings
from ditmoe.sampling.network.load import LoadedModel, Precision, Weights, load_model
from ditmoe.sampling.python.choices import Classes, Seeds, image_numbers, labels_of, seeds_of
from ditmoe.sampling.python.files import load_file
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import DiffusionForm, LastStep, SamplerName, ScheduleName


class SamplerSettings(TypedDict, total=False):
    """What else a sampler may be told, under the names of `ditmoe sample`."""

    schedule: ScheduleName | None
    ddim_eta: float
    churn: float
    churn_min: float
    churn_max: float
    churn_noise: float
    tolerance: float
    corrector_steps: int
    corrector_snr: float
    diffusion_form: DiffusionForm
    diffusion_norm: float
    last_step: LastStep
    last_step_size: float
    tweedie: bool
    cfg_channels: int | None
    cfg_sigma_min: float
    cfg_sigma_max: float | None
    cache_interval: int
    cache_order: int
    compile: bool
    dlg: Mapping[str, Any]


def load(
    source: str | PathLike[str],
    *,
    weights: Weights | None = None,
    step: int | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
    vae: str | PathLike[str] | None = None,
    preset: str | None = None,
    model: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
) -> "Model":
    """Read a trained model.

    Args:
        source: a run folder (its newest checkpoint), a checkpoint, a file or folder of diffusers that `ditmoe
            convert` reads or wrote, or a name on the hub such as facebook/DiT-XL-2-256.
        weights: `ema`, the moving average, or `weights` themselves; None: the average if there is one.
        step: the checkpoint of a run; None: the newest.
        device: where it computes; None: `cuda` if there is one, else `cpu`.
        precision: of the network's weights and arithmetic, `fp32` or `bf16`.
        vae: folder of the VAE of a network of latents; None: the one that encoded the data of the run, or lies in
            the pipeline of diffusers.
        preset: the network of a file whose weights do not say all of it, such as DiT-XL/2-8E2A.
        model: fields of its configuration that neither says, such as {"heads": 8, "experts_per_token": 2}.
        objective: what the network of a file predicts, where the file does not say it.

    Raises:
        ditmoe.UserError: it is not there, cannot be read or is damaged; the text says what is wrong.
    """
    path, decoder = local_folder(Path(source)), None if vae is None else Path(vae)
    place = _device(device)
    if path.is_dir() and ((path / MARKER).is_file() or (path / "checkpoints").is_dir()):
        for name, value in (("preset", preset), ("model", model), ("objective", objective)):
            if value is not None:
                raise UserError(f"{name} = {value}: {path} is a run or a checkpoint, which says it; expected None")
        return Model(load_model(path, weights or "ema", step, place, precision, decoder), Path(source))
    if not path.exists():
        raise UserError(f"{path}: not found; expected a run folder, a checkpoint, or a file of weights")
    if step is not None:
        raise UserError(f"step = {step}: {path} is no run, whose checkpoints have steps; expected None")
    loaded = load_file(path, weights, preset, model, objective, place, precision, decoder)
    return Model(loaded, Path(source))


class Model:
    """A network, and what it takes to draw with it."""

    def __init__(self, loaded: LoadedModel, source: Path) -> None:
        self.source = source
        """Where it was read from."""
        self._loaded = loaded

    @property
    def network(self) -> nn.Module:
        """The network itself, in evaluation mode: (x_BCHW, timestep_B, label_B) → prediction."""
        return self._loaded.network

    @property
    def config(self) -> ModelConfig:
        """The network's shape."""
        return self._loaded.model_config

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, in the order of their numbers."""
        return self._loaded.class_names

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of what it draws, in pixels."""
        _, height, width = self._loaded.image_shape
        return width, height

    @property
    def step(self) -> int | None:
        """The training step of its checkpoint; None: it was read from a file."""
        return None if self._loaded.info is None else self._loaded.info.step

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def __repr__(self) -> str:
        width, height = self.image_size
        name = self.config.published_name or f"{self.config.depth} blocks of width {self.config.hidden}"
        at = "" if self.step is None else f", step {self.step:,}"
        draws = f"{len(self.classes)} classes, {width}×{height}"
        return f"<ditmoe.Model {self.source}{at}: {name}, {draws}, {self.device}>"

    @overload
    def sample(
        self,
        classes: Classes | None = None,
        seed: Seeds = 0,
        *,
        output: Literal["pil"] = "pil",
        count: int | None = None,
        sampler: SamplerName | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        batch: int | None = None,
        progress: bool = False,
        **settings: Unpack[SamplerSettings],
    ) -> list[Image]: ...

    @overload
    def sample(
        self,
        classes: Classes | None = None,
        seed: Seeds = 0,
        *,
        output: Literal["numpy"],
        count: int | None = None,
        sampler: SamplerName | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        batch: int | None = None,
        progress: bool = False,
        **settings: Unpack[SamplerSettings],
    ) -> NDArray[np.uint8]: ...

    @overload
    def sample(
        self,
        classes: Classes | None = None,
        seed: Seeds = 0,
        *,
        output: Literal["torch"],
        count: int | None = None,
        sampler: SamplerName | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        batch: int | None = None,
        progress: bool = False,
        **settings: Unpack[SamplerSettings],
    ) -> Tensor: ...

    def sample(
        self,
        classes: Classes | None = None,
        seed: Seeds = 0,
        *,
        output: Literal["pil", "numpy", "torch"] = "pil",
        count: int | None = None,
        sampler: SamplerName | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        batch: int | None = None,
        progress: bool = False,
        **settings: Unpack[SamplerSettings],
    ) -> list[Image] | NDArray[np.uint8] | Tensor:
        """Draw images: the same, bit for bit, as `ditmoe sample` draws with these settings.

        Args:
            classes: names or numbers, one or several: "cat", 3, ["cat", 3], "cat,dog"; None: all, or 16 spread
                over them.
            seed: a number: image i is a function of it, of i and of its class alone. Several, as a list or a
                range: every class is drawn with each seed, seed after seed.
            output: `pil`: a list of Pillow images; `numpy`: uint8 `[N, H, W, C]`; `torch`: uint8 `[N, C, H, W]` on
                the CPU.
            count: images of one seed, which take the classes in turn; None: one of each class that is given.
            sampler: None: `ddpm` or `euler`, whichever goes with the model.
            steps: of the sampler; None: as many as it needs (docs/sample.md).
            guidance: the scale of classifier-free guidance; 1: none. `ditmoe sample` calls it `--cfg-scale`.
            batch: images drawn at once; None: 64, or all if they are fewer. At another size an image differs by
                rounding.
            progress: show a bar on standard error.
            settings: any other setting of the sampler (docs/sample.md).

        Raises:
            ditmoe.UserError: a class, a seed or a setting is none; all that are wrong of one kind at once.
        """
        if output not in ("pil", "numpy", "torch"):
            raise UserError(f"output = {output!r}: expected 'pil', 'numpy' or 'torch'")
        labels, seeds = labels_of(classes, self.classes), seeds_of(seed)
        one = seeds if isinstance(seeds, int) else 0
        few: dict[str, int] = {} if steps is None else {"steps": steps}
        config = _sampler(sampler=sampler, cfg_scale=guidance, seed=one, **few, **settings)
        self._check(config, seeds, count, batch)
        config = config.for_a_look(self._loaded.objective_config)
        for warning in sampler_warnings(config):
            print(f"warning: {warning}", file=sys.stderr)
        if isinstance(seeds, int):
            drawn = self._draw(config, labels, len(labels) if count is None else count, batch, progress, settings)
        else:
            drawn = self._draw_each(config, labels, seeds, batch, progress)
        if output == "numpy":
            return drawn.image_NHWC.numpy()
        if output == "torch":
            return drawn.image_NHWC.permute(0, 3, 1, 2).contiguous()
        return [to_pillow(image) for image in drawn.image_NHWC.numpy()]

    def _check(self, config: SamplerConfig, seeds: int | list[int], count: int | None, batch: int | None) -> None:
        """UserError where what is asked for does not go together."""
        channels = self._loaded.image_shape[0]
        if channels not in (1, 3):
            raise UserError(
                f"{self.source}: the network draws {channels} channels, and only 1 (grey) or 3 (RGB) make a"
                " picture; if they are latents, give their VAE: ditmoe.load(…, vae=FOLDER)"
            )
        for name, value in (("count", count), ("batch", batch)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"{name} = {value!r}: expected a whole number from 1 on")
        if isinstance(seeds, list) and count is not None:
            raise UserError(
                f"count = {count} with several seeds: each class is drawn with each seed; expected one"
            )
        if config.chains and isinstance(seeds, list):
            raise UserError(
                f"several seeds with sampler = {config.sampler}: images of chains have numbers and no seeds of"
                " their own; expected one seed, and count"
            )
        if config.chains and self._loaded.info is None:
            raise UserError(
                f"sampler = {config.sampler}: chains need the noise-level classifier of a run, and {self.source}"
                " is a file; expected a run or a checkpoint"
            )

    def _draw(
        self,
        config: SamplerConfig,
        chosen: list[int],
        count: int,
        batch: int | None,
        progress: bool,
        settings: SamplerSettings,
    ) -> Generated:
        """Images of one seed, which take the classes in turn."""
        if config.chains and "samples_per_chain" not in settings.get("dlg", {}):
            rows = -(-count // len(chosen))
            samples = min(rows, config.dlg.samples_per_chain)
            config = config.model_copy(
                update={"dlg": config.dlg.model_copy(update={"samples_per_chain": samples})}
            )
        labels = torch.tensor([chosen[image % len(chosen)] for image in range(count)])
        numbers = image_numbers(count, len(chosen), config.images_per_unit)
        with _Bar(count, progress) as bar:
            drawn = generate(self._loaded, labels, numbers, config, min(batch or 64, count), bar.show)
        check_finite(drawn.finite_N, numbers)
        return drawn

    def _draw_each(
        self, config: SamplerConfig, chosen: list[int], seeds: list[int], batch: int | None, progress: bool
    ) -> Generated:
        """Image 0 of each seed, of each class: `ditmoe sample --seeds`."""
        seed_of = [seed for seed in seeds for _ in chosen]
        count, labels, numbers = len(seed_of), torch.tensor(chosen * len(seeds)), [0] * len(seed_of)
        with _Bar(count, progress) as bar:
            drawn = generate(
                self._loaded, labels, numbers, config, batch or min(64, count), bar.show, seeds=seed_of
            )
        check_finite(drawn.finite_N, numbers)
        return drawn


def grid(
    images: Sequence[Image] | NDArray[np.uint8], columns: int | None = None, captions: Sequence[str] = ()
) -> Image:
    """One picture of many images, small ones enlarged.

    Args:
        images: as `Model.sample` gives them, Pillow images or an array; of one size.
        columns: images in a row; None: 8, or as many as there are captions.
        captions: over the columns.

    Raises:
        ditmoe.UserError: there are none, or they are of different sizes.
    """
    arrays = [np.asarray(image, dtype=np.uint8) for image in images]
    arrays = [array[:, :, None] if array.ndim == 2 else array for array in arrays]
    if not arrays or len({array.shape for array in arrays}) > 1:
        found = ", ".join(sorted({str(array.shape) for array in arrays})) or "none"
        raise UserError(f"images: {found} found; expected one image or more, all of one size")
    across = columns or len(captions) or min(8, len(arrays))
    if captions and len(captions) != across:
        raise UserError(f"captions: {len(captions)} found; expected one for each of the {across} columns")
    return image_grid(np.stack(arrays), across, captions)


def _device(wanted: str | torch.device | None) -> str:
    """The device's name, if this machine has it."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device = {wanted}: not usable here ({reason}); expected cpu, cuda or cuda:N") from None
    return str(wanted)


def _sampler(**values: Any) -> SamplerConfig:
    """The sampler of these settings. UserError naming all that are wrong."""
    try:
        return SamplerConfig.model_validate(values)
    except ValidationError as error:
        told = {"cfg_scale": "guidance"}
        lines = []
        for problem in error.errors():
            name = ".".join(told.get(str(part), str(part)) for part in problem["loc"])
            message = message_of(problem)
            if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
                message += meant(name, SamplerConfig.model_fields)
            lines.append(f"{name} = {problem['input']!r:.60}: {message}" if name else message)
        raise UserError("\n".join(lines)) from None


class _Bar:
    """A progress bar, or none."""

    def __init__(self, count: int, shown: bool) -> None:
        self._bar = tqdm(total=count, unit="image", dynamic_ncols=True, disable=not shown)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, drawn: int) -> None:
        """Be told of the images drawn so far."""
        self._bar.update(drawn - self._bar.n)
