"""What a request is refused with: JSON in the form that clients of OpenAI's routes know."""

from typing import Any, Final

from pydantic import BaseModel, ValidationError

from ditmoe.model.outside.nearest import meant
from ditmoe.model.settings import message_of
from ditmoe.sampling.settings.chains import DlgConfig

_FIELDS: Final = frozenset(DlgConfig.model_fields)
"""Of sections."""


class ServiceError(Exception):
    """A request is not answered.

    Its `reason` is one of few, which metrics count by.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        reason: str = "rejected",
        retry_after: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        """The field that is wrong, such as `labels.3`."""
        self.reason = reason
        self.retry_after = retry_after
        """Seconds; 0: to ask again is no use."""

    def headers(self) -> dict[str, str]:
        """Of the reply."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return headers | ({"Retry-After": str(self.retry_after)} if self.retry_after else {})

    def body(self) -> dict[str, Any]:
        """Of the reply."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.reason}}


def of_validation(error: ValidationError, kind: type[BaseModel]) -> ServiceError:
    """All that is wrong with the fields of a request of this kind; `param` is the first of them."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    lines, param = [], None
    for problem in problems[:10]:
        # Of a field that may be of several types, each type is named too, which is no name of a field.
        location = problem["loc"]
        parts = [*location[:1], *(part for part in location[1:] if isinstance(part, int) or part in _FIELDS)]
        if problem["type"] == "extra_forbidden":
            parts = [*location]  # the last is what nobody knows
        field, message = ".".join(map(str, parts)), message_of(problem)
        if problem["type"] == "extra_forbidden":
            fields = (kind if len(parts) == 1 else DlgConfig).model_fields
            message += meant(str(parts[-1]), [field.alias or name for name, field in fields.items()])
        lines.append(f"{field}: {message}" if field else message)
        param = param or field or None
    return ServiceError(400, "; ".join(lines), param=param)
