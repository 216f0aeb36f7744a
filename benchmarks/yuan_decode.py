"""Decoding throughput compared with transformers' Llama with its KV cache: `python benchmarks/yuan_decode.py`.

Goal: at least Llama's tokens/s.

The models of yuan_step.py, greedy, 64 tokens after a prompt of 64, at batch 1 and 16; all cores, fp32, and bf16 where
the CPU has hardware support for it. The prefill is not counted.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import yuan_step
from pairs import compare_processes, make_at_least_line, print_lines, serve_measurements
from torch import Tensor

from infra.machine import has_fast_bf16
from yuan.model.transformer import Yuan

NUM_PROMPT_TOKENS = 64
NUM_NEW_TOKENS = 64
Step = Callable[[Tensor], Tensor]


def make_our_step(model: Any, batch: int) -> Step:
    """Return a function from the next tokens (B, S) to the logits (B, V) after them, with its own cache."""
    block = model.make_cache_block(batch, NUM_PROMPT_TOKENS + NUM_NEW_TOKENS)
    slots = [block.take_slot() for _ in range(batch)]
    return lambda tokens: model.forward_incremental(tokens, slots)


def make_llama_step(model: Any, batch: int) -> Step:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    return lambda tokens: model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def run(name: str, precision: str, batch: str) -> None:
    """Serve the measurements of one model, in tokens/s."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, _ = (yuan_step.make_our_model if name == "ours" else yuan_step.make_llama_model)(dtype)
    if isinstance(model, Yuan):
        model.pack_for_generation()  # as every process does that generates
    model.eval()
    rows = int(batch)
    prompt = torch.randint(0, yuan_step.VOCAB_SIZE, (rows, NUM_PROMPT_TOKENS))

    @torch.inference_mode()
    def measure() -> dict[str, float]:
        step = (make_our_step if name == "ours" else make_llama_step)(model, rows)
        last = step(prompt).argmax(dim=-1)
        began = time.perf_counter()
        for _ in range(NUM_NEW_TOKENS):
            last = step(last[:, None]).argmax(dim=-1)
        return {"tokens_per_s": rows * NUM_NEW_TOKENS / (time.perf_counter() - began)}

    measure()
    serve_measurements(measure)


def main() -> int:
    ok = True
    for precision in ("fp32", "bf16") if has_fast_bf16() else ("fp32",):
        for batch in ("1", "16"):
            our_arguments, peer_arguments = ("ours", precision, batch), ("llama", precision, batch)
            speed_ratios, speed = compare_processes(__file__, our_arguments, peer_arguments, "tokens_per_s")
            name = f"decoding {precision}, batch {batch}"
            ok &= print_lines(
                make_at_least_line(
                    name, speed_ratios, 1.0, figure=round(speed), unit="tokens/s", peer="transformers Llama"
                )
            )
    return 0 if ok else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(*sys.argv[1:])
    else:
        sys.exit(main())
