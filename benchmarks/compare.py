"""What became slower between two runs of the suite.

    python benchmarks/compare.py BEFORE.json AFTER.json

A figure with a baseline is compared by its ratio to it, which another load or another machine changes little; one
without by itself. It counts as slower, or faster, where the quartiles of the two runs do not overlap and the
medians differ by more than 2%. The exit code is 1 where something became slower, or is missing.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

LEAST: Final = 0.02
"""Differences below it are not told."""


def main() -> int:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (options.before, options.after))
    if before["hardware"] != after["hardware"]:
        print(f"not the same hardware: {before['hardware']} and {after['hardware']}")
    slower, faster, missing = changes(before, after)
    for title, lines in (("slower", slower), ("faster", faster), ("missing", missing)):
        for text in lines:
            print(f"{title}: {text}")
    if not slower and not missing:
        print("nothing became slower beyond the spread")
    return 1 if slower or missing else 0


def changes(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """What became slower, what faster, and what is not there any more."""
    then = {figure["name"]: figure for figure in before["figures"]}
    now = {figure["name"]: figure for figure in after["figures"]}
    slower, faster = [], []
    for name in [name for name in then if name in now]:
        key = "speedup" if then[name]["speedup"] and now[name]["speedup"] else "ours"
        more_is_better = key == "speedup" or then[name]["more_is_better"]
        old, new = then[name][key], now[name][key]
        if new["low"] <= old["high"] and old["low"] <= new["high"]:
            continue
        change = new["median"] / old["median"]
        if abs(change - 1) < LEAST:
            continue
        what = "× baseline" if key == "speedup" else then[name]["unit"]
        text = f"{name}: {old['median']:.3g} → {new['median']:.3g} {what} ({change - 1:+.0%})"
        (faster if (change > 1) == more_is_better else slower).append(text)
    return slower, faster, [name for name in then if name not in now]


if __name__ == "__main__":
    sys.exit(main())
