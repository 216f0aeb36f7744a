"""Throughput of a training step compared with transformers' Llama: `python benchmarks/yuan_step.py`.

Goals: at least Llama's tokens/s in each precision, and in bf16 at least twice those in fp32.

Both models have equal layers, width and number of parameters: 6 layers, H 768, 12 heads, V 32,000, one row of 512
tokens, AdamW. Llama's inner size is 14H/3, so that both have the same number of weights in a layer. All cores; fp32,
and bf16 where the CPU has hardware support for it.
"""

import os
import sys
import time
from collections.abc import Callable

import torch
from pairs import compare_processes, make_at_least_line, make_line, print_lines, serve_measurements
from torch import Tensor, nn

from infra.machine import has_fast_bf16

NUM_LAYERS = 6
HIDDEN_SIZE = 768
NUM_HEADS = 12
VOCAB_SIZE = 32_000
SEQ_LEN = 512
STEPS_PER_MEASUREMENT = 2


def make_our_model(dtype: torch.dtype) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from yuan.config import ModelConfig
    from yuan.model.attention_inputs import make_causal_inputs
    from yuan.model.loss import head_loss
    from yuan.model.transformer import Yuan

    config = ModelConfig(
        name="step",
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        num_heads=NUM_HEADS,
        vocab_size=VOCAB_SIZE,
        seq_len=SEQ_LEN,
    )
    model = Yuan(config).to(dtype)
    weights = torch.full((1, SEQ_LEN - 1), 1 / (SEQ_LEN - 1))

    def loss_of(tokens: Tensor) -> Tensor:
        x = model.embedding(tokens[:, :-1])
        rows = make_causal_inputs(config, SEQ_LEN - 1, x)
        for layer in model.layers:
            x = layer(x, rows)
        return head_loss(model.norm(x), model.embedding.weight, tokens[:, 1:], weights)

    return model, loss_of


def make_llama_model(dtype: torch.dtype) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=14 * HIDDEN_SIZE // 3,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    return model, lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, 1:], shift_labels=tokens[:, 1:]).loss


def run(name: str, precision: str) -> None:
    """Serve the measurements of one model, in tokens/s."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, loss_of = (make_our_model if name == "ours" else make_llama_model)(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    tokens = torch.randint(0, VOCAB_SIZE, (1, SEQ_LEN))

    def step() -> None:
        loss_of(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    def measure() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(STEPS_PER_MEASUREMENT):
            step()
        return {"tokens_per_s": STEPS_PER_MEASUREMENT * (SEQ_LEN - 1) / (time.perf_counter() - began)}

    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    step()
    serve_measurements(measure)


def main() -> int:
    ok = True
    precisions = ["fp32", "bf16"] if has_fast_bf16() else ["fp32"]
    for precision in precisions:
        speed_ratios, speed = compare_processes(__file__, ("ours", precision), ("llama", precision), "tokens_per_s")
        name = f"training step {precision}"
        ok &= print_lines(
            make_at_least_line(name, speed_ratios, 1.0, figure=round(speed), unit="tokens/s", peer="transformers Llama")
        )
    if "bf16" in precisions:
        speed_ratios, speed = compare_processes(__file__, ("ours", "bf16"), ("ours", "fp32"), "tokens_per_s")
        name = "training step bf16 over fp32"
        ok &= print_lines(
            make_at_least_line(name, speed_ratios, 2.0, figure=round(speed), unit="tokens/s", peer="ours fp32")
        )
    else:
        print_lines({**make_line("training step bf16", None, "tokens/s"), "skipped": "this processor has no fast bf16"})
    return 0 if ok else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(*sys.argv[1:])
    else:
        sys.exit(main())
