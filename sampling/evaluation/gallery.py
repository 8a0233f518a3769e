"""A static page of an evaluation: its figures and settings, and a sheet of drawn images of each class."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.sampling.diagnostics.figures import chain_lines
from ditmoe.sampling.diagnostics.results import CHAINS_FILE

MOST_IMAGES: Final = 24
"""Images on a sheet."""
MEMORY: Final = 1 << 30
"""Bytes that the images of all sheets may take; with many classes of large images the sheets have fewer."""
_COLUMNS: Final = 8
_GAP: Final = 2
_SMALLEST: Final = 48
"""Side in pixels below which images are shown enlarged, by a whole factor."""

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { text-align: left; padding: .1rem 1.5rem .1rem 0; vertical-align: top }
th { font-weight: 500; color: #666 }
figure { display: inline-block; margin: 0 1.5rem 1.5rem 0; vertical-align: top }
figure img { max-width: 100% } figcaption { color: #666 } .warning { color: #a40 }
"""


class Sheets:
    """The first images of each class, as they come."""

    def __init__(self, class_names: Sequence[str], image_size: int, channels: int) -> None:
        self.class_names = tuple(class_names)
        room = MEMORY // (len(class_names) * image_size * image_size * channels)
        self.per_class = max(1, min(MOST_IMAGES, room))
        self._images: list[list[NDArray[np.uint8]]] = [[] for _ in class_names]

    def add(self, image_NHWC: NDArray[np.uint8], label_N: NDArray[np.int64]) -> None:
        """Take what is still wanted of these images."""
        for image_HWC, label in zip(image_NHWC, label_N, strict=True):
            images = self._images[label]
            if len(images) < self.per_class:
                images.append(image_HWC.copy())

    def sheet(self, label: int) -> Image.Image | None:
        """The images of a class side by side; None when there are none."""
        images = self._images[label]
        if not images:
            return None
        height, width, channels = images[0].shape
        factor = max(1, math.ceil(_SMALLEST / width))
        columns = min(_COLUMNS, len(images))
        rows = math.ceil(len(images) / columns)
        step_y, step_x = height * factor + _GAP, width * factor + _GAP
        canvas = np.full((rows * step_y - _GAP, columns * step_x - _GAP, channels), 255, dtype=np.uint8)
        for i, image_HWC in enumerate(images):
            top, left = i // columns * step_y, i % columns * step_x
            enlarged = image_HWC.repeat(factor, axis=0).repeat(factor, axis=1)
            canvas[top : top + height * factor, left : left + width * factor] = enlarged
        return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def write_gallery(folder: Path, sheets: Sheets, metrics: Mapping[str, Any], key: str) -> None:
    """Write `index.html` and `class-00003.png` for each class with images.

    Names of classes and of data come from archives: they are escaped in the page and are no part of a file's name.
    """
    make_folder(folder)
    result = metrics["results"][key]
    by_class = result.get("recogniser", {}).get("by_class", [None] * len(sheets.class_names))
    figures = []
    for label, name in enumerate(sheets.class_names):
        sheet = sheets.sheet(label)
        if sheet is None:
            continue
        file_name = f"class-{label:05d}.png"
        with replacing(folder / file_name) as file:
            sheet.save(file, "PNG")
        share = "" if by_class[label] is None else f" · recognised {by_class[label]:.1%}"
        figures.append(
            f'<figure><img src="{file_name}" width="{sheet.width}" height="{sheet.height}" loading="lazy" '
            f'alt="{html.escape(name)}"><figcaption>{label}: {html.escape(name)}{share}</figcaption></figure>'
        )
    with replacing(folder / "index.html") as file:
        file.write(_page(metrics, key, figures).encode())


def _page(metrics: Mapping[str, Any], key: str, figures: list[str]) -> str:
    evaluation, result = metrics["evaluation"], metrics["results"][key]
    shown = {
        key: value
        for key, value in result.items()
        if isinstance(value, (int, float)) or (value is None and key != "request")
    }
    if "recogniser" in result:
        judge = result["recogniser"]
        shown["recognised"] = judge["accuracy"]
        shown["recognised of held-out real images"] = judge["held_out_accuracy"]
    chains = ""
    if "chains" in result:
        told = "\n".join(html.escape(line) for line in chain_lines(result["chains"]))
        picture = f'<img src="{CHAINS_FILE}" alt="traces and samples of chains" style="max-width: 100%">'
        chains = f"<h2>Chains</h2><pre>{told}</pre>{picture if 'sigma' in result['chains'] else ''}"
    title = html.escape(f"{evaluation['id']}: {result['real']['name']}")
    warnings = "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in result["warnings"])
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        f"<h1>{html.escape(str(result['real']['name']))}</h1>\n"
        f"<h2>Figures</h2>{_table(shown)}{warnings}{chains}\n<h2>Drawn images</h2>\n"
        + "\n".join(figures)
        + f"\n<h2>Settings</h2>{_table(evaluation)}<h2>Feature network</h2>{_table(result['network'])}\n</html>\n"
    )


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{html.escape(key)}</th><td>{_cell(value)}</td></tr>" for key, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
