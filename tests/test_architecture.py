"""The shape of the house: who may import whom, what stays light, and one version number."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import finetune101

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "finetune101"
# left never imports right; each room, and each module at the top, has a rank of its own
ORDER = (
    "standalone", "errors", "redaction", "files", "schemas", "config", "host", "recipes", "run", "machine", "models",
    "data", "fast", "evaluation", "training", "deploy", "doctor", "serve", "experiments", "reports", "many_runs", "api",
    "demo", "cli", "original", "__main__",
)  # fmt: skip
RANK = {name: rank for rank, name in enumerate(ORDER)}
HEAVY = {"torch", "torchvision", "timm", "scipy", "matplotlib", "tensorboard", "jinja2", "optuna"}
LIGHT = (
    "config",
    "recipes",
    "run",
    "cli.parse",
    "cli.main",
    "cli.one_run",
    "cli.many_runs",
    "cli.others",
    "original",
    "experiments.space",
    "data.images",
    "data.splits",
)


def module_name(file: Path) -> str:
    """finetune101/data/splits.py -> finetune101.data.splits"""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def statements(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """All nodes below ``tree``; without ``inside_functions`` only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not inside_functions and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            continue
        yield node
        yield from statements(node, inside_functions)


def imports(name: str, inside_functions: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything that the module imports; names of our own modules are resolved fully."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(file.read_text(encoding="utf-8")), inside_functions):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield node.lineno, full if full in MODULES else source


def room(name: str) -> str:
    """finetune101.data.splits -> data"""
    return name.split(".")[1]


def test_every_module_has_a_place_in_the_order() -> None:
    rooms = {room(name) for name in MODULES if name != "finetune101"}
    assert rooms <= RANK.keys(), f"give these a place in ORDER: {sorted(rooms - RANK.keys())}"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "finetune101"])
def test_left_never_imports_right(name: str) -> None:
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{line} imports {target}"
        for line, target in imports(name, inside_functions=True)
        if target.startswith("finetune101.") and RANK[room(target)] > RANK[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_nothing_at_once() -> None:
    own = [target for _, target in imports("finetune101", inside_functions=False) if target.startswith("finetune101")]
    assert not own


@pytest.mark.parametrize("light", LIGHT)
def test_light_modules_import_nothing_heavy(light: str) -> None:
    start = f"finetune101.{light}"
    todo, seen, heavy = [(start, start)], {start}, []
    while todo:
        name, chain = todo.pop()
        for line, target in imports(name, inside_functions=False):
            if target.split(".")[0] in HEAVY:
                heavy.append(f"{chain}:{line} imports {target}")
            # importing a.b.c runs the __init__ of a and of a.b as well
            for module in (target, target.rpartition(".")[0]):
                if module in MODULES and module not in seen:
                    seen.add(module)
                    todo.append((module, f"{chain}:{line} -> {module}"))
    assert not heavy, "\n".join(heavy)


def test_the_command_line_starts_without_anything_heavy() -> None:
    code = "import sys, finetune101.cli.main; print(*sorted(set(sys.argv[1:]) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == []


def text_files() -> Iterator[tuple[str, str]]:
    """(path, text) of every text file that is committed or would be."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "core.quotePath=off", "ls-files", "-co", "--exclude-standard"]
    for path in subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines():
        if (ROOT / path).is_file():
            try:
                yield path, (ROOT / path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_only_ci_knows_a_folder_outside_the_checkout() -> None:
    outside = re.compile(r"\.\./shared\b")
    assert [path for path, text in text_files() if path != ".ci/run" and outside.search(text)] == []


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    top = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert top and project["version"] == finetune101.__version__ == top[1]


def test_the_lock_names_exact_versions_and_no_registry() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert [
        e for e in entries if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+(; [a-z_]+ [<>=!]+ \"[^\"]+\")?", e)
    ] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    locked = {entry.split("==")[0].lower().replace("_", "-") for entry in entries}
    assert {re.split("[<>=!]", name)[0] for name in wanted} <= locked


def test_the_page_on_design_names_every_module() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    modules = {file.relative_to(PACKAGE).as_posix() for file in MODULES.values() if file.name != "__init__.py"}
    missing = sorted(name for name in modules if f"| `{name}` |" not in text)
    assert not missing, f"give these a line in the tree of docs/design.md: {missing}"


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared += project["dependencies"]
    names = {re.split(r"[^A-Za-z0-9_.\-]", line)[0].lower().replace("_", "-") for line in declared}
    packages = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "pillow_heif": "pillow-heif"}
    imported = {
        target.split(".")[0]
        for name in MODULES
        for _, target in imports(name, inside_functions=True)
        if target.split(".")[0] not in {*sys.stdlib_module_names, "finetune101"}
    }
    missing = {name for name in imported if packages.get(name, name).lower().replace("_", "-") not in names}
    assert not missing, f"declare these in pyproject.toml: {sorted(missing)}"
