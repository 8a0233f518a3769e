"""The feature networks that a user asks for, by name and file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import expected_name
from ditmoe.sampling.settings.names import FeatureName, ResizeName

NAMES: Final[tuple[FeatureName, ...]] = get_args(FeatureName)
FROM_FILES: Final = tuple(name for name in NAMES if name != "classifier")
"""Those that come from a file which the user gives."""


@dataclass(frozen=True)
class NetworkChoice:
    """One feature network."""

    features: FeatureName = "classifier"
    path: Path | None = None
    """Its file."""
    resize: ResizeName | None = None
    """Of Inception; None: that of its file."""

    def absolute(self) -> "NetworkChoice":
        """The same, as processes in other folders find it."""
        return NetworkChoice(self.features, None if self.path is None else self.path.absolute(), self.resize)


def choices_of(
    features: str, paths: Path | Sequence[str | Path] | None = None, resize: ResizeName | None = None
) -> tuple[NetworkChoice, ...]:
    """What the options `--features NAME,…`, `--features-path [NAME=]FILE` and `--resize` say.

    Raises:
        UserError: a name is unknown or given twice, or a file or the resize is of none of the networks.
    """
    names: list[FeatureName] = []
    for name in features.split(","):
        known: FeatureName | None = next((each for each in NAMES if each == name.strip()), None)
        if known is None or known in names:
            found = name.strip()
            problem = f"given twice; expected some of {', '.join(NAMES)}"
            if known is None:
                problem = f"no feature network; {expected_name(found, NAMES)}"
            raise UserError(f"--features {features}: {found} is {problem}")
        names.append(known)
    from_files = [name for name in names if name in FROM_FILES]
    files: dict[FeatureName, Path] = {}
    for path in [paths] if isinstance(paths, Path) else paths or ():
        named, equals, rest = str(path).partition("=")
        owner = next((name for name in FROM_FILES if equals and name == named), None)
        if owner is None and len(from_files) == 1:
            owner, rest = from_files[0], str(path)
        if owner is None and from_files:
            raise UserError(
                f"--features-path {path}: the file of {' or of '.join(from_files)}? Expected NAME=FILE for each"
            )
        if owner is None or owner not in names:
            raise UserError(
                f"--features-path {path}: expected only with --features {owner or ' or '.join(FROM_FILES)}"
            )
        if owner in files:
            raise UserError(f"--features-path {path}: a second file of {owner}; expected one")
        files[owner] = Path(rest)
    if resize is not None and "inception" not in names:
        raise UserError(f"--resize {resize}: expected only with --features inception")
    return tuple(NetworkChoice(name, files.get(name), resize if name == "inception" else None) for name in names)


def arguments_of(choices: Sequence[NetworkChoice]) -> list[str]:
    """The options again, for a command line."""
    arguments = ["--features", ",".join(choice.features for choice in choices)]
    for choice in choices:
        arguments += [] if choice.path is None else ["--features-path", f"{choice.features}={choice.path}"]
        arguments += [] if choice.resize is None else ["--resize", choice.resize]
    return arguments
