"""How much arithmetic a model is, in FLOPs a token; a multiplication with its addition counts as two."""

from yuan.config import ModelConfig

BACKWARD = 2  # times the forward pass: gradients of inputs and of weights


def layer_forward(model: ModelConfig, seq_len: int) -> float:
    """One layer, forward: 2 for each weight, the filter's convolutions included, and causal attention over half of S.

    Source: Yuan 2.0 paper, section 3.4, whose count leaves the convolutions out.
    """
    return 2 * model.layer_parameters + 2 * seq_len * model.hidden_size


def head_forward(model: ModelConfig) -> float:
    """The tied head, forward."""
    return 2 * model.vocab_size * model.hidden_size


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """What training needs for a token, forward and backward, without recomputation: the F of MFU.

    >>> from yuan.config import yuan_2b
    >>> round(flops_per_token(yuan_2b(), 4096) / 1e9, 2)
    13.74
    """
    forward = model.num_layers * layer_forward(model, seq_len) + head_forward(model)
    return (1 + BACKWARD) * forward
