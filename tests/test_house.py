"""The house rules of the design, read from the files themselves."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("freeze", "data", "features")
COMMANDS = ("train", "evaluate", "compare")
TOP = (*ROOMS, *COMMANDS, "example", "plot")
OTHERS_FOR_ROOMS = {"torch", "torchvision", "numpy", "PIL"}
NOT_ON_WINDOWS = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog"}
PLUMBING = {f"plumbing.{file.stem}" for file in (ROOT / "plumbing").glob("*.py")}
STUDY = {f"study.{file.stem}" for file in (ROOT / "study").glob("*.py")}
OURS = {*TOP, "plumbing", "study", *PLUMBING, *STUDY}
PYTHON = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("study/*.py")])
SHELL = sorted([*ROOT.glob("*.sh"), *ROOT.glob("tests/*.sh")])
TESTS = sorted((ROOT / "tests").glob("*.py"))
SETTINGS = sorted([*ROOT.glob("*.toml"), *ROOT.glob("*.ini"), *ROOT.glob("*.txt")])


def short(file: Path) -> str:
    return str(file.relative_to(ROOT))


def file_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def imports(module: str, whole: bool = True) -> set[str]:
    """What a file imports: `from plumbing import cache` is plumbing.cache, and `from data import
    transform` is data:transform. whole: in its functions too."""
    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    nodes = tree.body
    if whole:
        for node in ast.walk(tree):  # what is imported for its type alone does not count
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        nodes = list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by dots"
            found |= {imported(node.module, alias.name) for alias in node.names}
    return found


def imported(module: str, name: str) -> str:
    if f"{module}.{name}" in OURS:
        return f"{module}.{name}"
    return f"{module}:{name}"


def ours(module: str) -> set[str]:
    """The modules of ours that it imports."""
    modules = {name.split(":")[0] for name in imports(module)}
    return modules & OURS


def others(module: str) -> set[str]:
    """The packages of others that it imports."""
    packages = {name.split(":")[0].split(".")[0] for name in imports(module)}
    return packages - OURS - set(sys.stdlib_module_names)


# ---------------------------------------------------------------- who may import whom


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_nothing_of_ours(room):
    mine = {name for name in imports(room) if name.split(":")[0] in OURS}
    allowed = set()
    if room == "features":
        allowed = {"data:UserError", "data:transform"}
    assert mine == allowed and others(room) <= OTHERS_FOR_ROOMS


def test_the_example_needs_the_rooms_alone():
    assert ours("example") == set(ROOMS)
    assert others("example") <= OTHERS_FOR_ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_prints_nothing_and_imports_on_every_system(room):
    modules = {name.split(":")[0].split(".")[0] for name in imports(room)}
    assert not modules & NOT_ON_WINDOWS
    tree = ast.parse(file_of(room).read_text(encoding="utf-8"))
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "print" not in {getattr(function, "id", None) for function in called}


@pytest.mark.parametrize("module", sorted(PLUMBING))
def test_plumbing_imports_rooms_and_plumbing(module):
    assert ours(module) <= {*ROOMS, *PLUMBING}
    assert others(module) <= {*OTHERS_FOR_ROOMS, "filelock"}
    at_the_top = {name.split(":")[0] for name in imports(module, whole=False)}
    assert not at_the_top & NOT_ON_WINDOWS


def test_plumbing_imports_downwards():
    """No circle: what has no imports left is taken away until nothing is left."""
    left = {module: ours(module) & PLUMBING for module in PLUMBING}
    while left:
        lowest = {module for module, below in left.items() if not below & left.keys()}
        assert lowest, f"a circle among {sorted(left)}"
        left = {module: below for module, below in left.items() if module not in lowest}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_rooms_and_plumbing(command):
    assert ours(command) <= {*ROOMS, *PLUMBING, "plumbing"}
    assert others(command) <= OTHERS_FOR_ROOMS


def test_plot_imports_the_way_of_ending_a_command_and_nothing_else_of_ours():
    assert ours("plot") <= {"plumbing.cli"}
    assert "matplotlib" in others("plot")


def test_only_plot_and_study_use_matplotlib():
    for file in PYTHON:
        if file.name != "plot.py" and file.parent.name != "study":
            module = str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
            assert "matplotlib" not in others(module)


# ---------------------------------------------------------------- length and layout


def functions(file: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def is_a_list_of_flags(function: ast.FunctionDef) -> bool:
    """Whether most of what it does is to call add(...)."""
    expressions = [node.value for node in function.body if isinstance(node, ast.Expr)]
    calls = [value.func for value in expressions if isinstance(value, ast.Call)]
    flags = [called for called in calls if getattr(called, "id", None) == "add"]
    return len(flags) > len(function.body) / 2


@pytest.mark.parametrize("file", PYTHON, ids=short)
def test_no_function_is_longer_than_a_screen(file):
    for function in functions(file):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 40 or is_a_list_of_flags(function), f"{function.name}: {lines} lines"


@pytest.mark.parametrize("file", [*PYTHON, *SHELL, *TESTS], ids=short)
def test_lines_are_at_most_100_columns(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    long = [number for number, line in enumerate(lines, start=1) if len(line) > 100]
    assert not long


@pytest.mark.parametrize("file", [*PYTHON, *SHELL, *TESTS, *SETTINGS], ids=short)
def test_no_tabs_and_nothing_at_the_end_of_a_line(file):
    text = file.read_text(encoding="utf-8")
    assert "\t" not in text and "\r" not in text
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_the_story_stays_short():
    assert len(file_of("train").read_text().splitlines()) <= 190
