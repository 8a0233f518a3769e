"""How the problems of a configuration are told: all at once, a line each."""


def problem_list(origin: str, problems: list[str]) -> str:
    """One message for any number of problems: a heading, and a line each."""
    heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{origin}: {heading}", *(f"  {problem}" for problem in problems)])
