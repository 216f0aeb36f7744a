"""The micro-batches of a step, dealt to the replicas."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from yuan.data.corpus import Corpus
from yuan.data.shuffle import Int64Array
from yuan.plan.plan_record import PipelinePlan

BatchInputs = tuple[Tensor, Tensor]
BatchLabels = tuple[Tensor, Tensor, Tensor]


def read_micro_batches(
    corpus: Corpus, plan: PipelinePlan, positions: Int64Array, replica: int, device: torch.device
) -> Iterator[tuple[BatchInputs, BatchLabels]]:
    """The micro-batches of one step on one replica: ((tokens, documents), (labels, weights, sources)).

    The weights add up so that DeepSpeed's mean over micro-batches and replicas is the mean over the learned tokens of
    the whole step, whoever has them.

    Args:
        positions: the step's places in the mixture, of all replicas.
    """
    parts = plan.grad_accum_steps * plan.data_size
    scale = parts / max(corpus.learned(positions), 1)
    for part in np.split(positions, parts)[replica :: plan.data_size]:
        windows, sources = corpus.read(part)
        tokens, documents, labels = (
            torch.from_numpy(array.astype(np.int64)).to(device)
            for array in (windows.tokens, windows.documents, windows.labels)
        )
        weights = torch.from_numpy(windows.learned.astype(np.float32) * np.float32(scale)).to(device)
        yield (tokens, documents), (labels, weights, torch.from_numpy(sources).to(device))
