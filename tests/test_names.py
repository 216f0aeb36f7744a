"""One name, one thing: no module, class or constant name stands for two things; tests use public names."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "feedback", "yuan", "infra")
# `run` and `app` are entries, nouns of `cli/` name commands, and the skill files of the demo have one interface.
SHARED_MODULES = {"__init__", "__main__", "run", "app"}
SHARED_NAMES = {"log", "router", "SKILLS", "CHINESE_DIGITS"}


def list_modules():
    """Return the files of the packages, without migrations, whose names are numbered."""
    return [file for name in PACKAGES for file in (ROOT / name).rglob("*.py") if "migrations" not in file.parts]


def find_defined_names(tree):
    """Yield the classes and constants at the top of a module."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    yield name.id


def test_no_two_modules_have_one_name():
    places = defaultdict(list)
    for file in list_modules():
        if file.stem not in SHARED_MODULES and "cli" not in file.parts:
            places[file.stem].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_two_files_of_tests_have_one_name():
    """A file's name in a failure or an import identifies it; pytest itself requires the name `conftest`."""
    places = defaultdict(list)
    for file in (ROOT / "tests").rglob("*.py"):
        if file.stem != "conftest":
            places[file.stem].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_two_classes_or_constants_have_one_name():
    places = defaultdict(set)
    for file in list_modules():
        for name in find_defined_names(ast.parse(file.read_text())):
            if name not in SHARED_NAMES:
                places[name].add(str(file.relative_to(ROOT)))
    assert {name: sorted(files) for name, files in places.items() if len(files) > 1} == {}


def test_tests_and_benchmarks_use_public_names_only():
    """Other libraries' private names are excepted here, one by one."""
    excepted = {"_exit", "_python_dispatch", "_global_grad_norm"}
    uses = []
    for folder in ("tests", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                    continue
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if not is_own and node.attr not in excepted:
                    uses.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.attr}")
    assert uses == []


# Words that the table "Use standard words" of CONTRIBUTING.md replaces: nobody searches for them.
RIDDLES = re.compile(
    r"^test_(what|who|whoever|those|it)_|_(anew|asked|gone|goes_on|go_on|harms?|is_left|learned|let_be|lives|mend|nobody|"
    r"robs?|said|somebody|taught|taken_up|told|under_way|whatever|whoever)(_|$)"
)


def test_names_of_tests_have_no_word_that_the_glossary_replaces():
    """A failing test is read by its name alone, often by a person who is not a native speaker."""
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
            if is_test and RIDDLES.search(node.name):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert found == []
