"""The table of what a walk through the pages shortens, replaces and leaves out, each with its reason."""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple


class LeftOut(NamedTuple):
    """Lines of shell that a walk does not run."""

    pattern: str
    """Found in the line."""
    reason: str


class Replaced(NamedTuple):
    """A text of a page that a walk runs otherwise."""

    page: str
    """Its path; an empty one: every page."""
    pattern: str
    by: str
    reason: str


LEFT_OUT: Final = (
    LeftOut(r"\bpip (install|download|wheel)\b", "fetches packages from the network"),
    LeftOut(r"\bpython3? -m venv\b|/bin/activate", "the walk runs the program of this checkout"),
    LeftOut(r"^make (venv|demo|lint|test|slurm-demo)", "installs everything first; .ci/run runs it"),
    LeftOut(r"^(docker|apptainer) ", "needs a runtime of containers"),
    LeftOut(r"scontrol requeue", "queues again the job of Slurm in which it is called"),
    LeftOut(r"--nodes 16 --gpus-per-node 8", "needs 128 GPUs; test_commands.py holds its layout to them"),
    LeftOut(r"convert facebook/", "fetches files from the network"),
    LeftOut(r"\b(hf|huggingface-cli) download\b|^(curl|wget) .*https://(?!127)", "fetches files from the network"),
)

REPLACED: Final = (
    Replaced("", r"ditmoe serve runs(?= *(#.*)?$)", "serving runs --port PORT", "it serves until it is stopped"),
    Replaced("", r"ditmoe serve runs --host 0\.0\.0\.0", "serving runs --host 0.0.0.0 --port 0", "likewise"),
    Replaced("", r"127\.0\.0\.1:8000", "127.0.0.1:PORT", "another program may have the port"),
    Replaced("", r"\bCONFIG\b", "configs/dit-g-2-16e2a-512-64gpus.yaml", "stands for any configuration"),
    Replaced("", r"^make bench$", "python -m benchmarks.run --small --rounds 1", "it takes ten minutes"),
    Replaced("", r"--step \d+", "--step 2", "the shortened training has no others"),
    Replaced("", r"configs/….yaml", "configs/photos.yaml", "stands for any configuration"),
    Replaced("", r" --preset DiT-[SX]L?/2(-8E2A)?", "", "one of that size takes gigabytes; the file says its own"),
    Replaced("", r"--gpus-per-node \d+", "--tasks-per-node 1", "the virtual nodes have no GPUs"),
    Replaced("", r"partition: \w+", "partition: ci", "the name of the virtual cluster's"),
    Replaced("docs/evaluate.md", r"--processes 0\b", "--processes 1", "the workers of a dry run never come"),
    Replaced("docs/service.md", r"count=5000, steps=50", "count=24, steps=2", "an evaluation of minutes"),
    Replaced("docs/sample.md", r"--nproc-per-node 8", "--nproc-per-node 2", "the machine has two cores"),
    Replaced("docs/sample.md", r"--expert-parallel [48]", "--expert-parallel 2", "likewise"),
)

NUMBERS: Final[Mapping[str, Mapping[str, str]]] = {
    "sample": {"--steps": "2"},
    "evaluate": {"--count": "24", "--steps": "2", "--processes": "1"},
    "score": {"--processes": "1"},
    "reference make": {"--processes": "1"},
    "noise-classifier train": {"--steps": "4"},
    "data pack": {"--count": "64", "--workers": "0"},
    "data encode": {"--processes": "1"},
    "data index": {},
    "data synthesize": {"--count": "24", "--steps": "2", "--processes": "1"},
    "worker": {"--processes": "1", "--idle": "0.02"},
    "submit workers": {"--idle": "0.02"},
}
"""Options whose numbers are set, or added, of each verb: images, steps and processes are few."""

IMAGE_SIZE: Final = "16"
"""In place of every `--image-size`."""

KEYS: Final[Mapping[str, str]] = {
    "launch.device": "cpu",
    "launch.processes": "1",
    "parallel.expert": "1",
    "train.precision": "fp32",
    "train.steps": "4",
    "train.batch": "8",
    "train.micro_batch": "4",
    "train.log_every": "2",
    "train.checkpoint_every": "2",
    "optim.warmup_steps": "1",
    "optim.decay_steps": "1",
    "ema.decay": "0.5",
    "model.depth": "1",
    "model.hidden": "32",
    "model.heads": "2",
    "data.lanes": "4",
    "preview.images": "4",
    "preview.sampler.steps": "2",
}
"""Keys of a training, which is of a small network, on one CPU, for a few steps."""


def walked(page: str, shell: str) -> tuple[str, list[str]]:
    """A block as it is walked, and the lines of it that are left out, with the reason."""
    lines, left = [], []
    for line in re.split(r"(?<!\\)\n", shell):  # with what a backslash continues
        reason = next((each.reason for each in LEFT_OUT if re.search(each.pattern, line)), None)
        if reason is None:
            lines.append(line)
        else:
            left.append(f"{line}: {reason}")
    text = "\n".join(lines).strip("\n")
    for each in REPLACED:
        if each.page in ("", page):
            text = re.sub(each.pattern, each.by, text, flags=re.MULTILINE)
    return text, left


def shortened(arguments: list[str], cluster: bool) -> list[str]:
    """The arguments of a command of a page with fewer images, steps and processes.

    Args:
        arguments: what follows `ditmoe`.
        cluster: there is a Slurm that jobs can be submitted to; otherwise they are dry runs.
    """
    words = next((words for words in (arguments[:2], arguments[:1]) if " ".join(words) in NUMBERS), arguments[:1])
    verb = " ".join(words)
    if arguments[:1] == ["submit"]:
        arguments = [re.sub(r"--count \d+", "--count 24 --steps 2", each) for each in arguments]
        if arguments[1] in ("train", "sweep"):
            arguments = _with_keys(arguments)
        elif arguments[1] in ("evaluate", "synthesize"):
            arguments = _with_numbers(arguments, {"--count": "24", "--steps": "2"})
        return arguments if cluster or "--dry-run" in arguments else [*arguments, "--dry-run"]
    if arguments[:1] == ["sweep"] or (arguments[:1] == ["train"] and not _needs_gpus(arguments)):
        return _with_keys(arguments)
    if arguments[:1] == ["train"]:
        return arguments if "--dry-run" in arguments else [*arguments, "--dry-run"]
    numbers = NUMBERS.get(verb, {})
    if "--grid" in arguments:  # whose file has them, the shortened one of the checkout
        place = arguments.index("--grid") + 1
        name = arguments[place]
        grid = name if name.endswith(".yaml") else f"configs/grids/{name}.yaml"
        arguments = [*arguments[:place], grid, *arguments[place + 1 :]]
        numbers = {name: value for name, value in numbers.items() if name not in ("--count", "--steps")}
    return _with_numbers(arguments, numbers)


def _needs_gpus(arguments: list[str]) -> bool:
    """A layout of several processes, or a published network of latents, is planned and not run."""
    return any(re.match(r"parallel\.|(?:configs/)?dit-", each) for each in arguments)


def _with_numbers(arguments: list[str], numbers: Mapping[str, str]) -> list[str]:
    changed = list(arguments)
    if "--image-size" in changed:
        changed[changed.index("--image-size") + 1] = IMAGE_SIZE
    for name, value in numbers.items():
        if name in changed:
            changed[changed.index(name) + 1] = value
        else:
            changed += [name, value]
    return changed


def _with_keys(arguments: list[str]) -> list[str]:
    """Keys set, but for those that a sweep varies."""
    if "--table" in arguments:
        return arguments
    kept, varied = [], set()
    for each in arguments:
        key, equals, value = each.partition("=")
        if equals and key in KEYS and "," not in value:
            continue
        if equals and "," in value:
            varied.add(key)
        kept.append(each)
    place = next((number for number, each in enumerate(kept) if each.startswith("-")), len(kept))
    keys = [f"{key}={value}" for key, value in KEYS.items() if key not in varied]
    return [*kept[:place], *keys, *kept[place:]]
