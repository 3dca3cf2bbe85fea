"""The house rules of the design, read from the files themselves."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = {"freeze", "data", "features"}
COMMANDS = {"train", "evaluate", "compare"}
PLUMBING = {f"plumbing.{file.stem}" for file in (ROOT / "plumbing").glob("[!_]*.py")} | {"plumbing"}
MODULES = {*ROOMS, *COMMANDS, *PLUMBING, "example", "plot"}
OURS = {*MODULES, "study", *(f"study.{file.stem}" for file in (ROOT / "study").glob("*.py"))}
NOT_ON_WINDOWS = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog"}
PYTHON = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("study/*.py")])
SHELL = sorted([*ROOT.glob("*.sh"), *ROOT.glob("tests/*.sh")])


def parsed(module: str) -> ast.Module:
    file = ROOT / f"{module.replace('.', '/')}.py"
    if module == "plumbing":
        file = ROOT / "plumbing/__init__.py"
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(nodes: list[ast.AST]) -> set[str]:
    """Dotted names: `from data import transform` is data.transform."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import by dots"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def everywhere(module: str) -> list[ast.AST]:
    """The file's nodes, in its functions too, without those that are there for types alone."""
    tree = parsed(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    return list(ast.walk(tree))


def ours(module: str) -> set[str]:
    """The modules of ours that it imports."""
    found = set()
    for name in imports(everywhere(module)):
        parent = name.rpartition(".")[0]
        found |= {name, parent} & OURS
    return found - {"plumbing"}


def others(nodes: list[ast.AST]) -> set[str]:
    return {name.split(".")[0] for name in imports(nodes)} - {"plumbing", *OURS}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_what_it_may(module):
    may = {*ROOMS, *PLUMBING}
    packages = {"torch", "torchvision", "numpy", "PIL"}
    if module in ROOMS:
        may = set()
    if module == "features":
        mine = {name for name in imports(everywhere(module)) if name.startswith("data")}
        may, _ = {"data"}, mine.remove("data.transform")
        assert mine <= {"data.UserError"}
    if module == "example":
        may = ROOMS
    if module in PLUMBING:
        packages.add("filelock")
    if module == "plot":
        may, packages = {"plumbing.cli"}, {"matplotlib", "numpy"}
    assert ours(module) <= may
    assert others(everywhere(module)) - sys.stdlib_module_names <= packages


@pytest.mark.parametrize("module", sorted(ROOMS | PLUMBING))
def test_rooms_and_plumbing_import_on_every_system(module):
    nodes = parsed(module).body
    if module in ROOMS:
        nodes = everywhere(module)
    assert not others(nodes) & NOT_ON_WINDOWS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_prints_nothing(room):
    called = [node.func for node in everywhere(room) if isinstance(node, ast.Call)]
    assert "print" not in {getattr(function, "id", None) for function in called}


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
    expressions = [node.value for node in function.body if isinstance(node, ast.Expr)]
    calls = [value.func for value in expressions if isinstance(value, ast.Call)]
    flags = [called for called in calls if getattr(called, "id", None) == "add"]
    return len(flags) > len(function.body) / 2


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long(file: Path):
    text = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not is_a_list_of_flags(node):
            assert node.end_lineno - node.lineno < 40, f"{node.name} is longer than a screen"
    longest = 250
    if file.name == "train.py":
        longest = 190
    assert text.count("\n") <= longest


def test_plumbing_is_at_most_15_files():
    assert len(PLUMBING - {"plumbing"}) <= 15


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_lines_of_a_shell_script_are_at_most_100_columns(file: Path):
    assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 100
