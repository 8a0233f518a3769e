"""Completion of command lines in bash, zsh and fish.

A shell's script starts `ditmoe` with the variables below and reads an answer of lines `kind TAB word TAB help`:
`word` is a word that the last one may become, and `file` asks for the shell's own completion of paths.
"""

from collections.abc import Mapping
from typing import Any, Final

SHELL: Final = "_DITMOE_COMPLETE"
"""Is set where a shell asks."""
LINE: Final = "_DITMOE_LINE"
"""The command line up to the cursor."""
WORD: Final = "_DITMOE_WORD"
"""Of bash: what it takes for the last word, which it ends at = and :."""

SCRIPTS: Final = {
    "bash": r"""# Completion of ditmoe for bash 4.4 and later.
_ditmoe() {
    local kind word help
    COMPREPLY=()
    while IFS=$'\t' read -r kind word help; do
        if [[ $kind == file ]]; then
            compopt -o filenames
            while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$2")
        else
            [[ $word == *[=.] ]] && compopt -o nospace
            COMPREPLY+=("$word")
        fi
    done < <(_DITMOE_COMPLETE=bash _DITMOE_LINE="${COMP_LINE:0:COMP_POINT}" _DITMOE_WORD="$2" "$1" 2>/dev/null)
}
complete -F _ditmoe ditmoe
""",
    "zsh": r"""#compdef ditmoe
# Completion of ditmoe for zsh.
_ditmoe() {
    local kind word help files=0
    local -a whole begun
    while IFS=$'\t' read -r kind word help; do
        if [[ $kind == file ]]; then
            files=1
        elif [[ $word == *[=.] ]]; then
            begun+=("${word//:/\\:}${help:+:$help}")
        else
            whole+=("${word//:/\\:}${help:+:$help}")
        fi
    done < <(_DITMOE_COMPLETE=zsh _DITMOE_LINE="${(j: :)words[1,CURRENT]}" ${words[1]} 2>/dev/null)
    (( $#whole )) && _describe -V 'ditmoe' whole
    (( $#begun )) && _describe -V 'ditmoe' begun -S ''
    (( files )) && _files
}
if [[ $funcstack[1] == _ditmoe ]]; then
    _ditmoe "$@"
else
    compdef _ditmoe ditmoe
fi
""",
    "fish": r"""# Completion of ditmoe for fish.
function __ditmoe_complete
    set -l command (commandline -opc)[1]
    for line in (env _DITMOE_COMPLETE=fish _DITMOE_LINE=(commandline -cp | string collect) $command 2>/dev/null)
        set -l parts (string split \t -- $line)
        if test $parts[1] = file
            __fish_complete_path (commandline -ct)
        else
            printf '%s\t%s\n' $parts[2] $parts[3]
        end
    end
end
complete --command ditmoe --no-files --keep-order --arguments '(__ditmoe_complete)'
""",
}


def answer(command: Any, environment: Mapping[str, str]) -> str:
    """The answer to a shell.

    Args:
        command: the group of all commands.
        environment: with the variables above.
    """
    from typer._click.shell_completion import split_arg_string

    line = environment.get(LINE, "")
    words = split_arg_string(line)[1:]
    last = "" if not words or line[-1:].isspace() else words.pop()
    items, files = _items(command, words, last)
    seen = environment.get(WORD)
    lead = ""
    if seen is not None and last.endswith(seen):
        lead = last[: len(last) - len(seen)]
    lines = []
    for item in items:
        word = item.value.removeprefix(lead)
        lines.append(f"word\t{word}\t{' '.join((item.help or '').split())}")
    return "\n".join([*lines, *(["file"] if files else [])])


def _items(command: Any, words: list[str], last: str) -> tuple[list[Any], bool]:
    """What the last word may become, and whether it may be a path."""
    from typer._click.shell_completion import CompletionItem, _resolve_context, _resolve_incomplete

    context = _resolve_context(command, {}, "ditmoe", words)
    found, incomplete = _resolve_incomplete(context, words, last)
    items = found.shell_complete(context, incomplete)
    if incomplete != last:  # `--option=` is a part of the word
        lead = last.removesuffix(incomplete)
        items = [CompletionItem(f"{lead}{item.value}", help=item.help) for item in items]
    descriptor = getattr(found, "type_descriptor", None)
    takes_path = descriptor is not None and (descriptor.is_path or not items)
    return items, takes_path
