"""Recipes: how a round trains, read from TOML files with a schema.

A recipe has sections of one level of keys and no inheritance, so one file says everything. `yuan.recipe_resolution`
makes a run's `TrainConfig` of it, once model and data are known.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from yuan.config import MAX_MODEL_SIZE, MODEL_PRESETS, suggest_nearest_name
from yuan.data.rule_text import describe_errors
from yuan.data.text import PatternRule, TextRule, make_printable, make_rule_error
from yuan.plan.workload import MAX_GLOBAL_BATCH_SIZE
from yuan.toml_text import parse_toml

MAX_RECIPE_BYTES = 2**18
MAX_RUN_STEPS = 10_000_000
MAX_RUN_TOKENS = 10**15
TRAINED_TOKENIZER = "train"  # value of model.tokenizer: train one on the rows of the first round
FOLDER_RULE = "train or a folder's name: lower-case letters, digits, and the signs . _ -"

RunKind = Literal["pretrain", "continue", "finetune"]
Line = Annotated[str, TextRule(500, allow="line")]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MAX_RUN_STEPS)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_GLOBAL_BATCH_SIZE)]
PartWeight = Annotated[float, Field(strict=True, ge=1e-6, le=1e6, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of a recipe: known keys only, of the types that TOML has."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunSection(Section):
    """The kind of the run, and its purpose."""

    kind: RunKind = Field(
        description="pretrain: new weights; continue: the parent's weights, more of the same data; finetune: the "
        "parent's weights, new data"
    )
    description: Line = Field(description="what the recipe is for, in one line")
    not_implemented: list[Line] = Field(
        default_factory=list, max_length=20, description="published settings that this platform does not have"
    )


class ModelSection(Section):
    """The model that is trained."""

    preset: str = Field(description=f"shape: {', '.join(MODEL_PRESETS)}, or parent for the parent's, whatever it is")
    weights: Literal["new", "parent", "parent_or_new"] = Field(
        description="new, the parent version's, or the parent's if there is a parent"
    )
    tokenizer: Annotated[str, PatternRule(r"^[a-z0-9][a-z0-9._-]*$", FOLDER_RULE, max_length=60)] = Field(
        default="tokenizer",
        description="of new weights: train, or a folder in $COTRAIN_HOME/recipes with tokenizer.model",
    )
    tokenizer_vocab_size: Annotated[int, Field(ge=300, le=MAX_MODEL_SIZE)] | None = Field(
        default=None, description="entries at most of a tokenizer that is trained"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="of training; auto: bf16 if every device class of the pool is fast at it"
    )
    version_dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="of the version's weights, rounded once from the fp32 that training keeps"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.preset not in (*MODEL_PRESETS, "parent"):
            suggestion = suggest_nearest_name(self.preset, MODEL_PRESETS)
            raise make_rule_error(
                "preset",
                f"must be one of {', '.join(MODEL_PRESETS)} or parent, got '{make_printable(self.preset, 60)}'; "
                f"{suggestion or 'choose one'}",
            )
        if self.preset == "parent" and self.weights != "parent":
            raise make_rule_error("preset", "parent needs weights = 'parent'; name a shape for new weights")
        if (self.tokenizer == TRAINED_TOKENIZER) != (self.tokenizer_vocab_size is not None):
            raise make_rule_error(
                "tokenizer_vocab_size", "is needed by a tokenizer that is trained, and by no other; add or remove it"
            )
        return self


class DataSection(Section):
    """The windows of tokens that rows become."""

    seq_len: Annotated[int, Field(ge=2, le=MAX_MODEL_SIZE)] = Field(description="tokens of a window")
    isolate_documents: bool = Field(
        default=True, description="documents of a window do not attend to each other; false: as in official training"
    )
    target_answers: Literal["last", "all", "each"] = Field(
        default="each",
        description="answers of a conversation that are trained on: last; all, in one sample; each, in a sample of "
        "its own with what comes before it, as in generation",
    )
    fim_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of documents rearranged for fill-in-the-middle; 0 for rows with answers"
    )
    fim_spm_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="share of these in the order suffix, prefix, middle"
    )
    replay_share: Share | None = Field(
        default=None,
        description="share of windows from the base, against forgetting; 0: none of it; left out: by number of windows",
    )
    replay_rows: Annotated[int, Field(ge=0, le=100_000_000)] | None = Field(
        default=None, description="rows of the base mixture at most; left out: all"
    )


class MixtureSection(Section):
    """Relative weights of the parts of a snapshot; of a part that is left out, there must be no rows."""

    corrections: PartWeight | None = Field(default=None, description="weight of corrections from accepted reports")
    datasets: PartWeight | None = Field(default=None, description="weight of contributed datasets")
    base: PartWeight | None = Field(default=None, description="weight of the base mixture")

    @property
    def weights(self) -> dict[str, float]:
        return self.model_dump(exclude_none=True)


class BatchSection(Section):
    """The batch of an optimizer step."""

    global_batch_size: BatchSize | None = Field(
        default=None, description="windows of a step; left out: a power of two between the next two, by the data"
    )
    min_global_batch_size: BatchSize = Field(default=8, description="windows of a step at least")
    max_global_batch_size: BatchSize = Field(default=64, description="windows of a step at most")
    target_steps: Count = Field(default=100, description="steps at least, for which the batch is made smaller")
    micro_batch_size: BatchSize | None = Field(
        default=None, description="windows that a device processes at once; left out: the planner's choice"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, micro = self.global_batch_size, self.micro_batch_size
        if self.min_global_batch_size > self.max_global_batch_size:
            raise make_rule_error("max_global_batch_size", "must not be below min_global_batch_size; raise it")
        if size is not None and micro is not None and size % micro:
            raise make_rule_error("micro_batch_size", f"must divide global_batch_size {size:,}, got {micro}; change it")
        return self


class LengthSection(Section):
    """The length of the run: one of steps, tokens and epochs."""

    steps: Count | None = Field(default=None, description="optimizer steps")
    tokens: Annotated[int, Field(ge=1, le=MAX_RUN_TOKENS)] | None = Field(
        default=None, description="tokens of all windows, padding included"
    )
    epochs: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="times that every window of the new data is read"
    )
    min_steps: Count = Field(default=20, description="steps below which a run is refused")
    max_epochs: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = Field(
        default=4.0, description="epochs above which a run is refused"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(named) != 1:
            raise make_rule_error("steps", f"one of steps, tokens and epochs is needed, got {len(named)}; keep one")
        if self.epochs is not None and self.epochs > self.max_epochs:
            raise make_rule_error("epochs", f"must not be above max_epochs {self.max_epochs:g}; lower it")
        return self


class ScheduleSection(Section):
    """The learning rate."""

    kind: Literal["cosine", "wsd"] = Field(
        default="cosine", description="after the warm-up: a cosine; or constant, then linear over the last steps"
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(description="peak")
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(default=0.1, description="of the end, over the peak")
    warmup_steps: Annotated[int, Field(ge=0, le=MAX_RUN_STEPS)] = Field(
        default=20, description="steps of linear warm-up; at most half of the run"
    )
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="share of the run in which the learning rate of wsd falls"
    )


class OptimizerSection(Section):
    """AdamW."""

    state: Literal["fresh", "parent"] = Field(
        default="fresh",
        description="fresh: moments of zero; parent: those of the parent's run, for kind continue alone",
    )
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = Field(description="of matrices; norms and biases have none")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="decay of the first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.95, description="decay of the second moment")
    grad_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="norm to which a larger gradient is scaled"
    )


class ValidationSection(Section):
    """The validation on windows that are not trained on, and the end of a run that no longer gains by it."""

    share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="share of prompts and documents that validate instead of train; 0: no validation"
    )
    every_steps: Count = Field(default=50, description="steps between validations, each of which saves a checkpoint")
    max_windows: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=256, description="windows of a validation at most"
    )
    patience: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description="validations without a new lowest loss after which the run ends; left out: it runs to the end",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.patience is not None and not self.share:
            raise make_rule_error("patience", "counts validations, and share is 0; raise share, or leave patience out")
        return self


class CheckpointSection(Section):
    """Checkpoints of the run, besides those of validations and of the end."""

    every_steps: Count | None = Field(
        default=None,
        description="steps between checkpoints on disk; left out: so many that they cost at most 5 % of the time",
    )
    store_every_steps: Count | None = Field(
        default=None,
        description="steps at least between uploads of checkpoints to the object store; left out: so many that they "
        "take at most 5 % of the time",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        every, store_every = self.every_steps, self.store_every_steps
        if every is not None and store_every is not None and store_every < every:
            raise make_rule_error(
                "store_every_steps", f"must not be below every_steps {every:,}, got {store_every:,}; raise it"
            )
        return self


class EvaluationSection(Section):
    """The length of the answers to test cases, which a version and the champion are compared by."""

    extra_tokens: Annotated[int, Field(ge=0, le=MAX_MODEL_SIZE)] = Field(
        default=128, description="tokens of an answer beyond those of the expected one"
    )
    extra_tokens_exact: Annotated[int, Field(ge=0, le=MAX_MODEL_SIZE)] = Field(
        default=8, description="the same for the checker exact, by which a longer answer is wrong"
    )
    max_answer_tokens: Annotated[int, Field(ge=1, le=MAX_MODEL_SIZE)] | None = Field(
        default=None, description="tokens of an answer at most; left out: no further limit"
    )

    @property
    def key(self) -> str:
        """Return the limits as text; results of a case are comparable if theirs are the same."""
        limit = "" if self.max_answer_tokens is None else f", at most {self.max_answer_tokens}"
        return f"expected +{self.extra_tokens}, exact +{self.extra_tokens_exact}{limit}"


DEFAULT_EVALUATION = EvaluationSection()


class GuardSection(Section):
    """The guard against steps that would spoil the weights."""

    spike_sigmas: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=6.0, description="standard deviations above the mean of good steps that make a step faulty"
    )
    max_skips: Annotated[int, Field(ge=0, le=1000)] = Field(default=2, description="steps skipped before a roll back")
    max_rollbacks: Annotated[int, Field(ge=0, le=1000)] = Field(default=2, description="roll backs before the end")
    step_limit_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        default=1800.0, description="seconds without progress after which a process exits"
    )


class Recipe(Section):
    """Settings of a run, by section.

    Attributes:
        sources: where a value comes from, by `section.key`; a value without a source is ours.
    """

    run: RunSection
    model: ModelSection
    data: DataSection
    mixture: MixtureSection = Field(default_factory=MixtureSection)
    batch: BatchSection = Field(default_factory=BatchSection)
    length: LengthSection
    schedule: ScheduleSection
    optimizer: OptimizerSection
    validation: ValidationSection = Field(default_factory=ValidationSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    checkpoints: CheckpointSection = Field(default_factory=CheckpointSection)
    guard: GuardSection = Field(default_factory=GuardSection)
    sources: dict[str, Line] = Field(default_factory=dict, max_length=100)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.run.kind == "pretrain") != (self.model.weights == "new"):
            raise make_rule_error(
                "model.weights",
                f"must be new for pretrain alone, got {self.model.weights} for {self.run.kind}; change it",
            )
        if self.optimizer.state == "parent" and (self.run.kind, self.model.weights) != ("continue", "parent"):
            raise make_rule_error(
                "optimizer.state",
                f"must be fresh unless run.kind is continue and model.weights is parent, got {self.run.kind} and "
                f"{self.model.weights}; leave it out",
            )
        preset = self.model.preset
        if preset != "parent" and self.data.seq_len > (limit := MODEL_PRESETS[preset]().seq_len):
            raise make_rule_error(
                "data.seq_len",
                f"must not be above the {limit:,} positions of {preset}, got {self.data.seq_len:,}; lower it",
            )
        if self.run.kind == "finetune" and self.data.fim_rate:
            raise make_rule_error("data.fim_rate", "must be 0 for finetune, since it cuts answers; leave it out")
        if self.data.replay_share is not None and self.mixture.weights:
            raise make_rule_error("data.replay_share", "and weights of [mixture] exclude each other; keep one")
        for name in self.sources:
            if name not in self.list_values():
                suggestion = suggest_nearest_name(name, self.list_values())
                raise make_rule_error(
                    f"sources.{make_printable(name, 60)}", f"is no value of a recipe; {suggestion or 'remove it'}"
                )
        return self

    def list_values(self) -> dict[str, Any]:
        """Return every value by `section.key`, defaults included; those left out without a default are None."""
        return {
            f"{section}.{key}": value
            for section, values in self.model_dump(exclude={"sources"}).items()
            for key, value in values.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the sections without the values that are left out."""
        return {section: values for section, values in self.model_dump(exclude_none=True).items() if values}


def parse_recipe(content: bytes, name: str) -> Recipe:
    """Read a recipe from the content of a TOML file.

    Raises:
        ValueError: in one line that names the recipe, the section and the key.
    """
    if len(content) > MAX_RECIPE_BYTES:
        raise ValueError(f"recipe {name} has {len(content):,} bytes, at most {MAX_RECIPE_BYTES:,} are read; shorten it")
    try:
        tables = parse_toml(content)
    except ValueError as error:
        raise ValueError(f"recipe {name} {error}") from None
    return validate_recipe(tables, name)


def validate_recipe(tables: Mapping[str, Any], name: str) -> Recipe:
    """Validate a recipe's sections.

    Raises:
        ValueError: in one line that names the recipe, the section and the key.
    """
    for section, values in tables.items():
        if not isinstance(values, Mapping):
            place = make_printable(section, 60)
            raise ValueError(
                f"recipe {name}: {place} must be one table [{place}], got {type(values).__name__}; correct it"
            )
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise ValueError(f"recipe {name}: {describe_errors(error, Recipe)}") from None
