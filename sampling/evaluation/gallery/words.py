"""Words for figures: what each says of these images, beside its floor, for those who do not know it."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

_BANDS: Final = (
    (1.1, "by this measure drawn images cannot be told from real ones"),
    (2.0, "drawn images are close to real ones; the difference is small but can be measured"),
    (10.0, "as a set, drawn images differ clearly from real ones"),
    (float("inf"), "as a set, drawn images are far from real ones"),
)
"""Times the floor up to which it is said."""


class Words(NamedTuple):
    """A figure, for a card."""

    name: str
    value: str
    meaning: str


def figure_words(result: Mapping[str, Any]) -> list[Words]:
    """The figures of a result that are known, in words."""
    found = []
    for key, name, of in (
        ("fid", "FID", "what is in the images"),
        ("sfid", "sFID", "what is where in the images"),
    ):
        if _known(result, key):
            found.append(Words(name, _figure(result[key]), _distance(result, key, of)))
    if _known(result, "kid"):
        found.append(Words("KID", _figure(result["kid"]), _kid(result)))
    for key, name, what in (
        ("precision", "Precision", "of drawn images look like real ones"),
        ("recall", "Recall", "of real images have drawn ones like them"),
    ):
        if _known(result, key):
            floor = result.get(f"{key}_floor")
            beside = "" if floor is None else f" Between two halves of the real images it is {floor:.0%}."
            kind = "faithful" if key == "precision" else "varied"
            meaning = f"{result[key]:.0%} {what}: how {kind} they are. Higher is better.{beside}"
            found.append(Words(name, _figure(result[key]), meaning))
    if _known(result, "inception_score"):
        real = result.get("inception_score_real")
        beside = "" if real is None else f" Real images get {_figure(real)}."
        found.append(
            Words(
                "Inception Score",
                _figure(result["inception_score"]),
                f"Higher where each image is clearly of one class, and all classes are there.{beside}",
            )
        )
    if "recogniser" in result:
        judge = result["recogniser"]
        found.append(
            Words(
                "Recognised",
                f"{judge['accuracy']:.1%}",
                "The share of drawn images that are taken for the class that was asked for, by a classifier that "
                "learned from real images alone. "
                f"It is right on {judge['held_out_accuracy']:.1%} of real ones that it never saw.",
            )
        )
    return found


def _distance(result: Mapping[str, Any], key: str, of: str) -> str:
    """FID or sFID beside its floor."""
    start = f"How far drawn images are from real ones as a set, judged by {of}. Lower is better."
    floor, ratio = result.get(f"{key}_floor"), result.get(f"{key}_ratio")
    if floor is None:
        return f"{start} No floor is known, so it can be compared with figures of the same kind only."
    if ratio is None and floor > 0:
        ratio = result[key] / floor
    half = result.get(f"{key}_floor_images_per_half")
    halves = "halves of the real images" if half is None else f"halves of {half:,} real images each"
    beside = f" Two {halves} are {_figure(floor)} apart: a perfect network would get about that."
    if ratio is None:
        return start + beside
    band = next(words for most, words in _BANDS if ratio <= most)
    few = ""
    drawn = result.get("drawn_images")
    if half is not None and drawn is not None and drawn < half:
        few = f" Only {drawn:,} images were drawn, and fewer images read higher."
    return f"{start}{beside} This is {ratio:.3g} times the floor: {band}.{few}"


def _kid(result: Mapping[str, Any]) -> str:
    start = "As FID, but the number of images does not move it: 0, but for chance, where they are alike."
    floor, deviation = result.get("kid_floor"), result.get("kid_floor_deviation")
    if floor is None:
        return start
    spread = "" if deviation is None else f" ± {_figure(deviation)}"
    return f"{start} Two halves of the real images get {_figure(floor)}{spread}."


def _known(result: Mapping[str, Any], key: str) -> bool:
    return isinstance(result.get(key), (int, float))


def _figure(value: float) -> str:
    return f"{value:.4g}"
