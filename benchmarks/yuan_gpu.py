"""Training of the 2.1B model on one GPU, compared with transformers' Llama: `python benchmarks/yuan_gpu.py`.

Measures tokens/s, MFU, and the peak memory with and without block-wise loss. Goals: an MFU of at least 0.5, and at
least Llama's tokens/s.

bf16, S 4,096, AdamW fused, layers compiled, one row a micro-batch for each 32 GiB of the device's memory; twice as many
for the MFU, which only the block-wise loss leaves room for. Llama's layers and its loss are compiled too. Needs
`yuan/`, torch and, for the peer, transformers; nothing of the platform. Without a GPU each line reports that it was
skipped; `--small` runs every line on any device, to test the script itself.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch
from pairs import PAIRS, compute_interval, make_at_least_line, make_line, measure_ratios, print_lines
from torch import Tensor, nn
from torch.nn import functional as F

from yuan.config import ModelConfig, yuan_2b
from yuan.model.attention_inputs import make_causal_inputs
from yuan.model.loss import head_loss, weighted_cross_entropy
from yuan.model.transformer import Yuan
from yuan.plan.flops import count_flops_per_token

STEPS_PER_MEASUREMENT = 3
GIB = 2**30
PEAK_TFLOPS = {"H200": 989.5, "H100": 989.5, "A100": 312.0, "A800": 312.0, "L40S": 362.0}  # dense bf16, data sheets
MFU_GOAL = 0.5
Contestant = Callable[[], None]


def make_our_step(config: ModelConfig, tokens: Tensor, *, blockwise: bool) -> Contestant:
    """Return a training step of Yuan, with or without the head fused into the loss."""
    with tokens.device:
        model = Yuan(config).bfloat16()
    layers = [compile_layer(layer) for layer in model.layers]
    labels = tokens[:, 1:]
    weights = torch.full(labels.shape, 1 / labels.numel(), device=tokens.device)

    def loss() -> Tensor:
        x = model.embedding(tokens[:, :-1])
        rows = make_causal_inputs(config, x.shape[1], x)
        for layer in layers:
            x = layer(x, rows)
        if blockwise:
            return head_loss(model.norm(x), model.embedding.weight, labels, weights)
        return weighted_cross_entropy(model.compute_logits(x), labels, weights)

    return make_step(model, loss)


def make_llama_step(config: ModelConfig, tokens: Tensor) -> Contestant:
    """Return a training step of transformers' Llama with equal layers, width and parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(tokens.device):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=14 * config.hidden_size // 3,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=config.seq_len,
                tie_word_embeddings=True,
                attn_implementation="sdpa",
                use_cache=False,
            )
        ).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.compile()
    labels = tokens[:, 1:].flatten()

    @torch.compile
    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x.flatten(0, 1), model.lm_head.weight).float(), labels)

    return make_step(model, lambda: loss(model.model(input_ids=tokens[:, :-1]).last_hidden_state))


def compile_layer(layer: nn.Module) -> nn.Module:
    layer.compile()
    return layer


def make_step(model: nn.Module, loss: Callable[[], Tensor]) -> Contestant:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_speed_measure(step: Contestant, num_tokens: int, device: torch.device) -> Callable[[], float]:
    """Return a function that measures tokens/s."""

    def measure() -> float:
        wait_for_device(device)
        began = time.perf_counter()
        for _ in range(STEPS_PER_MEASUREMENT):
            step()
        wait_for_device(device)
        return STEPS_PER_MEASUREMENT * num_tokens / (time.perf_counter() - began)

    return measure


def wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peak_gib(step: Contestant, device: torch.device) -> float | None:
    """Return the peak memory of tensors during a step."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return round(torch.cuda.max_memory_allocated(device) / GIB, 2)


def compare(config: ModelConfig, tokens: Tensor) -> bool:
    """Measure our step with both losses, then with twice the rows, one after the other in memory; then Llama's.

    Args:
        tokens: rows for the MFU; the other measurements use the first half.
    """
    device, half = tokens.device, tokens[: -(-len(tokens) // 2)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for loss, rows, blockwise in (("plain loss", half, False), ("block-wise loss", half, True)):
        measure_and_show(
            f"{config.name}, {loss}, {len(rows)} rows", name, make_our_step(config, rows, blockwise=blockwise), rows
        )
        release(device)

    title = f"{config.name}, block-wise loss, {len(tokens)} rows"
    rates = measure_and_show(title, name, make_our_step(config, tokens, blockwise=True), tokens)
    release(device)
    peak = next((rate for name_part, rate in PEAK_TFLOPS.items() if name_part in name), None)
    ok = True
    if peak is None:
        print_lines(
            {**make_line(f"{config.name}, MFU", None, "share"), "skipped": f"the peak rate of {name} is not known"}
        )
    else:
        mfu = [rate * count_flops_per_token(config, config.seq_len) / (peak * 1e12) for rate in rates]
        low, high = compute_interval(mfu)
        figure, goal = round(statistics.median(mfu), 4), f"at least {MFU_GOAL}"
        ok = print_lines(
            make_line(f"{config.name}, MFU, {name}", figure, "share", None, None, (low, high), goal, low >= MFU_GOAL)
        )

    step, peer, num_tokens = (
        make_our_step(config, half, blockwise=True),
        make_llama_step(config, half),
        half[:, 1:].numel(),
    )
    step()
    peer()
    pair_ratios = measure_ratios(
        make_speed_measure(step, num_tokens, device), make_speed_measure(peer, num_tokens, device)
    )
    title, figure = f"{config.name} beside Llama, {name}", round(make_speed_measure(step, num_tokens, device)())
    return (
        print_lines(
            make_at_least_line(title, pair_ratios, 1.0, figure=figure, unit="tokens/s", peer="transformers Llama")
        )
        and ok
    )


def measure_and_show(title: str, device_name: str, step: Contestant, tokens: Tensor) -> list[float]:
    """Show the peak memory and the speed of a step; return the measured tokens/s."""
    device = tokens.device
    step()
    print_lines(make_line(f"{title}, peak memory, {device_name}", measure_peak_gib(step, device), "GiB"))
    rates = [make_speed_measure(step, tokens[:, 1:].numel(), device)() for _ in range(PAIRS)]
    print_lines(make_line(f"{title}, {device_name}", round(statistics.median(rates)), "tokens/s"))
    return rates


def release(device: torch.device) -> None:
    """Free the memory of the last step's model, which the compiled layers refer to in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--small", action="store_true")
    small = arguments.parse_args().small
    if not torch.cuda.is_available() and not small:
        print_lines({**make_line("2.1B on one GPU", None, "tokens/s"), "skipped": "no GPU here"})
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, rows = dataclasses.replace(yuan_2b(), seq_len=4096), 2
    if small:
        config = ModelConfig(name="small", num_layers=2, hidden_size=128, num_heads=4, vocab_size=2_048, seq_len=128)
    elif device.type == "cuda":
        rows = 2 * max(1, torch.cuda.get_device_properties(device).total_memory // (32 * GIB))
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (rows, config.seq_len + 1), device=device)
    return 0 if compare(config, tokens) else 1


if __name__ == "__main__":
    sys.exit(main())
