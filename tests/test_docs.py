"""Check that pages and docstrings name files, headings, modules and members that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "feedback", "yuan", "infra")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "docs")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
IMPORT = re.compile(rf"^from ((?:{'|'.join(PACKAGES)})[\w.]*) import ([\w, ]+)$", re.MULTILINE)
REPOSITORY_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*")
PYTHON_FILE = re.compile(r"[\w./*-]+\.py")
DOTTED_NAME = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
CLASS_MEMBER = re.compile(r"[A-Z][a-z]\w*\.[a-z]\w*")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
TABLE_ROW = re.compile(r"^\| (?!---|I want)(.*) \| (.*) \| (.*) \|$", re.MULTILINE)
LONG_MARK = " (long)"
MAX_LINE_CHARACTERS = 120

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read_prose(page):
    """Return the page's text without its code blocks."""
    return FENCE.sub("", page.read_text())


def read_words(page):
    """Return the words of all code spans, without arguments in brackets."""
    return {word.split("(")[0].strip(",;:") for span in CODE_SPAN.findall(read_prose(page)) for word in span.split()}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_outside_of_tables_and_code_have_at_most_120_characters(page):
    lines = read_prose(page).splitlines()
    assert [line for line in lines if len(line) > MAX_LINE_CHARACTERS and not line.startswith("|")] == []


def make_anchor(heading):
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def is_repository_path(name):
    """Return True if a path exists, from the root or, for a Python file, from a folder of the repository."""
    if any(ROOT.glob(name.rstrip("/"))):
        return True
    tails = (path for folder in FOLDERS for path in (ROOT / folder).rglob(Path(name).name))
    return PYTHON_FILE.fullmatch(name) is not None and any(str(path).endswith("/" + name) for path in tails)


@cache
def parse_module(path):
    """Return the statements of a module."""
    return ast.parse(path.read_text()).body


@cache
def read_members(path, class_name=None):
    """Return the names that a module, or a class of it, defines or imports."""
    body = parse_module(path)
    if class_name:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name), [])
    members = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            members.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            members |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            members |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return members


def is_module_or_name(dotted):
    """Return True if a dotted name is a package, a module, or a name or a class's member in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:length])
        module = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if module.exists():
            names = parts[length:]
            if not names:
                return True
            if len(names) > 2 or names[0] not in read_members(module):
                return False
            return len(names) == 1 or names[1] in read_members(module, names[0])
    return False


@cache
def collect_classes():
    """Return the members of every class of the packages, by the class's name."""
    classes = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in parse_module(path):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, set()).update(read_members(path, node.name))
    return classes


@pages
def test_every_path_of_the_repository_exists(page):
    named = {word for word in read_words(page) if REPOSITORY_PATH.fullmatch(word) or PYTHON_FILE.fullmatch(word)}
    assert not [name for name in sorted(named) if not is_repository_path(name)]


@pages
def test_every_link_has_its_target_and_heading(page):
    broken = []
    for link in LINK.findall(read_prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        anchors = [make_anchor(text) for text in HEADING.findall(read_prose(target))] if target.suffix == ".md" else []
        if not target.exists() or (anchor and anchor not in anchors):
            broken.append(link)
    assert not broken


@pages
def test_every_module_and_name_exists(page):
    dotted = {word for word in read_words(page) if DOTTED_NAME.fullmatch(word) and not word.endswith(".log")}
    for module, names in IMPORT.findall(page.read_text()):
        dotted |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert not [name for name in sorted(dotted) if not is_module_or_name(name)]


def test_every_module_and_name_in_code_exists():
    """Comments and docstrings of the packages and benchmarks name modules in backquotes, too."""
    wrong = []
    for path in (path for folder in (*PACKAGES, "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        dotted = {word for word in CODE_SPAN.findall(path.read_text()) if DOTTED_NAME.fullmatch(word)}
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(dotted) if not is_module_or_name(name)]
    assert not wrong


@pages
def test_every_member_of_a_class_exists(page):
    named = [word.split(".") for word in read_words(page) if CLASS_MEMBER.fullmatch(word)]
    assert not [name for name in named if name[1] not in collect_classes().get(name[0], ())]


def read_section(page, heading):
    """Return the prose below a heading of the second level."""
    return read_prose(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def find_files(name):
    """Return the files of a path of the repository, which may be a folder."""
    path = ROOT / name
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def has_slow_tests_only(path):
    """Return True if every test of a file is marked as slow, by itself or by the file's `pytestmark`."""
    assignments = [ast.unparse(node) for node in parse_module(path) if isinstance(node, ast.Assign)]
    if any(text.startswith("pytestmark = ") and "pytest.mark.slow" in text for text in assignments):
        return True
    tests = [node for node in parse_module(path) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return all("pytest.mark.slow" in map(ast.unparse, node.decorator_list) for node in tests)


CHANGES = TABLE_ROW.findall(read_section(ROOT / "CONTRIBUTING.md", "Find the file to change"))


@pytest.mark.parametrize(("change", "files", "_tests"), CHANGES, ids=[change for change, _, _ in CHANGES])
def test_identifiers_of_a_change_occur_in_its_files(change, files, _tests):
    spans = CODE_SPAN.findall(files)
    paths = [path for span in spans if REPOSITORY_PATH.fullmatch(span) for path in find_files(span)]
    text = "\n".join(path.read_text() for path in paths)
    identifiers = [span for span in CODE_SPAN.findall(change) + spans if IDENTIFIER.fullmatch(span)]
    assert [name for name in identifiers if not re.search(rf"\b{name}\b", text)] == []


def test_only_files_of_slow_tests_are_marked_as_long():
    wrong = []
    for _change, _files, tests in CHANGES:
        for name, mark in re.findall(rf"`(tests/[\w/]+\.py)`({re.escape(LONG_MARK)})?", tests):
            if has_slow_tests_only(ROOT / name) != bool(mark):
                wrong.append(name)
    assert wrong == []


def test_every_package_folder_has_a_row_in_the_readme():
    tree = read_section(ROOT / "README.md", "Find the code")
    folders = [file.parent for package in PACKAGES for file in (ROOT / package).rglob("__init__.py")]
    names = [f"{folder.relative_to(ROOT)}/" for folder in folders]
    assert [name for name in sorted(names) if f"| `{name}` |" not in tree] == []


def test_a_missing_path_or_name_is_found():
    assert is_repository_path("yuan/model/loss.py") and is_repository_path("model/loss.py")
    assert not is_repository_path("yuan/model/losses.py") and not is_repository_path("losses.py")
    assert is_module_or_name("feedback.client.Client.submit") and is_module_or_name("yuan.plan")
    assert not is_module_or_name("feedback.client.Client.send") and not is_module_or_name("yuan.plans")
    assert make_anchor("What is wrong: `up`, or down?") == "what-is-wrong-up-or-down"
