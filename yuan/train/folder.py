"""The run folder: what goes in, what comes out, and which files hold it (design: a run is a folder)."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yuan.config import ModelConfig, Recipe
from yuan.data.packing import Windows
from yuan.plan.record import Plan

KINDS = ("pretrain", "continue", "finetune")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """run.json, read and checked.

    `snapshot` and `parent` are ids for people and lineage; the bytes lie beside run.json as windows.npz,
    tokenizer.model and, if there is a parent, the folder parent/.
    """

    kind: str
    model: ModelConfig
    snapshot: str
    plan: Plan
    recipe: Recipe
    seed: int
    parent: str | None
    schema: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if (self.kind == "pretrain") != (self.parent is None):
            raise ValueError(f"a pretrain run has no parent and the others have one, got {self.kind}, {self.parent}")
        if self.plan.bounds[-1] != self.model.num_layers:
            raise ValueError(
                f"the plan lays out {self.plan.bounds[-1]} layers and the model has {self.model.num_layers}; plan again"
            )
        if not self.plan.feasible:
            raise ValueError(f"the plan is not feasible: {self.plan.explanation}")
        planned = (self.plan.sequence_length, self.plan.global_batch_size, self.plan.micro_batch_size)
        asked = (self.recipe.seq_len, self.recipe.global_batch_size, self.recipe.micro_batch_size)
        if planned != asked:
            raise ValueError(f"plan and recipe differ in (seq_len, global, micro batch): {planned} and {asked}")

    @property
    def order(self) -> dict[str, Any]:
        """What decides which window is trained when; no plan has a part in it."""
        recipe = self.recipe
        return {
            "snapshot": self.snapshot,
            "seed": self.seed,
            "global_batch_size": recipe.global_batch_size,
            "seq_len": recipe.seq_len,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": self.schema,
            "kind": self.kind,
            "model": self.model.to_json(),
            "snapshot": self.snapshot,
            "plan": self.plan.to_json(),
            "recipe": self.recipe.to_json(),
            "seed": self.seed,
            "parent": self.parent,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RunSpec":
        """Rebuild a run from run.json.

        Raises:
            ValueError: if a field is missing, unknown or contradicts another.
        """
        try:
            parts = {
                "model": ModelConfig.from_json(data["model"]),
                "plan": Plan.from_json(data["plan"]),
                "recipe": Recipe.from_json(data["recipe"]),
            }
            return cls(**{**data, **parts})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a run.json of schema 1: {error}") from None


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one training run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def parent(self) -> Path:
        return self.path / "parent"

    def spec(self) -> RunSpec:
        return RunSpec.from_json(json.loads((self.path / "run.json").read_text()))

    def write(self, spec: RunSpec, windows: Windows) -> None:
        """Lay out a run's inputs; run.json comes last, so that a folder that has it is whole."""
        with (self.path / "windows.npz").open("wb") as file:
            np.savez(
                file,
                tokens=windows.tokens,
                labels=windows.labels,
                learned=windows.learned,
                documents=windows.documents,
            )
        write_json(self.path / "run.json", spec.to_json())

    def windows(self) -> Windows:
        with np.load(self.path / "windows.npz", allow_pickle=False) as arrays:
            return Windows(arrays["tokens"], arrays["labels"], arrays["learned"], arrays["documents"])

    def status(self) -> dict[str, Any]:
        """The newest status.json; empty before the first step."""
        try:
            return dict(json.loads((self.path / "status.json").read_text()))
        except FileNotFoundError:
            return {}

    def metrics(self, after_step: int = -1) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl with a step above `after_step`; a torn line is left out."""
        try:
            text = (self.path / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [row for line in text.splitlines() if (row := _parse(line)) and row["step"] > after_step]

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a log; after one that a full disk has torn, on a line of its own."""
        with (self.path / name).open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            else:
                torn = False
            file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a JSON file in one step, so that a reader never sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(data, indent=2))
    scratch.replace(path)
