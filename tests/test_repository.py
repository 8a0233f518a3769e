"""The repository's own promises: links lead somewhere, commands exist, versions are pinned, it stands alone."""

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import floors
from tests.test_imports import edges, room

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (".ci/run", "demo.sh", "slurm_demo.sh")

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"")
"""A Markdown link or picture, or the HTML of one."""
PAGE = re.compile(r"\bdocs/[\w./-]*\.(?:md|svg|png)\b")
"""A page named in text or code."""
COMMAND = re.compile(r"(?:^|`)make ([a-z][a-z-]*)", re.MULTILINE)

FORBIDDEN = [
    re.compile(r"(?<![\w.*-])/" + r"work\b(?![-.])"),
    re.compile(r"\.\./" + "shared"),
    *(
        re.compile(re.escape(".".join(host)))
        for host in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))
    ),
]
"""The paths and hosts of where it was made; it is used elsewhere."""


def _ignored() -> tuple[str, ...]:
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return (".git", ".typing", *(pattern.strip("/") for pattern in patterns))


@cache
def text_files() -> dict[Path, str]:
    """Every text file of the tree, without what git ignores."""
    found = {}
    ignored = _ignored()
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not any(fnmatch(name, pattern) for pattern in ignored))
        for name in names:
            path = Path(folder, name)
            data = path.read_bytes()
            if b"\0" not in data and not any(fnmatch(name, pattern) for pattern in ignored):
                found[path] = data.decode()
    return found


PAGES = sorted(str(path.relative_to(ROOT)) for path in text_files() if path.suffix == ".md")


def without_code(markdown: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link may name in a page: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for match in LINK.finditer(without_code(page.read_text(encoding="utf-8"))):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT) and linked.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{name} links to {target}: no such heading"


def test_pages_that_are_named_exist() -> None:
    for path, text in text_files().items():
        for page in PAGE.findall(text):
            assert (ROOT / page).exists(), f"{path.relative_to(ROOT)} names {page}"


WORD = re.compile(r"`([^`\n]+)`")
MODULE_PATH = re.compile(r"(?<![\w./-])[\w./-]+\.py\b")
FLOOR_PATH = re.compile(
    r"(?<![\w./:-])(?:ditmoe|launcher|slurm|sampling|parallel|data|model|configs|tests|docs|benchmarks)/[\w./-]*[\w/]"
)


def paths_named(markdown: str) -> set[str]:
    """The files and folders of this repository that a page names in backticks."""
    words = WORD.findall(without_code(markdown))
    return {path for word in words for pattern in (MODULE_PATH, FLOOR_PATH) for path in pattern.findall(word)}


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_paths_that_pages_name_exist(name: str) -> None:
    """From the root, with the folder: a bare `denoiser.py` leads nobody anywhere."""
    # The imports of the tables of floors are within their floor, and compared below.
    page = floors.ROW.sub(r"| `\1` | \2 | `\3` | |", (ROOT / name).read_text(encoding="utf-8"))
    lost = {path for path in paths_named(page) if not (ROOT / path).exists()}
    assert not lost, f"{name} names {', '.join(sorted(lost))}"


def test_the_search_for_paths() -> None:
    text = "`ditmoe/sampling/x.py`, `denoiser.py`, `model/dit.py` and `data/` in `python y.py`\n```\n`a.py`\n```\n"
    assert paths_named(text) == {"ditmoe/sampling/x.py", "denoiser.py", "model/dit.py", "y.py"}


def test_the_tables_of_floors_are_the_code_s() -> None:
    """Every folder and module, where to begin reading, and its imports; a row imports only rows below it."""
    page = floors.PAGE.read_text(encoding="utf-8")
    found = floors.rows(page)
    expected = floors.rooms()
    assert sorted(found) == sorted(expected), "docs/architecture.md: a row for each folder and module of a floor"
    for name, (idea, begin, _) in found.items():
        assert idea.strip() and (name.endswith(".py") or begin.startswith(name)), name
    assert page == floors.written(page), "run: python -m tests.floors"
    order = list(found)
    for name, targets in expected.items():
        assert all(order.index(target) > order.index(name) for target in targets), name
        assert found[name][2].count("`") == 2 * len(targets), name


def test_the_way_from_evaluate_to_the_denoiser_is_the_longest() -> None:
    page = floors.PAGE.read_text(encoding="utf-8")
    told = re.search(r"`launcher/commands/`((?:\s+→\s+`sampling/\w+/`)+)", page)
    assert told is not None
    way = re.findall(r"`(sampling/\w+/)`", told[1])
    actual = floors.rooms()
    assert all(later in actual[earlier] for earlier, later in pairwise(way))
    begins = {
        floors.shown(room(target))
        for target in edges()["launcher/commands/evaluate.py"]
        if target.startswith("sampling/")
    } | {
        floors.shown(room(target))
        for target in edges()["launcher/commands/evaluate_grid.py"]
        if target.startswith("sampling/")
    }
    assert way[0] in begins and way[-1] == "sampling/network/"

    @cache
    def longest(start: str) -> int:
        """Folders from one to the denoiser's, or a negative number where no way leads there."""
        if start == way[-1]:
            return 1
        return 1 + max((longest(target) for target in actual[start]), default=-99)

    assert len(way) == max(map(longest, begins))


def test_every_page_can_be_reached() -> None:
    """From the README, over links."""
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.exists() or page.suffix != ".md":
            continue
        seen.add(page)
        links = LINK.finditer(page.read_text(encoding="utf-8"))
        waiting += [(page.parent / (link[1] or link[2]).partition("#")[0]).resolve() for link in links]
    lost = [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")) if page not in seen]
    assert not lost, f"no link from README.md leads to {', '.join(lost)}"


@pytest.mark.parametrize("name", PAGES)
def test_make_commands_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = set(COMMAND.findall((ROOT / name).read_text(encoding="utf-8")))
    assert used <= targets, f"{name}: make {', '.join(sorted(used - targets))}"


def test_the_checks_run_the_tests_as_the_readme_does() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"(?:^|`)(make test)(?![\w-])", readme, re.MULTILINE)
    assert found is not None, "README.md does not say how to run the tests"
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert f"timed {found[1]}" in lines


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_run(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_it_stands_alone() -> None:
    for path, text in text_files().items():
        for pattern in FORBIDDEN:
            match = pattern.search(text)
            assert match is None, f"{path.relative_to(ROOT)} mentions {match[0]}"


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("see /" + "work/x", True),
        ("data/" + "workers.py", False),
        ("a net" + "work, or CPU/" + "work", False),
        (".." + "/shared/x", True),
        ("https://pypi" + ".org/simple", True),
    ],
)
def test_the_search_for_forbidden_words(text: str, forbidden: bool) -> None:
    assert any(pattern.search(text) for pattern in FORBIDDEN) == forbidden


def test_messages_of_pydantic_are_told_in_our_words() -> None:
    """Through `message_of` alone: what others told began with `Value error,`."""
    raw = re.compile(r"""\[(["'])msg\1\]""")
    found = {str(path.relative_to(ROOT)) for path, text in text_files().items() if raw.search(text)}
    assert {name for name in found if name.endswith(".py")} == {"model/settings.py"}


def constraints() -> dict[str, str]:
    """Canonical name → version."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line)
            assert match is not None, f"constraints.txt: {line!r}; expected NAME==VERSION, without a local tag"
            name = canonicalize_name(match[1])
            assert name not in found, f"constraints.txt pins {name} twice"
            found[name] = match[2]
    return found


def declared() -> list[Requirement]:
    """The requirements of pyproject.toml, with all extras."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def needed(requirement: Requirement) -> Iterator[Requirement]:
    """What an installed distribution requires here."""
    try:
        lines = requires(requirement.name) or []
    except PackageNotFoundError:
        return
    for found in map(Requirement, lines):
        if found.marker is None or any(found.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
            yield found


def test_the_image_has_the_python_that_the_versions_were_tested_with() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = re.search(r"tested together \(Python (\d+\.\d+),", pins)
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    base = re.search(r"^FROM python:(\d+\.\d+)-slim$", image, re.MULTILINE)
    assert tested is not None and base is not None and tested[1] == base[1]


def test_declared_versions_are_pinned() -> None:
    pinned = constraints()
    for requirement in declared():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert version in requirement.specifier, f"constraints.txt: {version}, pyproject.toml: {requirement}"


def test_what_they_need_is_pinned_too() -> None:
    pinned = constraints()
    seen: set[str] = set()
    waiting = declared()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        name = canonicalize_name(requirement.name)
        # torch's CUDA builds pin their libraries themselves; the others have none.
        if not name.startswith(("nvidia-", "cuda-", "triton")):
            assert name in pinned, f"constraints.txt does not pin {name}"
            assert requirement.specifier.contains(pinned[name], prereleases=True), (
                f"constraints.txt: {name} {pinned[name]}, and something needs {requirement}"
            )
            waiting += needed(requirement)
