"""run.json: what a training run trains, on which data, by which plan and settings."""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from yuan.config import ModelConfig, Precision, TrainConfig
from yuan.plan.plan_record import PipelinePlan
from yuan.recipe import Recipe, RunKind, validate_recipe


@dataclass(frozen=True, kw_only=True)
class ParentState:
    """The checkpoint of the parent's run in `parent_state/`, from whose fp32 master weights a run starts.

    Attributes:
        step: of the checkpoint.
        manifest_sha256: of its manifest, which has the sha256 of every file.
        with_moments: the optimizer starts with the parent's moments and number of updates, else without any.
    """

    step: int
    manifest_sha256: str
    with_moments: bool


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Validated content of run.json.

    `snapshot` and `parent` are ids for display and lineage; the bytes are beside run.json in data/, tokenizer.model
    and, if there is a parent, parent/. With `parent_state`, training starts from that checkpoint in parent_state/, and
    parent/ is lineage. `train_config` has the settings that training follows; `recipe` is what they were resolved from,
    None if a program set them. `version_dtype` is that of the exported weights; None, in runs of earlier releases:
    fp32, which the manifest does not state.
    """

    kind: str
    model: ModelConfig
    snapshot: str
    plan: PipelinePlan
    train_config: TrainConfig
    seed: int
    parent: str | None
    recipe: Recipe | None = None
    parent_state: ParentState | None = None
    version_dtype: Precision | None = None
    schema: int = 2

    def __post_init__(self) -> None:
        if self.kind not in get_args(RunKind):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(RunKind))}, got {self.kind!r}; use pretrain without a "
                "parent, else continue or finetune"
            )
        if self.version_dtype not in (None, *get_args(Precision)):
            raise ValueError(
                f"version_dtype must be one of {', '.join(get_args(Precision))}, got {self.version_dtype!r}; change it"
            )
        if (self.kind == "pretrain") != (self.parent is None):
            raise ValueError(
                f"a pretrain run has no parent and the others have one, got {self.kind} and {self.parent}; "
                "change kind or parent"
            )
        if self.parent_state is not None and self.parent is None:
            raise ValueError("parent_state is of a parent, and there is none; remove it, or name the parent")
        if self.plan.bounds[-1] != self.model.num_layers:
            raise ValueError(
                f"the plan splits {self.plan.bounds[-1]} layers and the model has {self.model.num_layers}; plan again"
            )
        if not self.plan.feasible:
            raise ValueError(f"the plan is not feasible: {self.plan.explanation}; plan again")
        planned = (self.plan.sequence_length, self.plan.global_batch_size, self.plan.micro_batch_size)
        requested = (self.train_config.seq_len, self.train_config.global_batch_size, self.train_config.micro_batch_size)
        if planned != requested:
            raise ValueError(
                f"plan and settings differ in (seq_len, global, micro batch): {planned} and {requested}; plan again"
            )

    @property
    def fixed_micro_batch_size(self) -> int | None:
        """Return the micro-batch size that every plan of the run must have; None: the planner's choice."""
        return self.train_config.micro_batch_size if self.recipe is None else self.recipe.batch.micro_batch_size

    def with_plan(self, plan: PipelinePlan) -> "RunSpec":
        """Return the run with another plan, whose micro-batch size may differ: the order of data does not."""
        train_config = dataclasses.replace(self.train_config, micro_batch_size=plan.micro_batch_size)
        return dataclasses.replace(self, plan=plan, train_config=train_config)

    @property
    def order(self) -> dict[str, Any]:
        """Return the fields that determine the order of data; it does not depend on the plan."""
        train_config = self.train_config
        return {
            "snapshot": self.snapshot,
            "seed": self.seed,
            "global_batch_size": train_config.global_batch_size,
            "seq_len": train_config.seq_len,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": self.schema,
            "kind": self.kind,
            "model": self.model.to_json(),
            "snapshot": self.snapshot,
            "plan": self.plan.to_json(),
            "recipe": None if self.recipe is None else self.recipe.to_json(),
            "train_config": self.train_config.to_json(),
            "seed": self.seed,
            "parent": self.parent,
            "parent_state": None if self.parent_state is None else dataclasses.asdict(self.parent_state),
            "version_dtype": self.version_dtype,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RunSpec":
        """Rebuild a run from run.json.

        Raises:
            ValueError: if a field is missing, unknown or contradicts another.
        """
        try:
            if data["schema"] == 1:  # its recipe was what is the train_config today
                data = {**data, "schema": cls.schema, "train_config": data["recipe"], "recipe": None}
            if data["schema"] != cls.schema:
                raise ValueError(
                    f"run.json has schema {data['schema']}, this version reads {cls.schema}; prepare a new run"
                )
            parts = {
                "model": ModelConfig.from_json(data["model"]),
                "plan": PipelinePlan.from_json(data["plan"]),
                "recipe": None if data["recipe"] is None else validate_recipe(data["recipe"], "of run.json"),
                "train_config": TrainConfig.from_json(data["train_config"]),
                # Runs that version 0.3 or older prepared have none.
                "parent_state": None if data.get("parent_state") is None else ParentState(**data["parent_state"]),
            }
            return cls(**{**data, **parts})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a run.json of schema {cls.schema}: {error}; prepare a new run") from None
