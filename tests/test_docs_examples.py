"""Check that the commands in pages do what the pages show. `python tests/test_docs_examples.py` writes what they print.

A block of text whose first line begins with "$ " shows a command and all that it prints, with long lines wrapped.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"^```text\n\$ (.*)\n((?:.*\n)*?)```$", re.MULTILINE)
PLANNER_COMMANDS = re.compile(r"^```bash\n((?:cotrain plan .*\n)+)```$", re.MULTILINE)
PICTURE = ROOT / "docs" / "pictures" / "plan-102b.svg"
WIDTH = 120


def run_shell(command, folder=ROOT):
    """Run a command of a page in a folder that has the repository's `benchmarks`; return what it prints."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=folder, env=environment, timeout=100
    )
    return result.stdout + result.stderr


def format_output(text):
    """Wrap the lines of an output as pages show them."""
    lines = (textwrap.wrap(line, WIDTH) if len(line) > WIDTH else [line] for line in text.splitlines())
    return "".join(f"{line}\n" for wrapped in lines for line in wrapped)


def list_examples():
    """Return page, command and shown output of every example."""
    return [(page, *match.groups()) for page in PAGES for match in EXAMPLE.finditer(page.read_text())]


def list_planner_commands():
    """Return the lines of the blocks that only plan."""
    text = (ROOT / "docs" / "planner.md").read_text()
    return [line for match in PLANNER_COMMANDS.finditer(text) for line in match[1].splitlines()]


@pytest.mark.parametrize(("page", "command", "output"), list_examples(), ids=lambda value: str(value)[-40:])
def test_an_example_shows_what_its_command_prints(page, command, output):
    assert format_output(run_shell(command)) == output, f"update {page.name} with `python tests/test_docs_examples.py`"


def test_the_planner_page_has_examples():
    assert len([page for page, _, _ in list_examples() if page.name == "planner.md"]) >= 2
    assert len(list_planner_commands()) >= 3


def test_the_commands_of_the_planner_page_run_one_after_the_other_and_draw_its_picture(tmp_path):
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for command in list_planner_commands():
        assert "cotrain: " not in run_shell(command, tmp_path), command
    assert (tmp_path / "plan.svg").read_text() == PICTURE.read_text()


def update_pages():
    """Write what the commands print into the pages, and draw the picture."""
    for page in PAGES:
        text = page.read_text()
        updated = EXAMPLE.sub(lambda match: f"```text\n$ {match[1]}\n{format_output(run_shell(match[1]))}```", text)
        if updated != text:
            page.write_text(updated)
    run_shell(list_planner_commands()[0].replace("plan.svg", str(PICTURE)))


if __name__ == "__main__":
    update_pages()
