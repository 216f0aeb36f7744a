"""Overhead of localized filtering compared with basic attention: `python benchmarks/yuan_filter.py`.

Goals: on the shape of the paper's Table 1 (6 layers, H 768, V 135,040, S 2,048) at most the paper's 9.4 % more time a
step, and in one layer of the 2.1B model (H 2,048, 32 heads) at most 1.3 times its share of the multiplications, 9.6 %.
"""

import os
import sys
import time

import torch
from pairs import compare_processes, make_at_most_line, print_lines, serve_measurements

from infra.machine import has_fast_bf16
from yuan.config import ModelConfig, yuan_2b
from yuan.model.attention_inputs import make_causal_inputs
from yuan.model.loss import head_loss
from yuan.model.transformer import Layer, Yuan

TABLE_1 = ModelConfig(name="table-1", num_layers=6, hidden_size=768, num_heads=12, vocab_size=135_040, seq_len=2048)
NUM_LAYER_TOKENS = 1024
MAX_TABLE_1_RATIO = 1.094
MAX_LAYER_SHARE = 1.3 * 0.096


def run(shape: str, variant: str, precision: str) -> None:
    """Serve the measurements of one variant: seconds of a forward and backward pass."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if shape == "table-1":
        config = ModelConfig(**{**TABLE_1.to_json(), "local_filter": variant})
        model = Yuan(config).to(dtype)
        tokens = torch.randint(0, config.vocab_size, (1, config.seq_len))
        weights = torch.full(tokens.shape, 1 / config.seq_len)

        def step() -> None:
            x = model.embedding(tokens)
            rows = make_causal_inputs(config, config.seq_len, x)
            for layer in model.layers:
                x = layer(x, rows)
            head_loss(model.norm(x), model.embedding.weight, tokens, weights).backward()
            model.zero_grad()
    else:
        config = ModelConfig(**{**yuan_2b().to_json(), "local_filter": variant})
        layer = Layer(config).to(dtype)
        x = torch.randn(1, NUM_LAYER_TOKENS, config.hidden_size, dtype=dtype).requires_grad_()
        rows = make_causal_inputs(config, NUM_LAYER_TOKENS, x)

        def step() -> None:
            layer(x, rows).sum().backward()
            layer.zero_grad()

    def measure() -> dict[str, float]:
        began = time.perf_counter()
        step()
        return {"seconds": time.perf_counter() - began}

    step()
    serve_measurements(measure)


def main() -> int:
    precision = "bf16" if has_fast_bf16() else "fp32"
    ok = True
    for shape, max_ratio in (("table-1", MAX_TABLE_1_RATIO), ("2b-layer", 1 / (1 - MAX_LAYER_SHARE))):
        with_filter, without_filter = (shape, "two_convs_norm", precision), (shape, "none", precision)
        measured_ratios, seconds = compare_processes(__file__, with_filter, without_filter, "seconds")
        name = f"filter, {shape}, {precision}"
        report = make_at_most_line(
            name, measured_ratios, round(max_ratio, 3), figure=round(seconds, 3), unit="s", peer="basic attention"
        )
        ok &= print_lines({**report, "share": round(1 - 1 / report["ratio"], 4)})
    return 0 if ok else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(*sys.argv[1:])
    else:
        sys.exit(main())
