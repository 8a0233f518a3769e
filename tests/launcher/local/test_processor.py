"""bf16 on processors without instructions for it is refused, with a way to insist."""

from pathlib import Path

import pytest

from ditmoe.launcher.local import processor
from ditmoe.model.errors import UserError

WITHOUT = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 avx512f avx512_vnni\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WITHOUT, None),
        (WITHOUT.replace("avx512f", "avx512f avx512_bf16"), "avx512_bf16"),
        (WITHOUT.replace("avx2", "amx_bf16 avx512_bf16"), "amx_bf16"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", "bf16"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", None),
        ("", "unknown"),
    ],
)
def test_units(text: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", file)
    assert processor.bf16_units() == expected
    if expected is None:
        with pytest.raises(UserError, match=r"train\.precision = bf16.*train\.emulated_bf16 = true"):
            processor.check_bf16("bf16", emulated=False)
    else:
        processor.check_bf16("bf16", emulated=False)
    processor.check_bf16("bf16", emulated=True)
    processor.check_bf16("fp32", emulated=False)


def test_a_system_that_does_not_say_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert processor.bf16_units() == "unknown"
    processor.check_bf16("bf16", emulated=False)
