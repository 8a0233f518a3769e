"""Every command, option and key that a page names is one of the program, and every block is of a known kind."""

import re
from typing import Any

import pytest
import yaml

from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.sampling.comparison.cells import ComparisonConfig
from ditmoe.slurm.submission.settings import JobSettings
from tests.docs.pages import (
    SHELL,
    blocks,
    ditmoe_commands,
    outside_blocks,
    pages,
    read,
    shell_blocks,
    spans,
    typed,
)
from tests.docs.program import is_key, options, problem_of, sections, unknown_keys

LANGUAGES = SHELL | {"text", "yaml", "python", "json"}
OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(sections())})(?:\.[a-z0-9_]+)+")
FILE = re.compile(r"\.(?:py|json|jsonl|yaml|md|png|pt|npz|safetensors|txt)$")

OTHERS_OPTIONS = {
    "sbatch, srun": {"--dependency", "--signal", "--gpus-per-task", "--ntasks-per-node", "--kill-on-bad-exit"},
    "torchrun": {"--nproc-per-node", "--standalone"},
    "apptainer": {"--nv"},
    "tensorboard": {"--logdir"},
    "benchmarks/": {"--compact", "--repeats", "--only"},
    "docker": {"--ipc", "--user", "--build-arg"},
    "DiT, DiT-MoE": {"--data-path", "--results-dir", "--epochs", "--global-batch-size", "--global-seed", "--model"}
    | {"--log-every", "--ckpt-every", "--ckpt", "--num_experts", "--num_experts_per_tok", "--num-sampling-steps"}
    | {"--num-fid-samples", "--per-proc-batch-size", "--num-workers"},
    "SiT": {"--path-type", "--prediction", "--sampling-method", "--atol", "--rtol"},
    "EDM2": {"--outdir", "--cond", "--duration", "--batch-gpu", "--status", "--snapshot", "--checkpoint", "--lr"}
    | {"--decay", "--fp16", "--dropout", "--net", "--gnet", "--guidance", "--class", "--rho", "--sigma_min"}
    | {"--sigma_max", "--S_churn", "--S_min", "--S_max", "--S_noise", "--ref", "--images"},
}
"""Options that pages name and that are other programs', by these."""

FILES_OF_SETTINGS: list[type[Any]] = [RunConfig, ComparisonConfig, JobSettings]
"""What a block of YAML may be: a run, a grid, a site."""


@pytest.mark.parametrize("page", pages())
def test_blocks_are_of_a_known_kind(page: str) -> None:
    """A block without a language is walked: so that nothing is left out by a misspelt word."""
    assert read(page).count("```") == 2 * len(blocks(page)), f"{page}: a block that does not end, or is not found"
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: a block of {block.language!r}"


@pytest.mark.parametrize("page", pages())
def test_commands_stand_in_fences(page: str) -> None:
    """A block that is only indented would be neither parsed nor walked."""
    indented = re.findall(r"^ {4,}(?:\$ )?ditmoe .*$", outside_blocks(read(page)), re.MULTILINE)
    assert not indented, f"{page}: put between fences: {indented}"


@pytest.mark.parametrize("page", pages())
def test_commands_of_blocks_parse(page: str) -> None:
    wrong = [
        f"{page}:{block.line}: ditmoe {' '.join(arguments)}: {problem}"
        for block in shell_blocks(page)
        for arguments in ditmoe_commands(typed(block))
        if (problem := problem_of(arguments)) is not None
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages())
def test_commands_in_sentences_parse(page: str) -> None:
    wrong = [
        f"{page}: `{span}`: {problem}"
        for span in spans(page)
        if re.search(r"\bditmoe(?:\.launcher)? ", span)
        for arguments in ditmoe_commands(span)
        if (problem := problem_of(arguments, whole=False)) is not None
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages())
def test_options_are_the_program_s(page: str) -> None:
    known = options().union(*OTHERS_OPTIONS.values())
    lost = {name for span in spans(page) for name in OPTION.findall(span)} - known
    assert not lost, f"{page} names {', '.join(sorted(lost))}, which no command has"


@pytest.mark.parametrize("page", pages())
def test_keys_are_the_configuration_s(page: str) -> None:
    lost = {
        key
        for text in [*spans(page), *(typed(block) for block in shell_blocks(page))]
        for key in KEY.findall(text)
        if not FILE.search(key) and not is_key(key)
    }
    assert not lost, f"{page} names {', '.join(sorted(lost))}, which the configuration has not"


@pytest.mark.parametrize("page", pages())
def test_blocks_of_yaml_are_files_of_settings(page: str) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            values = yaml.safe_load(block.text)
            unknown = {kind.__name__: list(unknown_keys(values, kind)) for kind in FILES_OF_SETTINGS}
            assert not all(unknown.values()), f"{page}:{block.line}: {unknown}"


def test_other_programs_options_are_needed() -> None:
    named = {name for page in pages() for span in spans(page) for name in OPTION.findall(span)}
    for program, names in OTHERS_OPTIONS.items():
        assert names <= named, f"no page names {', '.join(sorted(names - named))} of {program} any longer"
        assert not names & options(), f"{', '.join(sorted(names & options()))}: these are our own"


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("ditmoe train a.yaml  # resumes\n\nX=1 ditmoe models", [["train", "a.yaml"], ["models"]]),
        ("ditmoe plan a \\\n  --gpus 8 | head && ditmoe status &", [["plan", "a", "--gpus", "8"], ["status"]]),
        ("torchrun --standalone -m ditmoe.launcher sample r", [["sample", "r"]]),
        ("srun -n 2 ditmoe train 'a b'; .venv/bin/ditmoe models", [["train", "a b"], ["models"]]),
        ("ditmoe configs a > b/ditmoe; ditmoe models 2>&1 | cat", [["configs", "a"], ["models", "2"]]),
        ("cat > x <<'END'\nditmoe nonsense\nEND\nditmoe models", [["models"]]),
        ("python -m pip install ditmoe\ncd ditmoe\necho 'ditmoe\ntrain'", []),
    ],
)
def test_the_search_for_commands(shell: str, expected: list[list[str]]) -> None:
    assert list(ditmoe_commands(shell)) == expected


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("train configs/demo.yaml train.stepz=3", "train.stepz"),
        ("train configs/demo.yaml train.steps=many", "train.steps"),
        ("train configs/demo.yaml --dryrun", "--dryrun"),
        ("trian configs/demo.yaml", "train"),
        ("data pack digits", "OUT"),
        ("submit evaluate runs/photos --nodes 2 --counts 5", "--count"),
        ("sweep configs/demo.yaml optim.rate=1,2", "optim.rate"),
    ],
)
def test_what_a_wrong_command_is_told(command: str, found: str) -> None:
    problem = problem_of(command.split())
    assert problem is not None and found in problem


def test_what_a_part_of_a_command_may_leave_out() -> None:
    assert problem_of(["data", "pack"], whole=False) is None
    assert problem_of(["evaluate", "RUN", "--count", "N"], whole=False) is None
    assert problem_of(["evaluate", "RUN", "--counts"], whole=False) is not None
    assert problem_of(["evaluates", "RUN"], whole=False) is not None


def test_unknown_keys_of_a_file() -> None:
    values = {"train": {"steps": 3, "speed": 1}, "data": {"sources": [{"path": "x", "wait": 2}]}, "site": 1}
    assert list(unknown_keys(values, RunConfig)) == ["train.speed", "data.sources.wait", "site"]
