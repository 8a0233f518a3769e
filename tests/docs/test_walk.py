"""Each page is followed, block after block, as a reader would who has nothing but the page: `make test-docs`.

Commands are shortened, never left out, but for those of the table in tests/docs/shortening.py.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docs.pages import pages
from tests.docs.shortening import LEFT_OUT, REPLACED, shortened, walked
from tests.docs.stand_ins import write_checkout, write_stand_ins
from tests.docs.walking import script_of, walk
from tests.slurm.cluster import Cluster, running, why_not

ON_A_CLUSTER = ("docs/slurm.md", "docs/cluster.md")
"""Pages whose jobs are submitted, to a Slurm of two virtual nodes; elsewhere `ditmoe submit` is a dry run."""
FROM_THE_START = ("README.md", "docs/photographs.md")
"""Pages for those who have a folder of photographs, and a VAE, and nothing else."""
CLONE_FIRST = ("README.md", "docs/installation.md")
MADE = {
    "docs/data.md": ("shards/photos",),
    "docs/training.md": ("shards/digits",),
    "docs/cluster.md": ("shards/photos",),
}
"""What a page makes itself of what others take for granted."""
WALKED = [page for page in pages() if script_of(page)[0].strip()]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, make_vae: Callable[..., Path]) -> Path:
    """A checkout with what pages take for granted."""
    folder = tmp_path_factory.mktemp("walk") / "ditmoe"
    write_checkout(folder)
    write_stand_ins(folder, make_vae)
    return folder


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster | str]:
    """The cluster, or why there is none."""
    if reason := why_not():
        yield reason
        return
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WALKED)
def test_a_page_can_be_followed(page: str, prepared: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "ditmoe"
    if page in FROM_THE_START:
        write_checkout(folder)
        for name in ("photos", "sd-vae"):
            shutil.copytree(prepared / name, folder / name)
    else:
        shutil.copytree(prepared, folder, symlinks=True)
    for name in MADE.get(page, ()):
        shutil.rmtree(folder / name)
    environment = {}
    if page in ON_A_CLUSTER:
        cluster = request.getfixturevalue("slurm")
        if isinstance(cluster, str):
            pytest.skip(cluster)
        environment = cluster.environment
    with tempfile.TemporaryDirectory(prefix="walk-") as helpers:  # a socket's path is short
        try:
            start = tmp_path if page in CLONE_FIRST else folder
            walk(page, start, folder, Path(helpers, "page"), environment, page in ON_A_CLUSTER)
        finally:
            for name in ("commands.txt", "output.txt"):
                if (told := Path(helpers, "page", name)).exists():
                    shutil.copy(told, tmp_path / name)


def test_every_page_with_commands_is_walked() -> None:
    assert {"README.md", "docs/training.md", "docs/data.md", "docs/service.md", "docs/slurm.md"} <= set(WALKED)


def test_the_table_is_needed() -> None:
    """What no page has any longer goes from the table too."""
    told = "\n".join(line for page in pages() for line in script_of(page)[1])
    for each in LEFT_OUT:
        assert each.reason in told, f"no page has {each.pattern} any longer"
    assert len({each.pattern for each in REPLACED}) == len(REPLACED)


def test_a_line_is_left_out_and_the_others_are_not() -> None:
    text, left = walked("README.md", "pip install x\nditmoe models\nditmoe plan CONFIG")
    assert text == "ditmoe models\nditmoe plan configs/dit-g-2-16e2a-512-64gpus.yaml"
    assert left == ["pip install x: fetches packages from the network"]
    _, left = walked("README.md", "ditmoe submit train x.yaml \\\n  --nodes 16 --gpus-per-node 8\nditmoe status")
    assert len(left) == 1 and left[0].startswith("ditmoe submit train x.yaml")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("evaluate r --count 50000 --processes 8", "evaluate r --count 24 --processes 1 --steps 2"),
        ("evaluate r --grid g.yaml", "evaluate r --grid g.yaml --processes 1"),
        ("train configs/demo.yaml parallel.tensor=2", "train configs/demo.yaml parallel.tensor=2 --dry-run"),
        ("submit evaluate r --count 9", "submit evaluate r --count 24 --steps 2 --dry-run"),
        ("sweep c.yaml --table", "sweep c.yaml --table"),
        ("models --all", "models --all"),
    ],
)
def test_commands_are_shortened(command: str, expected: str) -> None:
    assert shortened(command.split(), cluster=False) == expected.split()


def test_trainings_are_shortened() -> None:
    train = shortened(["train", "c.yaml", "train.steps=8000", "optim.lr=5e-4"], cluster=False)
    assert train[:3] == ["train", "c.yaml", "optim.lr=5e-4"] and "train.steps=4" in train
    sweep = shortened(["sweep", "c.yaml", "model.depth=2,4", "train.steps=500", "--dry-run"], cluster=False)
    assert "model.depth=2,4" in sweep and "model.depth=1" not in sweep and sweep[-1] == "--dry-run"
    assert "train.steps=4" in sweep and "train.steps=500" not in sweep
