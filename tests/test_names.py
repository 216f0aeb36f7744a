"""One name, one thing: names are unique, are words that an engineer would search for, and tests use public ones."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "feedback", "yuan", "infra")
# `run` and `app` are entries, nouns of `cli/` name commands, and the skill files of the demo have one interface.
SHARED_MODULES = {"__init__", "__main__", "run", "app"}
SHARED_NAMES = {"log", "router", "SKILLS", "CHINESE_DIGITS"}


def list_modules(*folders):
    """Return the Python files of the folders, by default the packages, without migrations, whose names are numbered."""
    files = [file for folder in folders or PACKAGES for file in sorted((ROOT / folder).rglob("*.py"))]
    return [file for file in files if "migrations" not in file.parts]


@cache
def parse(file):
    return ast.parse(file.read_text())


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
    for file in list_modules("tests"):
        if file.stem != "conftest":
            places[file.stem].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_two_classes_or_constants_have_one_name():
    places = defaultdict(set)
    for file in list_modules():
        for name in find_defined_names(parse(file)):
            if name not in SHARED_NAMES:
                places[name].add(str(file.relative_to(ROOT)))
    assert {name: sorted(files) for name, files in places.items() if len(files) > 1} == {}


def test_tests_and_benchmarks_use_public_names_only():
    """Other libraries' private names are excepted here, one by one."""
    excepted = {"_exit", "_python_dispatch", "_global_grad_norm", "_hp_grad", "_update_hp_grad"}
    uses = []
    for file in list_modules("tests", "benchmarks"):
        for node in ast.walk(parse(file)):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not is_own and node.attr not in excepted:
                uses.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.attr}")
    assert uses == []


# Words that the table "Use standard words" of CONTRIBUTING.md replaces, since they are not what a reader searches for.
REPLACED_WORDS = (
    r"anew|asked|gone|goes_on|go_on|harms?|is_left|learned|let_be|lives|mend|nobody|robs?|said|somebody|taught|taken_up|"
    r"told|under_way|whatever|who|whoever|whom"
)
REPLACED_IN_TESTS = re.compile(rf"^test_(what|those|it)_|_({REPLACED_WORDS})(_|$)")
REPLACED_IN_CODE = re.compile(rf"(^|_)({REPLACED_WORDS}|which)(_|$)")
PRONOUN = re.compile(
    r"_*(doing|done|found|it|left|made|most|one|own|redone|that|them|these|they|those|wanted|what|when|where|why)_*"
)
# Names that PRONOUN matches, by file; the list shrinks only. `left` and `right` are the halves of a Feistel network.
EXCEPTED_NAMES = {
    ("tests/feedback/test_items.py", "when"),
    ("tests/yuan/test_convert.py", "one"),
    ("tests/yuan/test_import_files.py", "where"),
    ("yuan/data/shuffle.py", "left"),
    ("yuan/plan/pool.py", "what"),
    ("yuan/safe_files.py", "why"),
}
QUESTION = re.compile(r"(How|That|Those|What|Whether|Which|Who|Whose|Where)\b")
# Of functions that return a bool; they begin with "Return True if".
PREDICATE = re.compile(r"(Check|Say|Tell) (if|whether)\b")

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def find_names(tree):
    """Yield every name that a module defines with its line: functions, classes in snake case, parameters, values.

    Values are variables, fields of classes, and attributes that are assigned.
    """
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            yield node.lineno, node.name
        elif isinstance(node, ast.ClassDef):
            yield node.lineno, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", node.name).lower()
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_names_of_tests_have_no_word_that_the_glossary_replaces():
    """A failing test is read by its name alone, often by a person who is not a native speaker."""
    offenders = []
    for file in list_modules("tests"):
        for node in ast.walk(parse(file)):
            is_test = isinstance(node, FUNCTIONS) and node.name.startswith("test_")
            if is_test and REPLACED_IN_TESTS.search(node.name):
                offenders.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert offenders == []


def test_names_in_code_are_no_pronouns_and_have_no_word_that_the_glossary_replaces():
    """A value is a noun, named by what it is, and a function a verb: `found` and `who` have to be looked up."""
    offenders = []
    for module in list_modules(*PACKAGES, "tests", "benchmarks"):
        file = str(module.relative_to(ROOT))
        for line, name in find_names(parse(module)):
            is_pronoun = PRONOUN.fullmatch(name) and (file, name) not in EXCEPTED_NAMES
            if is_pronoun or REPLACED_IN_CODE.search(name):
                offenders.append(f"{file}:{line} {name}")
    assert offenders == []


def test_docstrings_of_predicates_begin_with_return_true_if():
    offenders = []
    for module in list_modules(*PACKAGES, "tests", "benchmarks"):
        for node in ast.walk(parse(module)):
            if isinstance(node, FUNCTIONS) and PREDICATE.match(ast.get_docstring(node) or ""):
                offenders.append(f"{module.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert offenders == []


def test_docstrings_of_public_names_do_not_begin_with_a_question_word():
    """Functions begin with a verb, "Return", "Count", "Write", and classes and modules with a noun."""
    offenders = []
    for module in list_modules(*PACKAGES, "benchmarks"):
        for node in ast.walk(parse(module)):
            if not isinstance(node, FUNCTIONS | ast.ClassDef | ast.Module):
                continue
            name = getattr(node, "name", "module")
            if not name.startswith("_") and QUESTION.match(ast.get_docstring(node) or ""):
                offenders.append(f"{module.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {name}")
    assert offenders == []
