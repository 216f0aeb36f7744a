"""Skill files: Python files that generate exercises and define the checkers of their answers.

A skill file has a list `SKILLS`; each entry is a mapping with `name`, `generate` (takes a `random.Random`, returns a
prompt and its answer), `checker` (a checker without its value, such as `{"type": "exact"}`), and optionally `language`.
The file is the operator's own code and runs without a sandbox; contributors send rows, never skill files.
"""

import random
import runpy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuan.data.rows import Row


@dataclass(frozen=True)
class Skill:
    """Generate exercises of one capability, each with a checker."""

    name: str
    generate: Callable[[random.Random], tuple[str, str]]
    checker: Mapping[str, Any]
    language: str | None = None

    def make_row(self, rng: random.Random) -> Row:
        """Generate one exercise; the answer becomes the checker's value."""
        prompt, answer = self.generate(rng)
        value: Any = [answer] if self.checker["type"] == "contains" else answer
        field = "values" if self.checker["type"] == "contains" else "value"
        return Row.model_validate(
            {
                "prompt": prompt,
                "answer": answer,
                "checker": {field: value, **self.checker},
                "capability": self.name,
                "language": self.language,
            }
        )

    def make_rows(self, count: int, *, seed: int, at_least: int | None = None) -> list[Row]:
        """Generate `count` exercises with different prompts; fewer are accepted if there are at least `at_least`.

        Raises:
            ValueError: if the skill generates too few different prompts in 50 * count + 1000 draws.
        """
        seen: set[str] = set()
        rows: list[Row] = []
        for row in self._draw_rows(random.Random(f"{self.name} {seed}"), 50 * count + 1000):
            if row.prompt_key not in seen:
                seen.add(row.prompt_key)
                rows.append(row)
                if len(rows) == count:
                    return rows
        needed = count if at_least is None else at_least
        if len(rows) >= needed:
            return rows
        raise ValueError(
            f"skill {self.name!r} generated {len(rows)} different prompts, {needed} are needed; widen its generator"
        )

    def _draw_rows(self, rng: random.Random, count: int) -> Iterator[Row]:
        for _ in range(count):
            yield self.make_row(rng)


def load_skills(path: Path) -> list[Skill]:
    """Run a skill file and return its `SKILLS`.

    Raises:
        ValueError: if the file has no such list, an entry lacks a field, or an entry generates a row that its own
            checker rejects.
    """
    entries = runpy.run_path(str(path)).get("SKILLS")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} defines no list SKILLS; add one of mappings with name, generate and checker")
    skills = [_parse_skill(path, number, entry) for number, entry in enumerate(entries)]
    names = [skill.name for skill in skills]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: skill names must differ, got {names}; rename one")
    return skills


def _parse_skill(path: Path, number: int, entry: Any) -> Skill:
    try:
        skill = Skill(**entry)
        row = skill.make_row(random.Random(0))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: SKILLS[{number}] is not a skill ({error}); it needs name, generate and checker"
        ) from error
    if row.checker is None or not row.checker.check(row.answer):
        raise ValueError(
            f"{path}: skill {skill.name!r} generated an answer that its own checker rejects, {row.answer!r}; "
            "correct one of the two"
        )
    return skill
