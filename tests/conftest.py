"""Tests that need a GPU are skipped where there is none, and no test changes the environment of another."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.obedient import Obedient


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Puts the variables back: joining a process group in a test sets RANK and its kind."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_configure() -> None:
    """Processes that share out the tests share out the cores as well."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules and tests are millions of objects that stay, and no garbage collection goes through them.

    Collecting among them took a third of the time in which all tests are found, and most of each later collection.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu") is not None:  # a folder may be called that as well
                item.add_marker(skip)


_FIGURES = pytest.StashKey[list[tuple[str, str]]]()


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> list[tuple[str, str]]:
    """What a test adds, a name and a figure, is printed as a table at the end."""
    return pytestconfig.stash.setdefault(_FIGURES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(_FIGURES, [])
    if found:
        terminalreporter.section("figures")
        width = max(len(name) for name, _ in found)
        for name, figure in found:
            terminalreporter.line(f"{name:<{width}}  {figure}")


@pytest.fixture(scope="session")
def make_vae() -> Callable[..., Path]:
    """Saves a small AutoencoderKL of random weights to a folder: RGB, 4 latent channels, a side halved once."""

    def make(folder: Path, seed: int = 0, **config: object) -> Path:
        from diffusers import AutoencoderKL

        settings = {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "latent_channels": 4,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = AutoencoderKL(**{**settings, **config})
        network.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def vae_folder(make_vae: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small AutoencoderKL, not to be changed."""
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def obedient(monkeypatch: pytest.MonkeyPatch) -> "Obedient":
    """The crew of every command that leads one."""
    from tests.obedient import Obedient

    crew = Obedient()

    @contextmanager
    def leads(*arguments: Any, **options: Any) -> "Iterator[Obedient]":
        yield crew

    monkeypatch.setattr("ditmoe.launcher.local.crew_workers.leads_crew", leads)
    return crew
