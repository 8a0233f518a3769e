"""The Python of the pages runs as it is printed, on small stand-ins for the runs and weights that it names.

So do the cells of the notebooks, in their order.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe.launcher.commands.convert import command as convert
from ditmoe.model import presets
from ditmoe.model.canonical import canonical_state
from ditmoe.model.count import preset_config
from ditmoe.model.dit import DiT
from tests.sampling.small_run import write_digits, write_noise_classifier, write_photos, write_run

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(?:python|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVED = "service.client"
"""What asks a service, which tests/docs/test_walk.py starts as the page says."""
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def examples() -> list[Any]:
    """A page, and the text of one of its examples."""
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, text in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if SERVED not in text
    ]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small things under the names that the pages use."""
    folder = tmp_path_factory.mktemp("examples")
    write_run(folder / "runs" / "demo")
    write_photos(folder / "runs" / "photos")
    write_noise_classifier(folder / "runs" / "demo")
    write_digits(folder / "shards" / "photos")
    convert(folder / "runs" / "photos", folder / "mine-diffusers", to="diffusers")
    return folder


@pytest.mark.parametrize("text", examples())
def test_an_example_runs(text: str, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stand_ins)
    # A network of the size that a page loads takes gigabytes; a small one's weights have the same names.
    monkeypatch.setitem(presets.SIZES, "XL", (2, 32, 2))
    weights = stand_ins / "dit_moe_xl_8E2A.pt"
    if weights.name in text:
        torch.save(canonical_state(DiT(preset_config("DiT-XL/2-8E2A", 256))), weights)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small are slower on several, and far slower on a busy machine
    try:
        exec(compile(text, "example", "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(threads)


def test_pages_have_examples() -> None:
    assert {parameter.id.partition(".")[0] for parameter in examples()} >= {
        "sample",
        "dmcmc",
        "models",
        "data",
        "python",
    }


NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_cells_of_a_notebook_run_in_their_order(
    path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Jupyter: one namespace, and a cell that ends with an expression shows its value."""
    monkeypatch.chdir(stand_ins)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and all(
        not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"
    ), "outputs are not kept in the repository"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    try:
        for number, text in enumerate(cells):
            tree = ast.parse(text)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"{path.name}, cell {number}", "exec"), names)
            if last is not None:
                assert isinstance(last, ast.Expr)
                shown.append(
                    eval(compile(ast.Expression(last.value), f"{path.name}, cell {number}", "eval"), names)
                )
    finally:
        torch.set_num_threads(threads)
    assert all(value is not None for value in shown)
    assert {"Model", "Image", "tuple", "ndarray"} <= {type(value).__name__ for value in shown}
