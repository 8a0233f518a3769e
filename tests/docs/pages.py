"""The pages as data: their blocks of code, the commands in these, and what stands between backticks."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
SHELL: Final = frozenset({"", "bash", "sh", "console"})
"""The languages of a block that a reader types: a block without one is such a block; a listing is `text`."""
_BLOCK: Final = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_SPAN: Final = re.compile(r"`([^`]+)`")
_ENDS: Final = re.compile(r"[;&|()<>]+")
"""What ends a simple command in a line of shell."""
_HERE: Final = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")
_LAUNCHERS: Final = ("srun", "torchrun", "nohup", "time", "nice", "env", "python", "python3", "timeout", "exec")
"""What may stand before `ditmoe` or `-m ditmoe.launcher` in a command."""


class Block(NamedTuple):
    """A block of code of a page, without the indentation of the list that it stands in."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[str]:
    """The pages for users, by their paths from the root."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found]


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page, in their order."""
    text = read(page)
    return [
        Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M),
        )
        for match in _BLOCK.finditer(text)
    ]


def shell_blocks(page: str) -> list[Block]:
    """Those of them that a reader types into a shell."""
    return [block for block in blocks(page) if block.language in SHELL]


def typed(block: Block) -> str:
    """What a reader types of a block: in one that begins with `$`, those lines, and what continues them."""
    if not block.text.startswith("$ "):
        return block.text
    lines, goes_on = [], False
    for line in block.text.splitlines():
        if line.startswith("$ ") or goes_on:
            lines.append(line.removeprefix("$ "))
            goes_on = line.endswith("\\")
    return "\n".join(lines) + "\n"


def spans(page: str) -> list[str]:
    """What stands between backticks outside of blocks, each on one line."""
    return spans_of(read(page))


def spans_of(text: str) -> list[str]:
    """What stands between backticks in a text, outside of its blocks."""
    return [" ".join(span.split()) for span in _SPAN.findall(outside_blocks(text))]


def outside_blocks(text: str) -> str:
    """A page without its blocks."""
    return _BLOCK.sub("", text)


def ditmoe_commands(shell: str) -> Iterator[list[str]]:
    """The arguments of every `ditmoe` in a text of shell, whatever starts it."""
    for line in _lines(shell):
        for words in _simple_commands(line):
            arguments = _arguments_of_ditmoe(words)
            if arguments is not None:
                yield arguments


def _lines(shell: str) -> Iterator[str]:
    """Logical lines: continued by a backslash or an open quotation, without here-documents."""
    held, until = "", None
    for line in shell.replace("\\\n", " ").splitlines():
        if until is not None:
            until = None if line.strip() == until else until
            continue
        held = f"{held}\n{line}" if held else line
        try:
            shlex.split(held, comments=True)
        except ValueError:
            continue  # a quotation goes on in the next line
        if here := _HERE.search(held):
            until = here[1]
        yield held
        held = ""
    assert not held, f"no end of the quotation: {held}"


def _simple_commands(line: str) -> Iterator[list[str]]:
    words: list[str] = []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split = True
    to_a_file = False
    for word in lexer:
        if to_a_file:  # the word is that file
            to_a_file = False
        elif word in (">", ">>", "<", ">&", "&>"):
            to_a_file = True
        elif _ENDS.fullmatch(word):
            if words:
                yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words


def _arguments_of_ditmoe(words: list[str]) -> list[str] | None:
    while words and (re.match(r"[A-Za-z_]\w*=", words[0]) or words[0] in ("$", "!", "if", "then", "do", "while")):
        words = words[1:]
    if not words:
        return None
    if Path(words[0]).name == "ditmoe":
        return words[1:]
    if Path(words[0]).name in _LAUNCHERS:
        for place, word in enumerate(words[1:], 1):
            alone = Path(word).name == "ditmoe" and not Path(words[0]).name.startswith("python")
            if alone or words[place - 1 : place + 1] == ["-m", "ditmoe.launcher"]:
                return words[place + 1 :]
    return None
