"""The house rules of the design, read from the files themselves."""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = {"freeze", "data", "features"}
PLUMBING = {f"plumbing.{file.stem}" for file in (ROOT / "plumbing").glob("[!_]*.py")}
STUDY = {f"study.{file.stem}" for file in (ROOT / "study").glob("*.py")}
MODULES = {*ROOMS, *PLUMBING, "train", "evaluate", "compare", "example", "plot"}
NOT_ON_WINDOWS = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog"}
PYTHON = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("study/*.py")])
SHELL = sorted([*ROOT.glob("*.sh"), *ROOT.glob("tests/*.sh")])


def parsed(module: str) -> ast.Module:
    file = ROOT / f"{module.replace('.', '/')}.py"
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Dotted names: `from data import transform` is data.transform."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import by dots"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    """The modules of ours that it imports."""
    names = imports(ast.walk(parsed(module)))
    parents = {name.rpartition(".")[0] for name in names}
    return (names | parents) & {*MODULES, *STUDY, "study"}


def others(nodes: Iterable[ast.AST]) -> set[str]:
    return {name.split(".")[0] for name in imports(nodes)} - {*MODULES, "plumbing", "study"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_what_it_may(module):
    may = {*ROOMS, *PLUMBING}
    packages = {"torch", "torchvision", "numpy", "PIL"}
    if module in ROOMS:
        may = {"data"} if module == "features" else set()
    if module == "example":
        may = ROOMS
    if module in PLUMBING:
        packages.add("filelock")
    if module == "plot":
        may, packages = {"plumbing.cli"}, {"matplotlib", "numpy"}
    assert ours(module) <= may
    if module == "features":
        names = imports(ast.walk(parsed(module)))
        assert {name for name in names if "data" in name} == {"data.transform", "data.UserError"}
    assert others(ast.walk(parsed(module))) - sys.stdlib_module_names <= packages


@pytest.mark.parametrize("module", sorted(ROOMS | PLUMBING))
def test_rooms_and_plumbing_import_on_every_system_and_rooms_print_nothing(module):
    nodes = list(ast.walk(parsed(module)))
    called = {getattr(node.func, "id", None) for node in nodes if isinstance(node, ast.Call)}
    assert module in PLUMBING or "print" not in called
    if module in PLUMBING:  # which may ask for more inside a function
        nodes = parsed(module).body
    assert not others(nodes) & NOT_ON_WINDOWS


def test_plumbing_imports_downwards():
    """No circle: what has no imports left is taken away until nothing is left."""
    left = {module: ours(module) & PLUMBING for module in PLUMBING}
    while left:
        lowest = {module for module, below in left.items() if not below & left.keys()}
        assert lowest, f"a circle among {sorted(left)}"
        left = {module: below for module, below in left.items() if module not in lowest}


def test_compare_does_not_wait_for_torchvision():
    """Importing it takes seconds."""
    reached, more = set(), {"compare"}
    while more:
        reached |= more
        more = set().union(*map(ours, more)) - reached
    assert not [name for name in reached if "torchvision" in others(parsed(name).body)]


def is_a_list_of_flags(function: ast.FunctionDef) -> bool:
    """Whether most of what it does is to call add(...)."""
    flags = [node for node in function.body if ast.unparse(node).startswith("add(")]
    return len(flags) > len(function.body) / 2


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long(file: Path):
    text = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not is_a_list_of_flags(node):
            assert node.end_lineno - node.lineno < 40, f"{node.name} is longer than a screen"
    longest = {"train.py": 190}.get(file.name, 250)
    assert text.count("\n") <= longest
    assert len(PLUMBING) <= 15


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_lines_of_a_shell_script_are_at_most_100_columns(file: Path):
    assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 100
