"""Model and training configuration: frozen, validated dataclasses, and the published presets."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

Precision = Literal["fp32", "bf16"]
Schedule = Literal["cosine", "wsd"]
LocalFilterKind = Literal["two_convs_norm", "two_convs", "conv7", "conv3", "conv2", "conv1", "none"]
T = TypeVar("T")

MAX_MODEL_SIZE = 2**24  # of a width, length or number of layers; sums and products of sizes fit 64 bits
NORM_EPS_RANGE = (1e-12, 1e-2)  # models have 1e-12 to 1e-5; a large one makes every norm's output small
ROPE_BASE_RANGE = (10, 1e12)  # models have 1e4 to 1e11
MAX_SEED = 2**63 - 1
MAX_FORMATTED_CHARS = 200
MAX_SUGGESTED_NAME_CHARS = 60  # the time of comparing names grows with the square of their length
MODEL_CONFIG_FILE = "config.json"  # of a model folder
RUN_SPEC_FILE = "run.json"  # of a run folder
KEEP_CHECKPOINTS = 2  # newest checkpoints of a run that stay; the one with the lowest loss stays as well
NUM_STORED_CHECKPOINTS = 2  # newest ones that stay in the object store, besides those that the run has on disk


class FieldError(ValueError):
    """A value, or several together, that breaks a rule; a command names its options by the fields.

    Attributes:
        fields: names of the fields to change.
        rule: the rule, the value and what to do, behind the names.
    """

    def __init__(self, fields: Sequence[str], rule: str) -> None:
        super().__init__(f"{' and '.join(fields)} {rule}")
        self.fields, self.rule = tuple(fields), rule


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Yuan 2.0 network.

    Every layer holds 18 H² + 4.5 H parameters: attention 4 H², the two filter convolutions 2 H² + 1.5 H, SwiGLU 12 H²,
    three norms 3 H. The embedding is also the output head.

    Attributes:
        rope_precision: "bf16" rounds the rotary angles as the official training does, "fp32" keeps them exact.
        local_filter: "two_convs_norm" for Yuan; the other values are the rows of the paper's Table 1, for the ablation.

    Raises:
        ValueError: if a value is out of its range, the heads do not divide the width evenly, or a choice is unknown.

    Source: Yuan 2.0 paper, sections 3.1 and 3.2, Table 1.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    seq_len: int
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    rope_precision: Precision = "fp32"
    local_filter: LocalFilterKind = "two_convs_norm"

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden_size", "num_heads", "vocab_size", "seq_len"):
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= MAX_MODEL_SIZE:
                raise ValueError(
                    f"{field} must be an integer from 1 to {MAX_MODEL_SIZE:,}, got {format_value(value)}; correct it"
                )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                "hidden_size must be an even multiple of num_heads, so that rotary halves exist, "
                f"got {self.hidden_size} and {self.num_heads}; use a multiple of {2 * self.num_heads}"
            )
        for field, choice in (("rope_precision", Precision), ("local_filter", LocalFilterKind)):
            if getattr(self, field) not in get_args(choice):
                raise ValueError(
                    f"{field} must be one of {', '.join(get_args(choice))}, got "
                    f"{format_value(getattr(self, field))}; leave it out for {getattr(ModelConfig, field)}"
                )
        for field, (least, greatest) in (("norm_eps", NORM_EPS_RANGE), ("rope_base", ROPE_BASE_RANGE)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= greatest:
                raise ValueError(
                    f"{field} must be a number from {least:g} to {greatest:g}, got {format_value(value)}; leave it out "
                    f"for {getattr(ModelConfig, field):g}"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_hidden_size(self) -> int:
        return 4 * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Count the parameters of one layer: attention and feed-forward 16 H², two norms 2 H, and the filter."""
        h = self.hidden_size
        return 16 * h**2 + 2 * h + self._filter_parameters

    @property
    def _filter_parameters(self) -> int:
        h = self.hidden_size
        if self.local_filter == "none":
            return 0
        if self.local_filter.startswith("conv"):
            return int(self.local_filter.removeprefix("conv")) * h**2 + h
        return 2 * h**2 + 3 * h // 2 + (h if self.local_filter == "two_convs_norm" else 0)

    @property
    def num_parameters(self) -> int:
        """Count all parameters; the tied embedding counts once.

        >>> yuan_2b().num_parameters
        2088724480
        """
        return self.num_layers * self.layer_parameters + self.vocab_size * self.hidden_size + self.hidden_size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelConfig":
        """Rebuild a config from its JSON.

        Raises:
            ValueError: if a field is unknown or missing; the message names it.
        """
        return _from_json(cls, data)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The resolved settings of a run's training: batch, learning-rate schedule, optimizer.

    Attributes:
        schedule: what follows the warm-up: "cosine" falls all the time, "wsd" (warm-up, stable, decay) stays at the
            peak and falls linearly in the last `decay_share` of the steps.
        warmup_steps: steps of linear warm-up of the learning rate.
        final_lr_ratio: where the schedule ends, over the peak.
        isolate_documents: packed documents do not attend to each other; off, they do, and only positions restart, as in
            the official training.
        checkpoint_every: steps between checkpoints in the run folder; None: chosen while the run trains, so that they
            cost at most 5 % of the time.
        store_every: steps at least between those that are uploaded to the object store; None: so many that uploads take
            at most 5 % of the time.
        is_saving_asynchronous: checkpoints are copied to main memory and written while training continues; off,
            training waits until they are written, without the memory of the copy.
        validate_every: steps between validations, on windows that are not trained on; None: no validation.
        max_validation_windows: windows of a validation at most.
        patience: validations without a new lowest loss after which the run ends; None: it runs to its last step.
        spike_sigmas, max_skips, max_rollbacks: settings of the loss guard (`yuan.train.guard`).
        step_limit_s: seconds without progress after which a rank exits.

    Raises:
        ValueError: if a value is out of range or the batches do not divide.
    """

    max_steps: int
    learning_rate: float
    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    schedule: Schedule = "cosine"
    warmup_steps: int = 20
    decay_share: float = 0.1
    final_lr_ratio: float = 0.05
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: Precision = "fp32"
    isolate_documents: bool = True
    checkpoint_every: int | None = 100
    store_every: int | None = None
    is_saving_asynchronous: bool = True
    validate_every: int | None = None
    max_validation_windows: int = 256
    patience: int | None = None
    spike_sigmas: float = 6.0
    max_skips: int = 2
    max_rollbacks: int = 2
    step_limit_s: float = 1800.0

    def __post_init__(self) -> None:
        optional = ("checkpoint_every", "store_every", "validate_every", "patience")
        for field in (
            *("max_steps", "seq_len", "micro_batch_size", "global_batch_size", "max_validation_windows"),
            *(field for field in optional if getattr(self, field) is not None),
        ):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{field} must be at least 1, got {getattr(self, field)}; write a whole number above 0"
                )
        for field in ("learning_rate", "spike_sigmas", "step_limit_s", "grad_clip"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) > 0):
                raise ValueError(
                    f"{field} must be a positive number, got {getattr(self, field)}; write a finite number above 0"
                )
        for field in ("max_skips", "max_rollbacks"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be zero or more, got {getattr(self, field)}; write 0 for none")
        if not 0 <= self.warmup_steps < self.max_steps:
            raise ValueError(
                f"warmup_steps must be zero or more and below max_steps, got {self.warmup_steps} and "
                f"{self.max_steps}; change warmup_steps or raise max_steps"
            )
        if self.patience is not None and self.validate_every is None:
            raise ValueError("patience counts validations, and validate_every is None; set it, or patience to None")
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}; choose one"
            )
        if not 0 < self.decay_share <= 1:
            raise ValueError(
                f"decay_share must be above 0 and at most 1, got {self.decay_share}; write 0.1 for a tenth"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(
                f"precision must be fp32 or bf16, got {self.precision!r}; use bf16 on devices that compute in it, else "
                "fp32"
            )
        if self.global_batch_size % self.micro_batch_size:
            divisors = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
            raise ValueError(
                f"micro_batch_size must divide global_batch_size, got {self.micro_batch_size} and "
                f"{self.global_batch_size}; use one of {divisors}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TrainConfig":
        """Rebuild the settings from their JSON.

        Raises:
            ValueError: if a field is unknown or missing; the message names it.
        """
        return _from_json(cls, data)


def _from_json(cls: type[T], data: dict[str, Any]) -> T:
    try:
        return cls(**data)
    except TypeError as error:
        raise ValueError(f"{cls.__name__} cannot be read from {format_value(data)}: {format_value(error)}") from None


def format_value(value: object) -> str:
    """Format a value from a file for a message: one printable line of limited length.

    >>> format_value("a\\n"), len(format_value([1] * 1000))
    ("'a\\\\n'", 200)
    """
    text = repr(value)
    return text if len(text) <= MAX_FORMATTED_CHARS else f"{text[: MAX_FORMATTED_CHARS - 1]}…"


def format_count(count: int, noun: str, plural: str = "") -> str:
    """Format a number of things in words.

    >>> format_count(1, "row"), format_count(2000, "row"), format_count(0, "batch", "batches")
    ('1 row', '2,000 rows', '0 batches')
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def format_duration(seconds: float) -> str:
    """Format a time in the largest unit of which it has at least two.

    >>> format_duration(27_252_000.0), format_duration(1178.0), format_duration(0.0828)
    ('7,570 hours', '19.6 minutes', '0.0828 seconds')
    """
    size, unit = next(
        ((size, unit) for size, unit in ((3600, "hours"), (60, "minutes")) if seconds >= 2 * size), (1, "")
    )
    digits = f"{seconds / size:,.0f}" if seconds >= 100 * size else f"{seconds / size:.3g}"
    return f"{digits} {unit or 'seconds'}"


def format_byte_share(num_done: int, num_bytes: int) -> str:
    """Format how much of a file has been processed, in the largest unit that fits the whole.

    >>> format_byte_share(3_100_000_000, 5_000_000_000), format_byte_share(0, 999)
    ('3.1 of 5.0 GB', '0 of 999 bytes')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_done / size:.1f} of {num_bytes / size:.1f} {unit}"
    return f"{num_done} of {format_count(num_bytes, 'byte')}"


def suggest_nearest_name(name: str, known_names: Iterable[str]) -> str:
    """Suggest the known name that is nearest to an unknown one, in any case; an empty text if none is near.

    >>> suggest_nearest_name("promt", ("prompt", "answer")), suggest_nearest_name("a100-80", ("H100-80", "A100-80"))
    ("did you mean 'prompt'?", "did you mean 'A100-80'?")
    """
    if len(name) > MAX_SUGGESTED_NAME_CHARS:
        return ""
    names_by_lower_case = {known.lower(): known for known in known_names}
    nearest = difflib.get_close_matches(name.strip().lower(), list(names_by_lower_case), n=1)
    return f"did you mean '{names_by_lower_case[nearest[0]]}'?" if nearest else ""


def yuan_2b() -> ModelConfig:
    """Return the config of Yuan 2.0-2.1B. Source: examples/pretrain_yuan2.0_2.1B.sh of the official repository."""
    return _make_published_config("2b", num_layers=24, hidden_size=2048, num_heads=32, seq_len=8192)


def yuan_51b() -> ModelConfig:
    """Return the config of Yuan 2.0-51B. Source: examples/pretrain_yuan2.0_51B.sh of the official repository."""
    return _make_published_config("51b", num_layers=42, hidden_size=8192, num_heads=64, seq_len=4096)


def yuan_102b() -> ModelConfig:
    """Return the config of Yuan 2.0-102B. Source: examples/pretrain_yuan2.0_102B.sh of the official repository."""
    return _make_published_config("102b", num_layers=84, hidden_size=8192, num_heads=64, seq_len=4096)


def _make_published_config(
    name: str, *, num_layers: int, hidden_size: int, num_heads: int, seq_len: int
) -> ModelConfig:
    """Fill in the published vocabulary size and the rotary precision that the published weights were trained with."""
    return ModelConfig(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        vocab_size=135_040,
        seq_len=seq_len,
        rope_precision="bf16",
    )


def tiny(vocab_size: int = 1024) -> ModelConfig:
    """Return the full architecture at a size that trains in minutes on two CPU cores."""
    return ModelConfig(name="tiny", num_layers=3, hidden_size=160, num_heads=4, vocab_size=vocab_size, seq_len=256)


def mini() -> ModelConfig:
    """Return the published layout and vocabulary at a size that trains on two CPU cores."""
    return _make_published_config("mini", num_layers=4, hidden_size=256, num_heads=4, seq_len=2048)


MODEL_PRESETS = {"tiny": tiny, "mini": mini, "2b": yuan_2b, "51b": yuan_51b, "102b": yuan_102b}
