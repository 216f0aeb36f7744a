"""Test every command where only the base package is installed: each that needs more says what to install."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

from flows.cli import app
from flows.cli.error_lines import EXTRA_BY_PACKAGE

ROOT = Path(__file__).parents[2]
RECORD = ["0" * 32, "--reason", "r"]
PORTAL = ["--url", "http://127.0.0.1:9", "--token", "t"]
REPORT = ["--prompt", "p", "--response", "r", "--model-version", "1", "--expected", "x"]
# Arguments with which each command passes the parser; the extra that it names, or the line of one that needs none.
COMMANDS = {
    "up": ([], "platform"),
    "down": ([], "platform"),
    "status": ([], "platform"),
    "logs": ([], "platform"),
    "doctor": ([], "platform"),
    "cleanup": ([], "platform"),
    "rotate": ([], "platform"),
    "submit": ([*REPORT, *PORTAL], "does not answer"),
    "plan": (["--model", "tiny"], "train"),
    "calibrate": (["--out", "pool.toml"], "train"),
    "train": (["run.json"], "train"),
    "evaluate": (["7"], "platform"),
    "generate": (["7"], "platform"),
    "serve": ([], "platform"),
    "export": (["folder", "--out", "out"], "train"),
    "import": (["folder", "--out", "out"], "train"),
    "register": (["folder"], "platform"),
    "promote": (["7"], "platform"),
    "demo": ([], "platform"),
    "dataset push": (["run.json", *PORTAL], "does not answer"),
    "dataset show": (["id", *PORTAL], "does not answer"),
    "withdraw report": ([*RECORD, *PORTAL], "does not answer"),
    "withdraw dataset": (RECORD, "platform"),
    "withdraw account": (["name", "--reason", "r"], "platform"),
    "recipe list": ([], "platform"),
    "recipe show": (["demo"], "platform"),
    "recipe check": (["demo"], "platform"),
    "round start": ([], "platform"),
    "round status": ([], "platform"),
    "round cancel": ([], "platform"),
    "pool show": ([], "platform"),
    "pool lose": (["cpu-process/1", "--reason", "r"], "platform"),
    "pool return": (["cpu-process/1"], "platform"),
}
# Run every command in one process in which the packages of the first argument cannot be imported.
RUN_COMMANDS = """
import importlib.abc, json, sys

class HidePackages(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

hidden = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, HidePackages())
from typer.testing import CliRunner
from flows.cli.app import app
answers = []
for arguments in json.loads(sys.argv[2]):
    result = CliRunner().invoke(app, arguments)
    answers.append((result.exit_code, result.stderr, repr(result.exception)))
print(json.dumps(answers))
"""


def list_optional_packages():
    """Return the installed modules that neither the base package nor anything it requires has."""
    base, queue = set(), ["cotrain"]
    while queue:
        name = normalize_name(queue.pop())
        if name not in base:
            base.add(name)
            requirements = distribution(name).requires or []
            queue += [line for line in requirements if ";" not in line]
    return [m for m, owners in packages_distributions().items() if not base & set(map(normalize_name, owners))]


def normalize_name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return exit status, standard error and exception of every command."""
    place = tmp_path_factory.mktemp("base")
    (place / "folder").mkdir()
    (place / "run.json").write_text("{}")
    hidden = json.dumps(list_optional_packages())
    calls = json.dumps([[*name.split(), *arguments] for name, (arguments, _) in COMMANDS.items()])
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{RUN_COMMANDS}"
    result = subprocess.run([sys.executable, "-c", code, hidden, calls], capture_output=True, text=True, cwd=place)
    assert result.returncode == 0, result.stderr
    return dict(zip(COMMANDS, json.loads(result.stdout), strict=True))


def test_every_command_is_tried():
    assert {name.split()[0] for name in COMMANDS} == {name for name, _, _ in app.COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_the_extra_it_needs_in_one_line(name, answers):
    status, line, exception = answers[name]
    expected = COMMANDS[name][1]
    pattern = expected if " " in expected else rf"the base package lacks; run `pip install 'cotrain\[{expected}\]'`"
    assert status == 1 and re.search(pattern, line) and line.count("\n") == 1, (line, exception)


def test_the_packages_of_the_small_extras_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {package: extra for extra in ("train", "kubernetes") for package in extras[extra]}
    assert packages == EXTRA_BY_PACKAGE
