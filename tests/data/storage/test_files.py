"""Folders that are made."""

from pathlib import Path

import pytest

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.digits import Digits
from ditmoe.model.errors import UserError


def test_no_folder_is_made_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3:/bucket/x: is an address; expected a folder of this machine"):
        pack(Digits(), Path("s3://bucket/x"), PackSettings(count=5))
    assert not list(tmp_path.iterdir())
