"""Small files under the names that pages take for granted: photographs, shards, runs, a VAE, published weights."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from PIL import Image

from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.weights.published import PublishedWeights, save_published
from tests.docs.pages import ROOT
from tests.docs.shortening import shortened
from tests.forked import run_forked
from tests.test_repository import text_files

LATENT: Final = ModelConfig(
    depth=1,
    hidden=16,
    heads=2,
    patch=2,
    experts=2,
    experts_per_token=1,
    image_size=8,
    channels=4,
    num_classes=1000,
    learn_sigma=True,
)
DENSE: Final = {"experts": 0, "experts_per_token": 0, "shared_experts": 0}
GRID: Final = {"count": 24, "repeats": 1, "nfe": [6], "tolerances": [0.1]}
"""What a shortened grid has in place of its own."""


def write_checkout(folder: Path) -> None:
    """A copy of this checkout, as a clone would be, with grids that take seconds."""
    for path in text_files():
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    for path in (folder / "configs/grids").glob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        values |= GRID | {"samplers": values["samplers"][:2]}
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")


def write_stand_ins(folder: Path, make_vae: Callable[..., Path]) -> None:
    """All files, in a checkout."""
    random = np.random.default_rng(0)
    for name in ("photos", "data/photos", "imagenet/train", "PHOTOS"):
        _write_photographs(folder / name, random)
    _write_tars(folder, random)
    (folder / "models").mkdir()
    make_vae(folder / "sd-vae")
    make_vae(folder / "models/sd-vae")
    _write_published(folder, random)
    _run(folder, "data", "pack", "digits", "shards/digits")
    _run(folder, "data", "pack", "photos", "shards/photos", "--image-size", "16")
    _run(folder, "train", "configs/demo.yaml")
    _run(folder, "train", "configs/photos.yaml")
    for name in ("a", "large", "mine", "shapes", "s-sweep/optim.lr=1e-4"):
        shutil.copytree(folder / "runs/demo", folder / "runs" / name)
    _run(folder, "convert", "dense.pt", "runs/dense", "--objective", "ddpm", "--vae", "sd-vae")
    _run(folder, "convert", "runs/dense", "sd-dit", "--to", "diffusers", "--stock")
    np.savez(folder / "samples.npz", arr_0=random.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8))


def _run(folder: Path, *arguments: str) -> None:
    asked = {"folder": str(folder), "environment": dict(os.environ), "arguments": shortened([*arguments], False)}
    done = run_forked([str(Path(__file__).with_name("within.py")), json.dumps(asked)], folder / "output")
    assert done.returncode == 0, (arguments, done.stderr)


def _write_photographs(folder: Path, random: np.random.Generator) -> None:
    for place, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(32):
            pixels = random.integers(100 * place, 100 * place + 99, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


def _write_tars(folder: Path, random: np.random.Generator) -> None:
    for name, label in (("imagenet", "cls"), ("laion", "json")):
        (folder / name).mkdir(exist_ok=True)
        for shard in range(2):
            with tarfile.open(folder / name / f"{shard:05}.tar", "w") as tar:
                for number in range(16):
                    picture = io.BytesIO()
                    pixels = random.integers(0, 256, (20, 16, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(picture, "jpeg")
                    facts = {"class": number % 2, "aesthetic": number / 16}
                    text = str(number % 2) if label == "cls" else json.dumps(facts)
                    for kind, data in (("jpg", picture.getvalue()), (label, text.encode())):
                        member = tarfile.TarInfo(f"{shard}{number:04}.{kind}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


def _write_published(folder: Path, random: np.random.Generator) -> None:
    """As test_first_row does: files of their publishers, which are far larger."""
    from tests.sampling.metrics.networks.test_inception import Scripted

    for name, config in (("dit_moe_s_8E2A.pt", LATENT), ("dense.pt", LATENT.model_copy(update=DENSE))):
        torch.manual_seed(0)
        network = DiT(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
        weights = PublishedWeights(config, canonical_state(network), None, ObjectiveConfig(kind="ddpm"))
        save_published(weights, folder / name)
    torch.jit.script(Scripted()).save(folder / "inception-2015-12-05.pt")
    moments: dict[str, Any] = {}
    for names, size in ((("mu", "sigma"), 2048), (("mu_s", "sigma_s"), 2023)):
        factor = random.normal(size=(30, size))
        moments |= dict(zip(names, (factor.mean(0), np.cov(factor, rowvar=False)), strict=True))
    images = random.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=images, **moments)
