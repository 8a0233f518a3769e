"""Networks of ours in diffusers: a model and a pipeline for what its own classes cannot compute.

    from ditmoe.sampling.pipeline import DitmoePipeline

    pipeline = DitmoePipeline.from_pretrained("FOLDER")
    images = pipeline(class_labels=["cat"]).images

A folder that `ditmoe convert --to diffusers` wrote says which classes it takes. diffusers does not import a module
because a folder names it, so that this one has to be imported first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT


class DitmoeTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A network of ours; t is its own: 0 … 999 for DDPM, 0 … 1 for rectified flow."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        model: dict[str, Any],
        objective: str,
        class_names: list[str] | None = None,
        sample_size: int | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ) -> None:
        """Build the network.

        Args:
            model: the fields of a complete `ModelConfig`.
            objective: ddpm or rectified_flow.
            class_names: in the order of the labels.
            sample_size, in_channels, out_channels: of it, for pipelines that look for them.
        """
        super().__init__()
        self.network = DiT(ModelConfig.model_validate(model))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict from noisy images `[B, C, H, W]`; labels from `num_classes` on are the null class."""
        classes = self.network.config.num_classes
        assert classes is not None
        timestep_B = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1).expand(len(hidden_states))
        label_B = class_labels.reshape(-1).clamp(max=classes)
        prediction = self.network(hidden_states, timestep_B.float(), label_B).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


class DitmoePipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional images by a scheduler of diffusers, from any network of ours or diffusers' own DiT.

    Flow schedulers count time from 0 to `num_train_timesteps`; networks of ours are shown it from 0 to 1.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  # diffusers' name and form

    def __init__(
        self, transformer: Any, scheduler: Any, vae: Any = None, id2label: dict[str, str] | None = None
    ) -> None:
        """Put a pipeline together.

        Args:
            transformer: a `DitmoeTransformer2DModel` or `DiTTransformer2DModel`.
            scheduler: of diffusers.
            vae: decodes what the network draws; None: it draws pixels.
            id2label: number of a class, as text, → its name.
        """
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.labels = {name: int(label) for label, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image for each label.

        Args:
            class_labels: numbers, or names of `id2label`.
            guidance_scale: s of null + s·(class − null); 1: without guidance.
            output_type: pil, np (`[B, H, W, C]` in 0 … 1), pt (`[B, C, H, W]` in 0 … 1), or latent: undecoded.
            latents: standard normal noise to start from, in place of the generator's.

        Raises:
            ValueError: no such class, or a scheduler for another objective than the network's.
        """
        label_B = torch.tensor([self._label(each) for each in class_labels], device=self._execution_device)
        config, guided = self.transformer.config, guidance_scale != 1
        shape = (len(label_B), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(
                shape, generator=generator, device=self._execution_device, dtype=self.transformer.dtype
            )
        x_BCHW = latents.to(self._execution_device, self.transformer.dtype) * getattr(
            self.scheduler, "init_noise_sigma", 1.0
        )
        per_unit = self._set_timesteps(num_inference_steps)
        null_B = torch.full_like(label_B, self._classes)
        for t in self.progress_bar(self.scheduler.timesteps):
            input_BCHW = x_BCHW
            if hasattr(self.scheduler, "scale_model_input"):
                input_BCHW = self.scheduler.scale_model_input(x_BCHW, t)
            copies = 2 if guided else 1
            prediction = self.transformer(
                torch.cat([input_BCHW] * copies),
                timestep=(t / per_unit if per_unit != 1 else t)
                .reshape(1)
                .to(x_BCHW.device)
                .expand(copies * len(x_BCHW)),
                class_labels=torch.cat([label_B, null_B]) if guided else label_B,
            ).sample[:, : shape[1]]
            if guided:
                of_class, of_null = prediction.chunk(2)
                prediction = of_null + guidance_scale * (of_class - of_null)
            x_BCHW = self.scheduler.step(prediction, t, x_BCHW).prev_sample
        images = x_BCHW if output_type == "latent" else self._pictures(x_BCHW, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _classes(self) -> int:
        """Number of the classes, and label of the null class."""
        config = self.transformer.config
        held = config.model["num_classes"] if "model" in config else config.num_embeds_ada_norm
        return int(held)

    def _label(self, name: int | str) -> int:
        label = self.labels.get(name) if isinstance(name, str) else int(name)
        if label is None or not 0 <= label < self._classes:
            known = ", ".join(list(self.labels)[:20]) or f"0 to {self._classes - 1}"
            raise ValueError(f"{name!r} is no class of this network; expected one of {known}")
        return label

    def _set_timesteps(self, steps: int) -> float:
        """Prepare the scheduler; units of its time in one of the network's."""
        config = self.scheduler.config
        flow = (
            type(self.scheduler).__name__.startswith("FlowMatch")
            or config.get("prediction_type") == "flow_prediction"
        )
        objective = self.transformer.config.get("objective")
        if objective is not None and flow != (objective == "rectified_flow"):
            raise ValueError(f"{type(self.scheduler).__name__} is not for {objective}, which the network predicts")
        if type(self.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            # t in equal steps from 1 to 0, as `ditmoe sample` takes them.
            sigmas = np.linspace(1, 0, steps + 1)[:-1]
            self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=self._execution_device)
        else:
            self.scheduler.set_timesteps(steps, device=self._execution_device)
        return float(config.num_train_timesteps) if flow else 1.0

    def _pictures(self, x_BCHW: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            settings = self.vae.config
            shift = getattr(settings, "shift_factor", None) or 0.0
            x_BCHW = self.vae.decode(x_BCHW / settings.scaling_factor + shift).sample
        x_BCHW = (x_BCHW / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x_BCHW
        image_BHWC = x_BCHW.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(image_BHWC) if output_type == "pil" else image_BHWC
