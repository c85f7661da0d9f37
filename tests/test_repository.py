"""The rules of the house: who may import whom, how long files and functions may be, and what starts without torch."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {"weight_selection.py", "main.py", "engine.py", "datasets.py", "optim_factory.py", "utils.py"}
LEVELS = [  # imports run from a level to itself or to those above it here
    {"weight_selection"},
    {"utils"},
    {"distributed"},
    {"input_pipeline", "datasets", "optim_factory", "models"},
    {"engine"},
    {"training"},
    {"main", "weight_selection.py"},
    {"scripts", "experiments", "benchmarks", "examples"},
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
HEAVY = {"timm", "torchvision", "transformers", "huggingface_hub"}
WITHOUT_TORCH = (
    "main datasets models training.options distributed.program distributed.parent "
    "weight_selection weight_selection.errors weight_selection.arguments weight_selection.files "
    "weight_selection.image_files weight_selection.options weight_selection.commands weight_selection.cli "
    "weight_selection.sources weight_selection.sources.names weight_selection.sources.directories "
    "weight_selection.sources.hub weight_selection.sources.recipe weight_selection.sources.widths"
)


def room_of(path):
    """The directory at the top in which a file is, or the module that it is."""
    first = path.relative_to(ROOT).parts[0]
    return first if first == "weight_selection.py" else first.removesuffix(".py")


FILES = [path for path in sorted(ROOT.glob("*.py")) if path.name in PROGRAMS]
FILES += [path for room in sorted(LEVEL) for path in sorted((ROOT / room).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported(nodes):
    """Full names of the modules that these statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def at_import(tree):
    """The statements that run when a module is imported: not those in functions."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef):
            waiting += list(ast.iter_child_nodes(node))


@functools.cache
def parse(path):
    return ast.parse(path.read_text())


@functools.cache
def arrows():
    """[(file, its room, room that it imports)] for every import between two rooms, also in functions."""
    found = []
    for path in FILES:
        targets = [name.partition(".")[0] for name in imported(ast.walk(parse(path)))]
        here = room_of(path)
        found += [(str(path.relative_to(ROOT)), here, room) for room in targets if room in LEVEL and room != here]
    return found


def test_imports_run_downwards():
    assert not [f"{file} imports {target}" for file, own, target in arrows() if LEVEL[target] > LEVEL[own]]


def test_rooms_of_one_level_do_not_import_each_other_in_a_circle():
    graph = {room: {target for _, own, target in arrows() if own == room} for room in LEVEL}
    while free := [room for room, targets in graph.items() if not targets & graph.keys()]:
        for room in free:
            del graph[room]
    assert not graph


def test_no_import_is_relative():  # the rules above read full names
    nodes = [node for path in FILES for node in ast.walk(parse(path))]
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("path", sorted((ROOT / "weight_selection").rglob("*.py")), ids=lambda path: path.stem)
def test_the_library_needs_other_libraries_only_for_models_of_theirs(path):
    if "sources" not in path.parts:
        assert not HEAVY & {name.partition(".")[0] for name in imported(at_import(parse(path)))}


def test_python_files_at_the_top_are_these():
    assert {path.name for path in ROOT.glob("*.py")} == PROGRAMS


def test_no_file_of_tests_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in TESTS}
    assert not {name: length for name, length in lengths.items() if length > 500}


def test_no_function_is_long():
    long = {}
    for path in (*FILES, *TESTS):
        for node in ast.walk(parse(path)):
            is_function = isinstance(node, ast.FunctionDef) and node.name != "get_args_parser"  # a table of options
            if is_function and node.end_lineno - node.lineno + 1 > 80:
                long[f"{path.relative_to(ROOT)}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert not long


def test_options_are_checked_before_torch_is_imported():
    names = WITHOUT_TORCH.replace(" ", ", ")
    code = f"import sys, {names}; weight_selection.select_weights; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
