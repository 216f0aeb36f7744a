"""The longest way through a step of 1F1B, in closed form.

A stage's rhythm u is what it needs for a micro-batch once the pipeline is full: its computing and what both its links
carry, c + x + x'. The longest way goes with the first micro-batch from stage k to the last stage and back, waits out
the rhythm of stage k for as long as it is full, and goes with the last micro-batch to the last stage and back again:

    Σ (c + x) + max over k of [ f · u_k + max(w · q_k, Σ u of the later stages, if f > 0) ]

with f = max(A - P + k, 0) the micro-batches that stage k takes while it is full, w = min(P - 1 - k, A - 1) those it
takes while the pipeline fills or drains, and q the longer of its two passes, with half of what its links carry. With
equal stages that is the textbook's Σ (c + x) + (A - 1) · u. No schedule in 1F1B's order is shorter.

Letters: P stages, A micro-batches.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from yuan.plan.memory_model import IntArray


def count_steady_batches(stages: int, accum: int) -> IntArray:
    """f for each stage."""
    found: IntArray = np.maximum(accum - stages + np.arange(stages), 0)
    return found


def count_filling_batches(stages: int, accum: int) -> IntArray:
    """w for each stage."""
    found: IntArray = np.minimum(np.arange(stages)[::-1], accum - 1)
    return found


def compute_waits(
    own: Sequence[float], longer: Sequence[float], links: Sequence[float], returns: Sequence[float], accum: int
) -> list[float]:
    """What each stage would add to Σ (c + x) if it were the one that sets the pace; the largest is what counts.

    Args:
        own: c of each stage, in seconds.
        longer: the longer of its two passes, computing only.
        links: x between each stage and the next, both directions; P - 1 of them.
        returns: for each stage, Σ x of the links behind the next stage, or a bound below it.
        accum: A.

    >>> compute_waits([3, 3, 3], [2, 2, 2], [0, 0], [0, 0, 0], 5)
    [12.0, 12.0, 12.0]
    """
    stages = len(own)
    before, after = [0.0, *links], [*links, 0.0]
    rhythm = [c + x + y for c, x, y in zip(own, before, after, strict=True)]
    # Σ (c + x) of the stages behind k, its link to them included; `returns` makes that Σ u
    behind = [*accumulate((c + x for c, x in zip(own[:0:-1], before[:0:-1], strict=True)), initial=0.0)][::-1]
    found = []
    for k, (f, w) in enumerate(
        zip(count_steady_batches(stages, accum), count_filling_batches(stages, accum), strict=True)
    ):
        passes = w * (longer[k] + (before[k] + after[k]) / 2)
        found.append(float(f * rhythm[k] + max(passes, behind[k] + returns[k] if f else 0.0)))
    return found
