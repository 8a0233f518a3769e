"""The grid of images that a run draws of itself while it trains, each with the name of its class."""

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from ditmoe.data.encoding.vae import find_vae, load_vae
from ditmoe.data.shards.images import to_uint8
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.processes import gather_objects
from ditmoe.sampling.drawing.generate import default_labels, generate_float
from ditmoe.sampling.drawing.picture import image_grid
from ditmoe.sampling.network.load import LoadedModel


def draw_preview(
    config: RunConfig, network: nn.Module, layout: Layout, index: DatasetIndex, device: torch.device, step: int
) -> Image.Image | None:
    """Draw the images of `config.preview`, each data rank its share; a collective call.

    Args:
        network: with the weights to draw from, in the layout that trains.
        index: of the data, for the class names and the VAE of latents.
        step: of the training, for the line over the picture.

    Returns:
        The picture on rank 0, None on the others.
    """
    preview = config.preview
    share = -(-preview.images // layout.data)
    first = layout.data_rank(dist.get_rank()) * share
    # Every data rank draws the same number: on many layouts the network is a collective call.
    mine = [min(number, preview.images - 1) for number in range(first, first + share)]
    # Loaded anew each time: between previews the memory belongs to training.
    vae = None if index.latents is None else load_vae(find_vae(index.latents, config.data.vae), device)
    loaded = LoadedModel(network, config.model, config.objective, index.class_names, None, "preview", vae)
    images_NCHW = generate_float(loaded, None, mine, preview.sampler, batch=share).image_NCHW
    gathered = gather_objects(to_uint8(images_NCHW).numpy())
    if dist.get_rank() != 0:
        return None
    of_first_stage = gathered[: layout.data * layout.tensor : layout.tensor]
    images_NHWC = np.concatenate(of_first_stage)[: preview.images].transpose(0, 2, 3, 1)
    labels = default_labels(range(preview.images), len(index.class_names)).tolist()
    return image_grid(
        images_NHWC,
        columns=min(8, preview.images),
        captions=[index.class_names[label] for label in labels],
        title=preview_title(config, step),
    )


def preview_title(config: RunConfig, step: int) -> str:
    """What is said over the pictures; what matters most comes first, for a long line is cut."""
    sampler = config.preview.sampler.resolved(config.objective)
    told = [f"step {step:,}", f"seed {sampler.seed}", "EMA", str(sampler.sampler)]
    if sampler.integrator != "rk45":
        told.append(f"{sampler.steps} steps")
    if sampler.cfg_scale != 1:
        told.append(f"guidance {sampler.cfg_scale:g}")
    return " · ".join(told)
