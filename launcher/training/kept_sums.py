"""What a checkpoint keeps of its run's records and data, checked: it may be damaged, or a stranger's."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, ValidationError

from ditmoe.data.stream.dataset import changed_facts
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.model.weights.untrusted import first_problem
from ditmoe.parallel.checkpoint.folder import CheckpointInfo
from ditmoe.parallel.checkpoint.marker import MARKER

_Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
_Epoch = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _SourceSkips(_Kept):
    total: _Count
    by_epoch: dict[_Epoch, _Count] = Field(min_length=1)


class _Sums(_Kept):
    steps: _Count = 0
    loss: FiniteFloat = 0.0
    balance_loss: FiniteFloat = 0.0
    grad_norm: FiniteFloat = 0.0
    skipped_steps: list[_Count] = []
    skips: dict[str, _SourceSkips] = {}
    expert_load: list[list[FiniteFloat]] | None = None


def kept_sums(info: CheckpointInfo) -> dict[str, Any]:
    """A copy of a checkpoint's `sums`.

    Raises:
        UserError: they are not what a run of this version keeps; names the key.
    """
    model = info.model
    try:
        load_LN = _Sums.model_validate(info.sums).expert_load
        rows = None if load_LN is None or not model.experts else [len(row) for row in load_LN]
        if rows is not None and rows != [model.experts] * model.depth:
            raise ValueError(
                f"expert_load is not of {counted(model.depth, 'block')} of {counted(model.experts, 'expert')}"
            )
    except ValidationError as error:
        raise _refusal(info, first_problem(error)) from None
    except ValueError as error:
        raise _refusal(info, str(error)) from None
    return dict(info.sums)


def _refusal(info: CheckpointInfo, problem: str) -> UserError:
    return UserError(
        f"{info.path / MARKER}: sums cannot be read ({problem}); remove this checkpoint to go on from an older one"
    )


def check_same_data(info: CheckpointInfo, facts: Mapping[str, Any]) -> None:
    """UserError where a run's position in the sample order would now stand for other samples.

    Args:
        facts: of the data that there is now.
    """
    changed = changed_facts(info.dataset, facts)
    if changed:
        raise UserError(
            f"data.sources: the samples, or their order, are not those that {info.path} was trained on"
            f" (another {', '.join(changed)}); expected the same, indexed alike, or another run.dir"
        )
