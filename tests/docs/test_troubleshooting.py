"""The messages that docs/troubleshooting.md and other pages quote are those of the program."""

import re

import pytest

from tests.docs.messages import can_be_said
from tests.docs.pages import read

OTHERS_WORDS = {
    "ditmoe: command not found": "the shell",
    "CUDA out of memory": "PyTorch",
}
"""Messages that are not the program's, by whose they are."""
ROW = re.compile(r"^\| (?P<first>(?:`[^`]+`[^|]*?)) \|", re.MULTILINE)


def quoted(page: str) -> list[str]:
    """The messages in the first column of a page's tables of messages."""
    tables = re.findall(r"^\| message \|.*\n(?:\|.*\n)+", read(page), re.MULTILINE)
    assert tables, page
    cells = [match["first"] for table in tables for match in ROW.finditer(table)]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize(
    "message", [each for each in quoted("docs/troubleshooting.md") if each not in OTHERS_WORDS]
)
def test_a_message_is_the_program_s(message: str) -> None:
    assert can_be_said(message), f"nothing in the source says: {message}"


def test_others_words_are_quoted() -> None:
    assert set(OTHERS_WORDS) <= set(quoted("docs/troubleshooting.md"))


def test_there_are_messages() -> None:
    assert len(quoted("docs/troubleshooting.md")) > 30


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("rank … waits at … for …", True),
        ("rank … waits in … for …", False),
        ("process … on … has written it since …", True),
        ("not enough memory on this machine: …", True),
        ("not enough memory on that machine: …", False),
        ("train.batch = … must be a multiple of train.micro_batch × parallel.data", True),
        ("train.batch = … must be a multiple of train.micro_batch × parallel.pipe", False),
    ],
)
def test_the_search_for_messages(message: str, expected: bool) -> None:
    assert can_be_said(message) == expected
