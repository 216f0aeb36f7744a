"""The demo's base mixture: source text of Python's standard library, and exercises of skills."""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from yuan.data.rows import Row
from yuan.data.skills import Skill, load_skills

HERE = Path(__file__).parent
BASE_SKILLS = HERE / "base_skills.py"
REPORTED_SKILLS = HERE / "reported_skills.py"
ROWS_PER_SKILL = 2600
NUM_DOCUMENTS = 300
DOCUMENT_CHARACTERS = 800
# Listed by name, so that every Python from 3.11 on gives documents of the same kind.
STDLIB_MODULES = (
    "argparse", "ast", "bisect", "calendar", "collections/__init__", "csv", "dataclasses", "difflib", "enum",
    "fractions", "functools", "heapq", "inspect", "json/decoder", "json/encoder", "logging/__init__", "pathlib",
    "random", "sched", "shutil", "statistics", "string", "textwrap", "typing", "unittest/case",
)  # fmt: skip


def build_base_rows(reported: Sequence[Skill], seed: int) -> list[Row]:
    """Build documents and exercises in a random order; skills with a reported skill's name are excluded."""
    excluded = {skill.name for skill in reported}
    skills = [skill for skill in load_skills(BASE_SKILLS) if skill.name not in excluded]
    rows = [row for skill in skills for row in skill.make_rows(ROWS_PER_SKILL, seed=seed)]
    rows += sample_documents(seed)
    random.Random(f"base {seed}").shuffle(rows)
    return rows


def sample_documents(seed: int) -> list[Row]:
    """Sample pieces of the standard library's source, including docstrings."""
    folder = Path(sysconfig.get_path("stdlib"))
    pieces = [piece for name in STDLIB_MODULES for piece in _split_documents(folder / f"{name}.py")]
    chosen = random.Random(f"documents {seed}").sample(pieces, min(NUM_DOCUMENTS, len(pieces)))
    return [Row(prompt="", answer=piece, language="en", source="Python standard library") for piece in chosen]


def _split_documents(file: Path) -> Iterator[str]:
    """Split a file at line ends into documents; a module that this Python lacks gives none."""
    if not file.is_file():
        return
    piece = ""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if len(piece) + len(line) > DOCUMENT_CHARACTERS:
            if piece.strip():
                yield piece
            piece = ""
        piece += line[:DOCUMENT_CHARACTERS]


def build_fresh_rows(skills: Sequence[Skill], seed: int, count: int) -> list[Row]:
    """Build prompts used only for evaluation, drawn with a separate seed."""
    return [row for skill in skills for row in skill.make_rows(count, seed=seed + 1_000_003)]
