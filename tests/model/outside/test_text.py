"""What strangers wrote, on a terminal."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.model.outside.text import is_fit_to_print, message_lines, normal, printable


@pytest.mark.parametrize(
    "name",
    [
        "日本　語",
        "a\u00a0b",
        "می\u200cخواهم",
        "👨\u200d👩\u200d👧",
        "ﬁ \u2009thin",
        "é",
        "🏴\U000e0067\U000e007f",
        "ש\u200f",
    ],
)
def test_names_of_every_script_are_shown_as_they_are(name: str) -> None:
    assert is_fit_to_print(name) and printable(name) == name


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a\nerror: b", r"a\nerror: b"),
        ("a\rb\tc", r"a\rb\tc"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\u2028b\u0085", r"a\u2028b\x85"),
        ("\udcff", r"\udcff"),
        ("exe\u202egpj", r"exe\u202egpj"),
    ],
)
def test_what_controls_a_terminal_is_escaped(name: str, shown: str) -> None:
    assert not is_fit_to_print(name)
    assert printable(name) == shown


@given(st.text())
def test_a_message_has_no_control_characters_and_no_second_beginning(text: str) -> None:
    first, *others = message_lines(text).split("\n")
    assert all(line.startswith("  ") for line in others)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for line in (first, *others) for c in line)
    assert printable(printable(text)) == printable(text)


def test_names_are_stored_composed() -> None:
    assert normal("cafe\u0301") == normal("café") == "café"


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("http://user:SECRET@h:9/a?token=SECRET: no such folder", "http://…@h:9/a?…: no such folder"),
        ("http:/user:SECRET@h/a?b=SECRET", "http:/…@h/a?…"),
        ("'s3://k:SE/CRET@b/x' is no folder, why?", "'s3://…@b/x' is no folder, why?"),
        ("a\nhttps://k:SECRET@b/x", "a\n  https://…@b/x"),
        ("http://…@h/a?…: gone", "http://…@h/a?…: gone"),
        ("/data/a@b?c and user@host", "/data/a@b?c and user@host"),
        ("see https://host/a.html; expected b", "see https://host/a.html; expected b"),
    ],
)
def test_messages_show_no_login_of_an_address(typed: str, shown: str) -> None:
    assert message_lines(typed) == shown
