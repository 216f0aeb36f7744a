"""How much arithmetic a model is, in FLOPs a token; a multiplication with its addition counts as two."""

from yuan.config import ModelConfig

BACKWARD_FLOPS_RATIO = 2  # times the forward pass: gradients of inputs and of weights


def count_layer_forward_flops(model: ModelConfig, seq_len: int) -> float:
    """One layer, forward: 2 for each weight, the filter's convolutions included, and causal attention over half of S.

    Source: Yuan 2.0 paper, section 3.4, whose count leaves the convolutions out.
    """
    return 2 * model.layer_parameters + 2 * seq_len * model.hidden_size


def count_head_forward_flops(model: ModelConfig) -> float:
    """The tied head, forward."""
    return 2 * model.vocab_size * model.hidden_size


def count_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """What training needs for a token, forward and backward, without recomputation: the F of MFU.

    >>> from yuan.config import yuan_2b
    >>> round(count_flops_per_token(yuan_2b(), 4096) / 1e9, 2)
    13.74
    """
    forward = model.num_layers * count_layer_forward_flops(model, seq_len) + count_head_forward_flops(model)
    return (1 + BACKWARD_FLOPS_RATIO) * forward
