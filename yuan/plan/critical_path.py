"""The critical path of a 1F1B step, in closed form.

The period u of a stage is its time per micro-batch once the pipeline is full: its compute time and the transfers over
both its links, c + x + x'. The critical path follows the first micro-batch from stage k to the last stage and back,
then the periods of stage k while it is full, and the last micro-batch to the last stage and back again:

    Σ (c + x) + max over k of [ f · u_k + max(w · q_k, Σ u of the later stages, if f > 0) ]

with f = max(A - P + k, 0) the micro-batches that stage k takes while it is full, w = min(P - 1 - k, A - 1) those it
takes while the pipeline fills or drains, and q the longer of its two passes, with half of its links' transfers. With
equal stages that is the textbook formula Σ (c + x) + (A - 1) · u. No schedule in 1F1B's order is shorter.

Letters: P stages, A micro-batches.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from yuan.plan.memory_model import IntArray


def count_steady_batches(num_stages: int, grad_accum_steps: int) -> IntArray:
    """Return f for each stage: the micro-batches that it takes while it is full."""
    counts: IntArray = np.maximum(grad_accum_steps - num_stages + np.arange(num_stages), 0)
    return counts


def count_filling_batches(num_stages: int, grad_accum_steps: int) -> IntArray:
    """Return w for each stage: the micro-batches that it takes while the pipeline fills or drains."""
    counts: IntArray = np.minimum(np.arange(num_stages)[::-1], grad_accum_steps - 1)
    return counts


def compute_waits(
    compute: Sequence[float],
    longer_passes: Sequence[float],
    links: Sequence[float],
    returns: Sequence[float],
    grad_accum_steps: int,
) -> list[float]:
    """Return what each stage adds to Σ (c + x) if it is the bottleneck; the step takes the maximum.

    Args:
        compute: c of each stage, in seconds.
        longer_passes: the longer of the two passes of each stage, computing only.
        links: x between each stage and the next, both directions; P - 1 of them.
        returns: for each stage, Σ x of the links behind the next stage, or a lower bound of it.
        grad_accum_steps: A.

    >>> compute_waits([3, 3, 3], [2, 2, 2], [0, 0], [0, 0, 0], 5)
    [12.0, 12.0, 12.0]
    """
    num_stages = len(compute)
    links_before, links_after = [0.0, *links], [*links, 0.0]
    periods = [c + x + y for c, x, y in zip(compute, links_before, links_after, strict=True)]

    # Σ (c + x) of the stages after each one, x before the stage; `returns` completes it to their Σ u.
    sums = [c + x for c, x in zip(compute, links_before, strict=True)]
    later_sums = [*accumulate(reversed(sums[1:]), initial=0.0)][::-1]

    num_steady = count_steady_batches(num_stages, grad_accum_steps)
    num_filling = count_filling_batches(num_stages, grad_accum_steps)
    waits = []
    for k, (f, w) in enumerate(zip(num_steady, num_filling, strict=True)):
        q = longer_passes[k] + (links_before[k] + links_after[k]) / 2
        later_periods = later_sums[k] + returns[k] if f else 0.0
        waits.append(float(f * periods[k] + max(w * q, later_periods)))
    return waits
