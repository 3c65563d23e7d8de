"""The command line: {verb: where its function is}; nothing is imported before a verb is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import finetune101
from finetune101.cli.console import expanded, guarded
from finetune101.errors import Refused
from finetune101.host import place, thread_count

DATA_VERBS = {"download": "others:data_download", "verify": "others:data_verify", "show": "others:data_show"}
VERBS = {
    "train": "one_run:train",
    "evaluate": "one_run:evaluate",
    "predict": "one_run:predict",
    "card": "one_run:card",
    "explain": "explain:explain",
    "embed": "explain:embed",
    "export": "export:export",
    "serve": "serve:serve",
    "ensemble": "many_runs:ensemble",
    "compare": "many_runs:compare",
    "report": "many_runs:report",
    "study": "many_runs:study",
    "search": "many_runs:search",
    "auto": "many_runs:auto",
    "lr-find": "one_run:lr_find",
    "recipes": "others:recipes",
    "benchmark": "others:benchmark",
    "cache": "others:cache",
    "doctor": "others:doctor",
    "demo": "others:demo",
}
LISTS = ("--train-per-class", "--models", "--arms")
"""Flags whose values may also be separated by commas."""
ABOUT = """usage: finetune101 VERB ...  (finetune101 VERB --help for its flags)

  data download|verify|show   get Caltech-101, check every image, draw a contact sheet
  train      fine-tune a pretrained network, or train from random initialisation (--no-pretrain)
  evaluate   score a run on its test images
  predict    label images with a run; write a table, sort them into folders
  card       a model card: data, accuracy, limits and licences of a run
  explain    show where a network looks in images, and the nearest training images
  embed      write what a network sees in images to a file: features and probabilities
  export     a network as one file for other programs (ONNX, int8, ...), its answers compared
  serve      a page on this machine that tries a network in the browser
  ensemble   score the mean probabilities of several runs
  compare    tested runs or groups of runs: paired difference with interval, tests, cost, curves
  report     one page about a run, a comparison or a study
  study      seeds x splits x arms x networks x training sizes, trained, tested and summed up
  auto       the best network for a folder of photos that fits into a time, e.g. auto photos --budget 30m
  search     hyper-parameters: grid, random or TPE, with pruning; search report DIR explains it
  lr-find    a learning-rate range test: the loss at growing rates, and a suggestion
  recipes    the named recipes of train
  benchmark  how fast this machine trains; --inference RUN: how fast a network answers
  cache      list or clear the folder of decoded images and features
  doctor     what is wrong with this machine for training, and the command that mends it
  demo       all of it on a small drawn data set

finetune101 --version tells the version; --debug before a verb shows the traceback of every error;
source <(finetune101 --completion) completes verbs and flags in bash and, after bashcompinit, in zsh.
"""


def dispatch(argv: Sequence[str]) -> int:
    """Calls the verb that ``argv`` starts with. Raises Refused for an unknown one."""
    verbs, words, name, prog = VERBS, expanded(argv), "verb", "finetune101"
    if words[:1] == ["data"]:
        verbs, words, name, prog = DATA_VERBS, words[1:], "data verb", "finetune101 data"
    if not words or words[0] in ("-h", "--help"):
        print(ABOUT.strip())
        return 0
    if words[0] == "--version":
        print(f"finetune101 {finetune101.__version__}")
        return 0
    if words[0] == "--completion":
        from finetune101.cli.completion import completion_script

        print(completion_script(VERBS, DATA_VERBS))
        return 0
    if words[0] not in verbs:
        near = difflib.get_close_matches(words[0], verbs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(verbs)}"
        raise Refused(f"unknown {name} {words[0]!r}; {hint}")
    if place().size > 1 and words[0] != "train":
        raise Refused(f"only train runs in several processes; start {words[0]} without torchrun")
    home, prog, rest = verbs[words[0]], f"{prog} {words[0]}", words[1:]
    if home == VERBS["search"] and rest[:1] == ["report"]:
        home, prog, rest = "many_runs:search_report", f"{prog} report", rest[1:]
    return _call(home, rest, prog)


def _call(home: str, words: list[str], prog: str) -> int:
    from finetune101.cli.parse import call

    module, _, function = home.partition(":")
    verb = getattr(importlib.import_module(f"finetune101.cli.{module}"), function)
    if function == "lr_find":
        words = ["--exp", "lr-find", *words]
    return call(verb, split_lists(words) if function in ("study", "auto") else words, prog=prog)


def split_lists(argv: Sequence[str]) -> list[str]:
    """Lists may have commas: --train-per-class 1,2,5 (or =1,2,5) is --train-per-class 1 2 5."""
    words: list[str] = []
    flag = ""
    for word in argv:
        name, sign, values = word.partition("=")
        flag = name if word.startswith("--") else flag
        listed = flag.replace("_", "-") in LISTS
        if listed and word.startswith("--"):
            words += [name, *(part for part in values.split(",") if part)] if sign else [word]
        else:
            words += [part for part in word.split(",") if part] if listed else [word]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``finetune101`` and ``python -m finetune101``; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = words[:1] == ["--debug"]

    def call() -> int:
        if argv is None:  # before torch is loaded, which takes the cores of the machine
            os.environ.setdefault("OMP_NUM_THREADS", str(thread_count()))
        return dispatch(words[debug:])

    return guarded(call, debug=debug, verb="".join(words[debug:][:1]))
