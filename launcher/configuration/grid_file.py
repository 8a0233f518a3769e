"""The file of a comparison of samplers, which `ditmoe evaluate --grid` takes."""

from pathlib import Path

from ditmoe.launcher.configuration.problems import problem_list
from ditmoe.launcher.configuration.validation import validate_sections
from ditmoe.model.errors import UserError
from ditmoe.model.outside.yaml_reader import read_yaml
from ditmoe.sampling.comparison.cells import ComparisonConfig, problems_between


def load_comparison(path: Path) -> ComparisonConfig:
    """Read and check the file of a comparison.

    Raises:
        UserError: the file cannot be read, or something in it is wrong: every problem at once, a line each.
    """
    values, problems = read_yaml(path)
    sections, section_problems = validate_sections(ComparisonConfig, values)
    problems += section_problems + problems_between(sections)
    if problems:
        raise UserError(problem_list(str(path), problems))
    return ComparisonConfig(**sections)
