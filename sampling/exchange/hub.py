"""Weights by their name on the Hugging Face hub, `org/name`: out of its cache, or downloaded where that can be.

What exists on the local disk always goes first. huggingface_hub keeps what it downloads below `HF_HOME`, and
`HF_HUB_OFFLINE=1` keeps it from looking any further; both are its own settings.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ditmoe.model.errors import UserError

WANTED: Final = (
    "model_index.json",
    "config.json",
    "scheduler/*.json",
    "transformer/*",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "*.safetensors",
    "*.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
"""Files of a repository that a network can be read from, and its VAE."""
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?:@[\w./-]{1,100})?")


def local_folder(source: Path) -> Path:
    """Where the weights lie that a path, or a hub's name such as `org/name` or `org/name@revision`, stands for.

    Raises:
        UserError: nothing has the path, and it is no name on the hub that can be had here; says what was tried.
    """
    name = str(source)
    if source.exists() or source.is_symlink() or not _NAME.fullmatch(name):
        return source
    repository, _, revision = name.partition("@")
    tried = [f"no file or folder has this path (in {Path.cwd()})"]
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode
    except ImportError:
        tried.append("it may be a name on the hub, for which huggingface_hub is not installed")
        raise UserError(f"{name}: {'; '.join(tried)}") from None
    try:
        return Path(_download(snapshot_download, repository, revision or None))
    except Exception as error:  # of the network, the hub, or the cache: dozens of classes
        text = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        tried.append(f"the hub's cache has no such name ({HF_HUB_CACHE})")
        tried.append("HF_HUB_OFFLINE forbids to ask the hub" if is_offline_mode() else f"the hub: {text}")
        raise UserError(f"{name}: {'; '.join(tried)}") from error


def _download(download: Callable[..., Any], repository: str, revision: str | None) -> str:
    """The folder of a snapshot: of the newest if the hub answers, else of what the cache has."""
    return str(download(repository, revision=revision, allow_patterns=list(WANTED)))
