"""The workload to plan: a model, its batches, and the grid of pipeline, data and micro-batch size."""

from dataclasses import dataclass
from typing import get_args

from yuan.config import MAX_MODEL_SIZE, FieldError, ModelConfig, Precision, TrainConfig

LOSS_BLOCK_BYTES = 512 * 2**20
MAX_GLOBAL_BATCH_SIZE = 2**20
PUBLISHED_BATCH_SIZES = {
    "2b": 384,
    "51b": 1152,
    "102b": 1152,
}  # samples per step, from the examples of the official repository


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and the samples of one optimizer step.

    Attributes:
        loss_block: rows of logits in memory at a time on the last stage; None is the plain loss, which keeps all rows
            (for comparison only: the engine never does).
        isolate_documents: documents do not attend to each other, which needs memory for an attention mask.

    Raises:
        ValueError: if the precision is unknown, or a number is not in its range: a sequence has at most the model's
            positions, a step at most MAX_GLOBAL_BATCH_SIZE samples.
    """

    model: ModelConfig
    seq_len: int
    global_batch_size: int
    precision: Precision
    loss_block: int | None = None
    isolate_documents: bool = True

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}; choose one of them"
            )
        limits = {
            "seq_len": self.model.seq_len,
            "global_batch_size": MAX_GLOBAL_BATCH_SIZE,
            "loss_block": MAX_MODEL_SIZE,
        }
        for field, limit in limits.items():
            value = getattr(self, field)
            if field == "loss_block" and value is None:
                continue
            if type(value) is not int or not 1 <= value <= limit:
                place = f", the positions of {self.model.name}" if field == "seq_len" else ""
                raise FieldError([field], f"must be an integer from 1 to {limit:,}{place}, got {value!r}; change it")

    @classmethod
    def from_train_config(cls, model: ModelConfig, train_config: TrainConfig) -> "Workload":
        """Build the workload of training settings, with block-wise loss."""
        return cls(
            model=model,
            seq_len=train_config.seq_len,
            global_batch_size=train_config.global_batch_size,
            precision=train_config.precision,
            loss_block=compute_default_loss_block(model),
            isolate_documents=train_config.isolate_documents,
        )

    @property
    def bytes_per_value(self) -> int:
        return 2 if self.precision == "bf16" else 4


def compute_default_loss_block(model: ModelConfig) -> int:
    """Return the number of rows whose fp32 logits take LOSS_BLOCK_BYTES (512 MiB)."""
    return max(1, LOSS_BLOCK_BYTES // (4 * model.vocab_size))


def compute_max_stages(model: ModelConfig) -> int:
    """Return the most stages of a model: one for each layer, and a last one for norm and head alone."""
    return model.num_layers + 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """P stages by D replicas, B samples in a micro-batch, A micro-batches a step in each replica."""

    pipeline_size: int
    data_size: int
    micro_batch_size: int
    grad_accum_steps: int
