"""Compute the loss on windows that are not trained on, in the pipeline that trains."""

from typing import Any

import torch
from deepspeed import comm as dist

from yuan.data.corpus import Corpus
from yuan.plan.plan_record import PipelinePlan
from yuan.train.batches import count_validation_batches, read_validation_batches
from yuan.train.zero.pipeline import SourceLossTally
from yuan.train.zero.stage_timer import StageTimer


class Validator:
    """Validate the engine's weights on the first windows of a corpus, every time on the same ones.

    Args:
        tally: the one that the engine's pipeline adds losses to; its number of sources is that of training.
    """

    def __init__(
        self,
        engine: Any,
        tally: SourceLossTally,
        timer: StageTimer,
        corpus: Corpus,
        plan: PipelinePlan,
        max_windows: int,
    ) -> None:
        self._engine = engine
        self._tally = tally
        self._timer = timer
        self._corpus = corpus
        self._plan = plan
        self._num_windows = min(max_windows, sum(source.windows for source in corpus.sources))

    def run(self) -> float:
        """Return the mean loss over the target tokens, the same on all ranks; no weight, moment or gradient changes."""
        engine = self._engine
        self._tally.take()
        replica = engine.grid.get_data_parallel_rank()
        batches = read_validation_batches(self._corpus, self._plan, self._num_windows, replica, engine.device)
        engine.reset_activation_shape()
        engine.eval_batch(
            batches,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=count_validation_batches(self._num_windows, self._plan),
        )
        engine.reset_activation_shape()
        self._timer.take()  # the next step's compute time is its own
        loss_sums, token_counts = self._tally.take()
        message = torch.stack([loss_sums.sum(), token_counts.sum()]).to(engine.device, torch.float64)
        dist.all_reduce(message)
        loss_sum, num_tokens = message.tolist()
        return loss_sum / max(num_tokens, 1.0)
