"""The base of every section of a run's configuration."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A section of the configuration: unknown keys are errors, values do not change after loading.

    The docstring under each field is its documentation: unit, range, and what null means.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
