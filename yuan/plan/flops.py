"""Count a model's FLOPs per token; a multiply-add counts as two."""

from yuan.config import ModelConfig

BACKWARD_FLOPS_RATIO = 2  # over the forward pass: gradients of inputs and of weights


def count_layer_forward_flops(model: ModelConfig, seq_len: int) -> float:
    """Count one layer's forward pass: 2 per weight, with the filter's convolutions, and causal attention over S / 2.

    Source: Yuan 2.0 paper, section 3.4, which does not count the convolutions.
    """
    return 2 * model.layer_parameters + 2 * seq_len * model.hidden_size


def count_head_forward_flops(model: ModelConfig) -> float:
    """Count the forward pass of the tied head."""
    return 2 * model.vocab_size * model.hidden_size


def count_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Count the training FLOPs per token, both passes, without recomputation: the FLOPs that MFU is defined on.

    >>> from yuan.config import yuan_2b
    >>> round(count_flops_per_token(yuan_2b(), 4096) / 1e9, 2)
    13.74
    """
    forward = model.num_layers * count_layer_forward_flops(model, seq_len) + count_head_forward_flops(model)
    return (1 + BACKWARD_FLOPS_RATIO) * forward
