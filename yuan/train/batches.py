"""Read the micro-batches of a step and assign them to the data-parallel replicas."""

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
    """Yield the micro-batches of one step on one replica: ((tokens, documents), (labels, weights, sources)).

    The loss weights are scaled so that DeepSpeed's mean over micro-batches and replicas equals the mean over all target
    tokens of the step, however they are distributed over the replicas.

    Args:
        positions: positions of the step in the mixture, of all replicas.
    """
    num_micro_batches = plan.grad_accum_steps * plan.data_size
    scale = num_micro_batches / max(corpus.count_target_tokens(positions), 1)

    # Replica r takes micro-batches r, r + D, r + 2 D, ...
    for micro_batch in np.split(positions, num_micro_batches)[replica :: plan.data_size]:
        windows, sources = corpus.read(micro_batch)
        tokens, documents, labels = (
            torch.from_numpy(array.astype(np.int64)).to(device)
            for array in (windows.tokens, windows.documents, windows.labels)
        )
        # The loss mask times the scale, so the mask is also the weight of each target token.
        weights = torch.from_numpy(windows.loss_mask.astype(np.float32) * np.float32(scale)).to(device)
        yield (tokens, documents), (labels, weights, torch.from_numpy(sources).to(device))
