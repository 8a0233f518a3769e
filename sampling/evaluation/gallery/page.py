"""A static page of an evaluation: figures in words, drawn images beside real ones, and what is nearest to them.

It asks nothing of any other place, has no scripts, and is read on a phone, in the dark, and by a screen reader.
"""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

from PIL import Image

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.sampling.diagnostics.figures import chain_lines
from ditmoe.sampling.diagnostics.results import CHAINS_FILE
from ditmoe.sampling.evaluation.gallery.real import NEIGHBOURS_FILE, Compared, RealSide, write_neighbours
from ditmoe.sampling.evaluation.gallery.sheets import Sheets, sheet_of
from ditmoe.sampling.evaluation.gallery.words import figure_words
from ditmoe.sampling.evaluation.row import guidance_interval_told, sampler_told

_STYLE: Final = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1d2127; --soft: #565e69; --line: #d5d9df;
  --card: #f5f6f8; --link: #1c5aa8; --warning: #8f3d00 }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --ink: #e7e9ec; --soft: #a9b1bb;
  --line: #363c44; --card: #1e2228; --link: #8ab8f5; --warning: #f0a875 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink);
  background: var(--ground); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 0 0 .5rem }
p { margin: .4rem 0; max-width: 46rem }
a { color: var(--link) }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .6rem 0 }
nav a { display: inline-block; padding: .3rem 0 }
.soft { color: var(--soft) }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
.warning { color: var(--warning) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .8rem;
  margin: 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem }
.card dt { color: var(--soft) }
.card dd { margin: 0 }
.card .value { font-size: 1.6rem; line-height: 1.2; margin: .1rem 0 .4rem }
.class { border-top: 1px solid var(--line); padding: 1rem 0 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem 2rem }
figure { margin: 0 }
figcaption { color: var(--soft); margin: 0 0 .3rem }
img { display: block; max-width: 100%; height: auto }
img.small { image-rendering: pixelated }
.neighbours { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: 1.2rem 2rem; margin-top: 1rem }
.row { display: grid; gap: .2rem .5rem }
.row figure { min-width: 0 }
.row img { width: 100% }
.row span { display: block; font-size: .8125rem; line-height: 1.35 }
.row .name { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden }
.drawn img { outline: 3px solid var(--link) }
details { border-top: 1px solid var(--line); padding: .4rem 0 }
summary { cursor: pointer; padding: .3rem 0 }
.scroll { overflow-x: auto }
pre { font-size: .8125rem }
table { border-collapse: collapse; font-size: .875rem }
th, td { text-align: left; padding: .15rem 1.2rem .15rem 0; vertical-align: top }
th { font-weight: 500; color: var(--soft) }
"""
_LARGE_PICTURE: Final = 96
"""Side in pixels from which images are not shown as squares of pixels."""


def write_gallery(folder: Path, sheets: Sheets, metrics: Mapping[str, Any], key: str, real: RealSide) -> None:
    """Write `index.html`, and pictures: `class-00003.png` and `real-00003.png` of the classes with images, and
    `near-….png` of drawn images and their neighbours, which `neighbours.json` tells too.

    Names of classes and of data come from archives: they are escaped in the page and are no part of a file's name.
    """
    make_folder(folder)
    for old in (*folder.glob("near-*.png"), *folder.glob("real-*.png"), *folder.glob(NEIGHBOURS_FILE)):
        old.unlink()
    result = metrics["results"][key]
    by_class = result.get("recogniser", {}).get("by_class", [None] * len(sheets.class_names))
    sections = []
    if -1 in real.of_class:
        figure = _sheet_figure(folder, "real-all.png", sheet_of(real.of_class[-1]), "Real images", "real images")
        sections.append(f'<section class="class">{figure}</section>')
    for label, name in enumerate(sheets.class_names):
        sheet = sheets.sheet(label)
        if sheet is None:
            continue
        shown = html.escape(name)
        drawn = _sheet_figure(folder, f"class-{label:05d}.png", sheet, "Drawn", f"drawn images of class {name}")
        beside = sheet_of(real.of_class.get(label, []))
        if beside is not None:
            drawn += _sheet_figure(folder, f"real-{label:05d}.png", beside, "Real", f"real images of class {name}")
        share = "" if by_class[label] is None else f' <span class="soft">· recognised {by_class[label]:.1%}</span>'
        heading = f"<h3>{label}: {shown}{share}</h3>" if name != str(label) else f"<h3>class {shown}{share}</h3>"
        sections.append(f'<section class="class">{heading}<div class="pair">{drawn}</div></section>')
    near = _neighbours(folder, sheets, real, result["network"])
    with replacing(folder / "index.html") as file:
        file.write(_page(metrics, key, sections, near, real.told).encode())


def _sheet_figure(folder: Path, name: str, sheet: Image.Image | None, caption: str, alt: str) -> str:
    """A picture written, and the figure of it; a click shows it in its own size."""
    assert sheet is not None
    with replacing(folder / name) as file:
        sheet.save(file, "PNG")
    return (
        f'<figure><figcaption>{caption}</figcaption><a href="{name}"><img src="{name}" width="{sheet.width}" '
        f'height="{sheet.height}" loading="lazy" alt="{html.escape(alt)}"></a></figure>'
    )


def _neighbours(folder: Path, sheets: Sheets, real: RealSide, network: Mapping[str, Any]) -> str:
    """Drawn images beside the real ones that are nearest, with words on what that says."""
    compared = [one for one in real.compared if all(each.number in real.pictures for each in one.neighbours)]
    if not compared:
        return ""
    write_neighbours(folder, compared, f"{network['name']} {network['fingerprint']}")
    ratios = [one.neighbours[0].distance / one.neighbours[0].own for one in compared if one.neighbours[0].own > 0]
    nearer = sum(one.neighbours[0].distance < 0.5 * one.neighbours[0].own for one in compared)
    told = (
        f"Distances are Euclidean, between the {network['dimension']:,} features of the network "
        f"“{html.escape(str(network['name']))}” that the figures above are of. Below a real image stands how far "
        "it is from the drawn one, and after the stroke how far from the nearest other real image."
    )
    if ratios:
        told += (
            f" Half of these drawn images are within {median(ratios):.2g} times that distance of a real one. "
            + (
                f"{nearer} of {len(compared)} are nearer than half of it: they may be copies of real ones."
                if nearer
                else "None is nearer than half of it, as a copy would be."
            )
        )
    rows = "".join(_row(folder, place, one, sheets, real) for place, one in enumerate(compared))
    heading = "<h2>Nearest real images</h2>"
    return f'<section id="near">{heading}<p>{told}</p><div class="neighbours">{rows}</div></section>'


def _row(folder: Path, place: int, one: Compared, sheets: Sheets, real: RealSide) -> str:
    """A drawn image and its neighbours, as pictures of one size beside each other."""
    small = ' class="small"' if one.drawn_HWC.shape[0] < _LARGE_PICTURE else ""

    def cell(name: str, image_HWC: Any, alt: str, words: str, kind: str = "") -> str:
        sheet = sheet_of([image_HWC])
        assert sheet is not None
        with replacing(folder / name) as file:
            sheet.save(file, "PNG")
        return (
            f'<figure{kind}><img{small} src="{name}" width="{sheet.width}" height="{sheet.height}" loading="lazy" '
            f'alt="{html.escape(alt)}"><span class="soft">{words}</span></figure>'
        )

    name = sheets.class_names[one.label]
    cells = cell(
        f"near-{place:02d}-drawn.png",
        one.drawn_HWC,
        f"drawn image of class {name}",
        f"drawn{_class(name)}",
        ' class="drawn"',
    )
    for rank, each in enumerate(one.neighbours):
        image_HWC, label = real.pictures[each.number]
        of_class = "" if label < 0 else sheets.class_names[label]
        own = f" / {each.own:.3g}" if each.own < float("inf") else ""
        words = f"{each.distance:.3g}{own}{'' if label < 0 else _class(of_class)}"
        alt = f"real image {each.number}, {of_class}, at distance {each.distance:.3g}"
        cells += cell(f"near-{place:02d}-{rank}.png", image_HWC, alt, words)
    columns = 1 + len(one.neighbours)
    return f'<div class="row" style="grid-template-columns: repeat({columns}, minmax(0, 1fr))">{cells}</div>'


def _class(name: str) -> str:
    """The name of a class below a picture, where there is room for some lines of it."""
    return f'<span class="name">{html.escape(f"class {name}" if name.isdigit() else name)}</span>'


def _page(metrics: Mapping[str, Any], key: str, sections: list[str], near: str, told: str | None) -> str:
    evaluation, result = metrics["evaluation"], metrics["results"][key]
    cards = "".join(
        f'<div class="card"><dt>{card.name}</dt><dd class="value">{card.value}</dd><dd>{card.meaning}</dd></div>'
        for card in figure_words(result)
    )
    plain = {
        name: value
        for name, value in result.items()
        if isinstance(value, (int, float)) or (value is None and name != "request")
    }
    chains = ""
    if "chains" in result:
        lines = "\n".join(html.escape(line) for line in chain_lines(result["chains"]))
        picture = (
            f'<a href="{CHAINS_FILE}"><img src="{CHAINS_FILE}" loading="lazy" alt="traces of σ, autocorrelation '
            'and successive samples of chains"></a>'
            if "sigma" in result["chains"]
            else ""
        )
        told_lines = _scroll(f"<pre>{lines}</pre>", "figures of chains")
        chains = f'<section id="chains"><h2>Chains</h2>{told_lines}{picture}</section>'
    data = html.escape(str(result["real"]["name"]))
    warnings = "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in result["warnings"])
    places = {
        "figures": "Figures",
        **({"chains": "Chains"} if chains else {}),
        "images": "Drawn and real images",
        **({"near": "Nearest real images"} if near else {}),
        "settings": "Settings",
    }
    links = "".join(f'<li><a href="#{place}">{title}</a></li>' for place, title in places.items())
    images = "\n".join(sections)
    why = "" if told is None else f"<p>{html.escape(told)}</p>"
    details = "".join(
        f"<details><summary>{title}</summary>{_table(values, title)}</details>"
        for title, values in (
            ("All figures", plain),
            ("How the images were drawn", evaluation),
            ("Feature network", result["network"]),
        )
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(evaluation['id'])}: {data}</title><style>{_STYLE}</style></head>\n<body>\n"
        f"<header><h1>Drawn images and {data}</h1><p>{summary(evaluation, result)}</p>"
        f'<nav aria-label="On this page"><ul>{links}</ul></nav></header>\n<main>\n'
        f'<section id="figures"><h2>Figures</h2><dl class="cards">{cards}</dl>{warnings}</section>\n{chains}\n'
        f'<section id="images"><h2>Drawn and real images</h2>{why}\n{images}</section>\n{near}\n'
        f'<section id="settings"><h2>Settings</h2>{details}</section>\n</main>\n</body></html>\n'
    )


def summary(evaluation: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Which images these are, in a sentence."""
    sampler = evaluation["sampler"]
    steps = "" if str(sampler["sampler"]).endswith("rk45") else f", {sampler['steps']:,} steps"
    where = guidance_interval_told(evaluation)
    guided = "" if sampler["cfg_scale"] == 1 else f", guidance {sampler['cfg_scale']:g}{where}"
    which = "the moving average (EMA) of the weights" if evaluation["which"] == "ema" else "the weights"
    real = result.get("real_images")
    beside = "statistics" if real is None else f"{real:,} real images"
    return html.escape(
        f"{evaluation['count']:,} images, drawn with {which} of step {evaluation['step']:,} "
        f"({sampler_told(sampler)}{steps}{guided}), and compared with {beside} of {result['real']['name']}."
    )


def _scroll(inside: str, name: str) -> str:
    """What may be wider than the screen: it is moved by itself, also by the keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(name)}">{inside}</div>'


def _table(values: Mapping[str, Any], name: str) -> str:
    rows = (
        f'<tr><th scope="row">{html.escape(key)}</th><td>{_cell(value)}</td></tr>' for key, value in values.items()
    )
    caption = f'<caption class="unseen">{html.escape(name)}</caption>'
    return _scroll(f"<table>{caption}{''.join(rows)}</table>", name)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
