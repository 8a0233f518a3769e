"""A machine that lacks what compiling takes is told so before anything starts."""

import sysconfig
from pathlib import Path

import pytest

from ditmoe.model.compiling import tools
from ditmoe.model.compiling.tools import check_tools
from ditmoe.model.errors import UserError


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError) as caught:
        check_tools("cpu", "train.compile = true")
    for part in ("train.compile = true", "no-such-compiler", str(tmp_path / "Python.h")):
        assert part in str(caught.value)
    monkeypatch.setattr(tools, "find_spec", lambda _: None)
    monkeypatch.setattr(tools.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"--compile: .*triton.*C compiler.*Python"):
        check_tools("cuda", "--compile")


def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("CXX", "sh")
    check_tools("cpu", "--compile")
