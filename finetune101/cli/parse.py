"""A verb is a function and its signature is its flags: argv -> its arguments, or one sentence that says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from tyro._errors import BadValue, InstantiationFailure, InvalidChoice, MissingArgs, UnrecognizedArgs, on_parse_error

from finetune101.cli.help import verb_help
from finetune101.config import ModelConfig, TrainConfig, check_name, flag_of, read_recipe
from finetune101.errors import Refused, bare, must_be, shortened, shown
from finetune101.experiments.settings import SearchOptions
from finetune101.recipes import fitted, from_recipe, usual

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A switch that is off without its flag."""
RecipeFile = Annotated[str | None, tyro.conf.arg(name="config")]
HELP = ("-h", "--help", "--help-all")
Verb = Callable[..., int]


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
    """The settings of a training on top of which the flags come, for the verbs that take them.

    The flags are read twice: here on top of none, to see which recipe, file or run the settings begin with.
    """
    kinds = {name: bare(hint) for name, hint in get_type_hints(verb, include_extras=True).items()}
    if TrainConfig not in kinds.values():
        return {}
    words = [word for word in argv if word not in HELP]
    positional, named = parse(verb, words, prog=prog, defaults={"config": UNSET})
    values = inspect.signature(verb).bind(*positional, **named).arguments
    options = values.get("options")
    is_plain_search = isinstance(options, SearchOptions) and not options.is_automatic
    file = values.get("recipe_file") or getattr(options, "recipe_file", None)
    resume = getattr(options, "resume", False)
    return {"config": first_settings(values["config"], file, resume, model, bool(model) or is_plain_search)}


UNSET = TrainConfig(exp="", model=ModelConfig(name=""))


def first_settings(flags: TrainConfig, file: str | None, resume: bool, model: str, original: bool) -> TrainConfig:
    """The settings before the ``flags``: those of --recipe, of the recipe ``file``, or to ``resume`` of the run itself.

    Without any of them, the recipe that suits network and machine, or the ``original``; ``model`` is the network of
    the original's scripts. Raises Refused.
    """
    if resume and flags.exp:
        from finetune101.run import open_run

        check_name(flags.exp)
        recorded = open_run(flags.exp, flags.runs, anywhere=False).config()
        return dataclasses.replace(recorded, runs=flags.runs)  # it may have moved
    if file:
        if flags.recipe:
            raise Refused("--recipe and --config both say where to start; give one of them")
        return read_recipe(file, tyro.MISSING)
    pretrain = flags.model.pretrain
    name = "original" if original else usual(flags.model.name, flags.system.device, pretrain=pretrain)
    # a recipe file says itself where training starts
    config = from_recipe(flags.recipe or name, tyro.MISSING, pretrain=None if pretrain else False)
    if model and flags.recipe in (None, "original"):
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
        raise Refused(f"{_sentence(event, argv)}; see {prog} --help")

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


def _sentence(event: Any, argv: Sequence[str]) -> str:
    """What is wrong with the command line ``argv``, of which tyro's parser made ``event``."""
    if isinstance(event, MissingArgs):
        return f"missing: {', '.join(_flag(one.arg) for one in event.missing_arguments)}"
    if isinstance(event, InvalidChoice):
        return f"{_flag(event.argument)} cannot be {shortened(repr(event.value))}; give {' or '.join(event.choices)}"
    if isinstance(event, BadValue):
        got = "" if event.offending_value is None else f", not {shortened(repr(event.offending_value))}"
        return f"{_flag(event.argument)} needs {'no' if got else 'a'} value{got}"
    if isinstance(event, InstantiationFailure):
        if not event.argument:
            return shortened(event.message.strip().rstrip("."))
        flag, kind = _flag(event.argument), _without_none(event.argument.field.type)
        values = _values(argv, flag)
        value = " ".join(values if get_origin(kind) is tuple else values[:1])
        return f"{flag} is {shown(value)}; give {must_be(kind)}"
    if isinstance(event, UnrecognizedArgs):
        return f"unknown argument {event.tokens[0]}"
    return "the command line cannot be read"


def _flag(argument: Any) -> str:
    """How the user writes an argument."""
    return str(argument.field.intern_name) if argument.is_positional() else str(argument.lowered.name_or_flags[-1])


def _values(argv: Sequence[str], flag: str) -> list[str]:
    """The words that ``argv`` gives to ``flag``, where it is given last."""
    values: list[str] = []
    is_own = False
    for word in argv:
        name, sign, value = word.partition("=")
        if name.startswith("--"):
            is_own = name.replace("_", "-") == flag
            values = ([value] if sign else []) if is_own else values
        elif is_own:
            values.append(word)
    return values


def _without_none(hint: Any) -> Any:
    """``hint`` without None: no flag is given the value None."""
    options = [option for option in get_args(hint) if option is not type(None)]
    return options[0] if type(None) in get_args(hint) and len(options) == 1 else hint
