"""Completion of verbs and flags in bash, and in zsh by its bashcompinit."""

from __future__ import annotations

import importlib
from collections.abc import Mapping


def completion_script(verbs: Mapping[str, str], data_verbs: Mapping[str, str]) -> str:
    """The script that a shell reads: ``source <(finetune101 --completion)``; verbs map to module:function of cli."""
    from finetune101.cli.parse import flags_of

    cases = []
    for prefix, homes in (("", verbs), ("data ", data_verbs)):
        for name, home in homes.items():
            module, _, function = home.partition(":")
            flags = flags_of(getattr(importlib.import_module(f"finetune101.cli.{module}"), function))
            cases.append(f'    "{prefix}{name}") words="{" ".join([*flags, "--help", "--help-all"])}" ;;')
    names = " ".join(["data", *verbs, "--help", "--version", "--completion", "--debug"])
    lines = [
        "_finetune101() {",
        "  local verb words",
        '  if [ "${COMP_WORDS[1]}" = --debug ]; then',
        '    COMP_WORDS=("${COMP_WORDS[0]}" "${COMP_WORDS[@]:2}")',
        "    ((COMP_CWORD--))",
        "  fi",
        "  verb=${COMP_WORDS[1]}",
        '  [ "$verb" = data ] && [ "$COMP_CWORD" -gt 2 ] && verb="data ${COMP_WORDS[2]}"',
        '  [ "$COMP_CWORD" -eq 1 ] && verb=',
        '  case "$verb" in',
        f'    "") words="{names}" ;;',
        f'    data) words="{" ".join(data_verbs)}" ;;',
        *cases,
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))',
        "}",
        "complete -o default -F _finetune101 finetune101",
    ]
    return "\n".join(lines)
