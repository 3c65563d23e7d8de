"""A verb is a function and its signature is its flags: argv -> its arguments, or one sentence that says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import tyro
from tyro._errors import BadValue, InstantiationFailure, InvalidChoice, MissingArgs, UnrecognizedArgs, on_parse_error

from finetune101.cli.help import verb_help
from finetune101.config import TrainConfig, check_name, flag_of, read_recipe
from finetune101.errors import Refused, bare, shortened
from finetune101.experiments.settings import SearchOptions
from finetune101.recipes import fitted, from_recipe, usual

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A switch that is off without its flag."""
RecipeFile = Annotated[str | None, tyro.conf.arg(name="config")]
HELP = ("-h", "--help", "--help-all")
Verb = Callable[..., int]


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The flags that decide from which settings a training begins; all flags come on top of these settings."""

    recipe: str | None = None
    config: str | None = None
    model: str = ""
    device: str = "auto"
    pretrain: bool = True
    resume: Flag = False
    exp: str = ""
    runs: str = "runs"


def call(verb: Verb, argv: Sequence[str], *, prog: str, model: str = "") -> int:
    """Calls ``verb`` with the arguments that ``argv`` gives; ``model`` is the network of the original's scripts."""
    if asked := next((word for word in argv if word in HELP), None):
        print(verb_help(verb, prog, _defaults(verb, argv, prog, model), every=asked == "--help-all"))
        return 0
    positional, named = arguments(verb, argv, prog=prog, model=model)
    return verb(*positional, **named)


def arguments(verb: Verb, argv: Sequence[str], *, prog: str, model: str = "") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments that ``argv`` gives to ``verb``. Raises Refused as ``parse`` does."""
    positional, named = parse(verb, argv, prog=prog, defaults=_defaults(verb, argv, prog, model))
    flags = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    fit = {name: fitted(value, flags) for name, value in named.items() if isinstance(value, TrainConfig)}
    return tuple(fitted(value, flags) if isinstance(value, TrainConfig) else value for value in positional), named | fit


def _defaults(verb: Verb, argv: Sequence[str], prog: str, model: str) -> dict[str, Any]:
    """The settings of a training on top of which the flags come, for the verbs that take them."""
    kinds = {name: bare(hint) for name, hint in get_type_hints(verb, include_extras=True).items()}
    if TrainConfig not in kinds.values():
        return {}
    words = [word for word in argv if word != "--resume" or "--resume" in flags_of(verb)]  # unknown to the others
    original = bool(model) or (SearchOptions in kinds.values() and not _search_options(words, prog).is_automatic)
    return {"config": first_settings(words, model, original, prog)}


def _search_options(argv: Sequence[str], prog: str) -> SearchOptions:
    """The options of a search in ``argv``, before its settings are known."""
    options: SearchOptions = _by_tyro(SearchOptions, [word for word in argv if word not in HELP], prog=prog)[0]
    return options


def first_settings(
    argv: Sequence[str], model: str = "", original: bool = False, prog: str = "finetune101 train"
) -> TrainConfig:
    """The settings before the flags of ``argv``: those of --recipe or --config, or with --resume of the run itself.

    Without any of them, the recipe that suits network and machine, or the ``original``.
    """
    words = [word for word in argv if word not in HELP]
    begin, _ = _by_tyro(Beginning, words, prog=prog)
    if begin.resume and begin.exp:
        from finetune101.run import open_run

        check_name(begin.exp)
        recorded = open_run(begin.exp, begin.runs, anywhere=False).config()
        return dataclasses.replace(recorded, runs=begin.runs)  # it may have moved
    if begin.config:
        if begin.recipe:
            raise Refused("--recipe and --config both say where to start; give one of them")
        return read_recipe(begin.config, tyro.MISSING)
    name = "original" if original else usual(begin.model, begin.device, pretrain=begin.pretrain)
    # a recipe file says itself where training starts
    config = from_recipe(begin.recipe or name, tyro.MISSING, pretrain=None if begin.pretrain else False)
    if model and begin.recipe in (None, "original"):
        return dataclasses.replace(config, model=dataclasses.replace(config.model, name=model))
    return config


def parse(
    verb: Verb, argv: Sequence[str], *, prog: str, defaults: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments of ``verb``; raises Refused naming the nearest flag for an unknown one."""

    @functools.wraps(verb)
    def keep(*positional: Any, **named: Any) -> Any:
        return positional, named

    signature = inspect.signature(verb)
    keep.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            one.replace(default=defaults[one.name]) if one.name in defaults else one
            for one in signature.parameters.values()
        ]
    )
    flags = flags_of(verb)
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"see {prog} --help"
            raise Refused(f"unknown argument {word}; {hint}")
    arguments, unknown = _by_tyro(keep, argv, prog=prog)
    if unknown:
        raise Refused(f"unknown argument {unknown[0]}; see {prog} --help")
    positional, named = arguments
    return positional, named


def _by_tyro(form: Any, argv: Sequence[str], *, prog: str) -> Any:
    """What tyro makes of ``argv`` and the words that it does not know. Raises Refused."""

    def refuse(event: Any) -> None:
        raise Refused(f"{_sentence(event)}; see {prog} --help")

    said = io.StringIO()  # neither a terminal nor UTF-8: tyro draws no colours, and frames that every console has
    try:
        with contextlib.redirect_stdout(said), on_parse_error(refuse):
            return tyro.cli(form, args=list(argv), prog=prog, return_unknown_args=True)
    finally:
        print(said.getvalue(), end="")


def flags_of(verb: Verb) -> list[str]:
    """Every flag of a verb as the user types it, with - for _."""
    return [name.replace("_", "-") for name in _flags(get_type_hints(verb, include_extras=True))]


def _flags(hints: dict[str, Any]) -> list[str]:
    names = []
    for name, hint in hints.items():
        kind, marks = bare(hint), getattr(hint, "__metadata__", ())
        if name == "return" or tyro.conf.Positional in marks:
            continue
        if dataclasses.is_dataclass(kind):
            names += _flags(get_type_hints(kind, include_extras=True))
        else:
            flag = flag_of(name, hint)
            has_pair = kind is bool and tyro.conf.FlagCreatePairsOff not in marks
            names += [f"--{flag}", *([f"--no-{flag}"] if has_pair else [])]
    return names


def _sentence(event: Any) -> str:
    """What is wrong with a command line, of which tyro's parser made ``event``."""
    if isinstance(event, MissingArgs):
        return f"missing: {', '.join(_flag(one.arg) for one in event.missing_arguments)}"
    if isinstance(event, InvalidChoice):
        return f"{_flag(event.argument)} cannot be {shortened(repr(event.value))}; give {' or '.join(event.choices)}"
    if isinstance(event, BadValue):
        got = "" if event.offending_value is None else f", not {shortened(repr(event.offending_value))}"
        return f"{_flag(event.argument)} needs {'no' if got else 'a'} value{got}"
    if isinstance(event, InstantiationFailure):
        if words := re.fullmatch(r"Could not find valid parse for arguments: \[(.*)\]\.?", event.message.strip()):
            return f"{_flag(event.argument)} cannot be {shortened(words[1])}"
        reason = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", event.message)
        reason = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", reason).strip().rstrip(".")
        return f"{_flag(event.argument)}: {shortened(reason)}" if event.argument else shortened(reason)
    if isinstance(event, UnrecognizedArgs):
        return f"unknown argument {event.tokens[0]}"
    return "the command line cannot be read"


def _flag(argument: Any) -> str:
    """How the user writes an argument."""
    return str(argument.field.intern_name) if argument.is_positional() else str(argument.lowered.name_or_flags[-1])
