"""Parts of a training step on one GPU, forward and backward: `python benchmarks/yuan_gpu_parts.py`, a minute.

A layer of the 2.1B model on rows of several documents, compiled and not, and the head with its loss in blocks of
several sizes, compared with the compiled plain loss; bf16, S 4,096, two rows. Medians of ten. Without a GPU one line
reports that it was skipped; `--small` runs every line on any device, to test the script itself.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import torch
from pairs import make_line, print_lines
from torch import Tensor
from torch.nn import functional as F
from yuan_gpu import wait_for_device

from yuan.config import ModelConfig, tiny, yuan_2b
from yuan.model.attention_inputs import make_packed_inputs
from yuan.model.loss import compute_default_block_rows, head_loss
from yuan.model.transformer import Layer

NUM_ROWS = 2
UNMEASURED_CALLS = 3  # the first ones, which compile
MEASURED_CALLS = 10
DOCUMENT_COUNTS = (1, 2, 16, 64)  # in each row
BLOCK_BYTES = (2**29, 2**30, 2**31)  # of fp32 logits at a time
Part = Callable[[], None]


def main() -> int:
    is_small = "--small" in sys.argv
    if not torch.cuda.is_available() and not is_small:
        print_lines({**make_line("parts of a step", None, "ms"), "skipped": "no GPU here"})
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = dataclasses.replace(tiny(), seq_len=128) if is_small else dataclasses.replace(yuan_2b(), seq_len=4096)
    torch.manual_seed(0)
    for num_documents in DOCUMENT_COUNTS:
        for is_compiled in (False, True) if device.type == "cuda" else (False,):
            name = f"layer, {num_documents} documents a row, {'compiled' if is_compiled else 'not compiled'}"
            show_part(name, make_layer_part(config, device, num_documents, is_compiled=is_compiled), device)
    default = compute_default_block_rows(torch.empty(config.vocab_size, 1, device=device))
    blocks = [max(1, size // (4 * config.vocab_size)) for size in BLOCK_BYTES] if not is_small else [default]
    for block in blocks:
        show_part(f"head and loss, blocks of {block} rows", make_loss_part(config, device, block), device)
    if device.type == "cuda":
        show_part("head and plain loss, compiled", make_plain_loss_part(config, device), device)
    return 0


def make_layer_part(config: ModelConfig, device: torch.device, num_documents: int, *, is_compiled: bool) -> Part:
    """Return a forward and backward pass of a layer on packed documents of equal length."""
    layer = Layer(config).to(device, torch.bfloat16)
    if is_compiled:
        layer.compile()
    x = make_hidden(config, device)
    documents = torch.arange(config.seq_len, device=device) // max(1, config.seq_len // num_documents)
    rows = make_packed_inputs(config, documents.expand(NUM_ROWS, -1).contiguous(), x)
    gradient = torch.randn_like(x)
    return lambda: layer(x, rows).backward(gradient)


def make_loss_part(config: ModelConfig, device: torch.device, block: int) -> Part:
    """Return the head and its loss, which add the head's gradient to a sum."""
    x, head, labels = make_hidden(config, device), make_head(config, device), make_labels(config, device)
    weights, total = torch.full(labels.shape, 1 / labels.numel(), device=device), torch.zeros_like(head).float()
    return lambda: head_loss(x, head, labels, weights, block=block, head_sum=total).backward()


def make_plain_loss_part(config: ModelConfig, device: torch.device) -> Part:
    """Return the head and its loss with all logits in memory."""
    x, head, labels = make_hidden(config, device), make_head(config, device), make_labels(config, device)

    @torch.compile
    def loss() -> Tensor:
        return F.cross_entropy(F.linear(x, head).float().flatten(0, 1), labels.flatten())

    return lambda: loss().backward()


def make_hidden(config: ModelConfig, device: torch.device) -> Tensor:
    shape = (NUM_ROWS, config.seq_len, config.hidden_size)
    return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)


def make_head(config: ModelConfig, device: torch.device) -> Tensor:
    head = 0.02 * torch.randn(config.vocab_size, config.hidden_size, device=device)
    return head.bfloat16().requires_grad_()


def make_labels(config: ModelConfig, device: torch.device) -> Tensor:
    return torch.randint(config.vocab_size, (NUM_ROWS, config.seq_len), device=device)


def show_part(name: str, part: Part, device: torch.device) -> None:
    """Show the median milliseconds of a part."""
    seconds = []
    for call in range(UNMEASURED_CALLS + MEASURED_CALLS):
        wait_for_device(device)
        begun = time.perf_counter()
        part()
        wait_for_device(device)
        if call >= UNMEASURED_CALLS:
            seconds.append(time.perf_counter() - begun)
    print_lines(make_line(name, round(1000 * statistics.median(seconds), 2), "ms"))


if __name__ == "__main__":
    sys.exit(main())
