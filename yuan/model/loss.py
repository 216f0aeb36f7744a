"""Token-weighted cross-entropy."""

from torch import Tensor
from torch.nn import functional as F


def weighted_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Sum of weight times negative log-probability over all tokens, in fp32.

    The weights carry the normalisation: with 1/n for each of the n learned tokens of a whole step the result is the
    mean over the step, whatever rows and micro-batches they lie in. Rows without weight cost nothing.
    """
    learned = weights_BS != 0
    losses = F.cross_entropy(logits_BSV[learned].float(), labels_BS[learned], reduction="none")
    return (losses * weights_BS[learned]).sum()
