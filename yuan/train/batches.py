"""Read the micro-batches of a step and assign them to the data-parallel replicas."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from yuan.data.corpus import Corpus
from yuan.data.shuffle import Int64Array
from yuan.plan.plan_record import PipelinePlan

Float32Array = npt.NDArray[np.float32]
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
        yield _read_micro_batch(corpus, micro_batch, np.full(len(micro_batch), scale, np.float32), device)


def count_validation_batches(num_windows: int, plan: PipelinePlan) -> int:
    """Return the number of micro-batches of each replica in a validation; the last ones may be filled up."""
    return -(-num_windows // (plan.micro_batch_size * plan.data_size))


def read_validation_batches(
    corpus: Corpus, plan: PipelinePlan, num_windows: int, replica: int, device: torch.device
) -> Iterator[tuple[BatchInputs, BatchLabels]]:
    """Yield one replica's micro-batches of the first windows of a corpus; windows that fill up have no weight."""
    size = plan.micro_batch_size
    for number in range(count_validation_batches(num_windows, plan)):
        first = (number * plan.data_size + replica) * size
        positions = np.arange(first, first + size, dtype=np.int64)
        is_window = positions < num_windows
        yield _read_micro_batch(corpus, np.where(is_window, positions, 0), is_window.astype(np.float32), device)


def _read_micro_batch(
    corpus: Corpus, positions: Int64Array, weights_B: Float32Array, device: torch.device
) -> tuple[BatchInputs, BatchLabels]:
    """Read the windows at these positions; the weight of a target token is that of its window."""
    windows, sources = corpus.read(positions)
    tokens, documents, labels = (
        torch.from_numpy(array.astype(np.int64)).to(device)
        for array in (windows.tokens, windows.documents, windows.labels)
    )
    weights_BS = torch.from_numpy(windows.loss_mask.astype(np.float32) * weights_B[:, None]).to(device)
    return (tokens, documents), (labels, weights_BS, torch.from_numpy(sources).to(device))
