"""Dotted overrides of the command line: `parallel.expert=4`, `optim.betas=[0.9, 0.95]`."""

import copy
from typing import Any

import yaml
from pydantic import BaseModel

from ditmoe.data.places.redaction import shown_place, without_secrets
from ditmoe.launcher.configuration.fields import annotation_at, is_list, list_position, section_of, walk
from ditmoe.model.outside.nearest import nearest
from ditmoe.model.outside.yaml_reader import DEEPEST, parse_yaml, reason_of, shortened


def apply_overrides(
    model: type[BaseModel], values: dict[Any, Any], overrides: list[str]
) -> tuple[dict[Any, Any], list[str]]:
    """Set each `key=value` in a copy of the values: the copy, and a message for each that cannot be set."""
    values = copy.deepcopy(values)
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        override, path = shortened(f"{key}{equals}{shown_place(text)}"), key.split(".")
        if not equals or not all(path) or len(path) > DEEPEST:
            problems.append(f"{override!r} is not an override; expected KEY=VALUE, such as optim.lr=2e-4")
            continue
        try:
            annotation_at(model, path)
        except KeyError as error:
            problems.append(f"{override}: no such key; {suggestion(model, path, error.args[0])}")
            continue
        try:
            value, duplicates = parse_yaml(text)
        except yaml.YAMLError as error:
            reason = reason_of(error)
            problems.append(f"{override}: the value is not YAML: {reason}; expected a scalar or [a, list]")
            continue
        problems += [f"{override}: {duplicate}" for duplicate in duplicates]
        problem = _set(model, values, path, value)
        if problem is not None:
            problems.append(f"{override}: {problem}")
    return values, problems


def _set(model: type[BaseModel], values: dict[Any, Any], path: list[str], value: Any) -> str | None:
    """Set one value in place; a message where the file holds something that has no such place."""
    place: Any = values
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(place, list):
            position = list_position(key)
            if position is None or position >= len(place):
                return (
                    f"{'.'.join(path[:depth])} in the file has the length {len(place)}; expected a position below"
                )
            if last:
                place[position] = value
            else:
                place = place[position]
        elif isinstance(place, dict):
            if last:
                place[key] = value
            else:
                if place.get(key) is None and is_list(annotation_at(model, path[: depth + 1])):
                    return f"the file has no {'.'.join(path[: depth + 1])}; expected its whole list"
                # An empty section of a YAML file reads as null.
                if place.get(key) is None:
                    place[key] = {}
                place = place[key]
        else:
            found = shortened(repr(without_secrets(place)))
            return f"{'.'.join(path[:depth])} = {found} in the file; expected a section of keys"
    return None


def suggestion(model: type[BaseModel], path: list[str], known: int) -> str:
    """`did you mean optim.lr?` for a path of which the first `known` keys exist; or the keys there are.

    Keys of the same section come first, then keys elsewhere with that very name, then with one like it. Dotted
    paths are never compared whole: two keys of a long section would be alike whatever they are called.
    """
    parent = path[:known]
    prefix = ".".join(parent) + "." if parent else ""
    section = section_of(annotation_at(model, parent))
    if section is None:
        return f"{'.'.join(parent)} has no keys below it"
    siblings = list(section.model_fields)
    # `activation.checkpointing` for `activation_checkpointing`.
    joined = "_".join(path[known:])
    near = nearest(path[known], siblings) if len(path) == known + 1 or joined not in siblings else joined
    if near is not None and near == joined:
        return f"did you mean {prefix}{near}?"
    if near is not None:
        return f"did you mean {shortened('.'.join([*parent, near, *path[known + 1 :]]))}?"
    if (near := nearest(joined, siblings, cutoff=0.8)) is not None:
        return f"did you mean {prefix}{near}?"
    leaves: dict[str, list[str]] = {}
    for key, _ in walk(model):
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    leaf = nearest(path[-1], leaves, cutoff=0.8)
    elsewhere = [key for key in leaves.get(leaf or "", ()) if key != ".".join(parent)]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"expected one of {', '.join(prefix + name for name in siblings)}"
