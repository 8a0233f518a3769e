"""What weights do not say of themselves: the description that files of ours carry, as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from pydantic import ValidationError

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.weights.untrusted import first_problem, parse_json

Which = Literal["ema", "weights"]

_FORMAT: Final = "ditmoe weights 1"


@dataclass(frozen=True)
class Description:
    """The network that weights are of, and what it was trained for."""

    config: ModelConfig
    objective: ObjectiveConfig | None = None
    """What the network was trained to predict, where that is known."""
    class_names: list[str] | None = None
    which: Which | None = None
    """The set, where a file holds one."""

    def text(self) -> str:
        """As JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "model": self.config.model_dump(),
                "objective": self.objective.model_dump() if self.objective else None,
                "class_names": self.class_names,
                "set": self.which,
            }
        )


def parse_description(text: str | None, origin: Path) -> Description | None:
    """Read a description; None where there is none.

    Raises:
        UserError: it is not one, or describes no network.
    """
    if text is None:
        return None
    try:
        held = parse_json(text)
        if not isinstance(held, dict) or held.get("format") != _FORMAT:
            raise ValueError(f"expected {_FORMAT!r}")
        names, objective = held.get("class_names"), held.get("objective")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names must be a list of texts")
        return Description(
            ModelConfig(**held["model"]),
            ObjectiveConfig(**objective) if objective else None,
            cast(list[str] | None, names),
            "weights" if held.get("set") == "weights" else "ema",
        )
    except ValidationError as error:
        raise UserError(f"{origin}: its description cannot be read ({first_problem(error)})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{origin}: its description cannot be read ({str(error)[:200]})") from error
