"""Ablation of the local filter: the paper's Table 1 at a scale for a small CPU.

`python benchmarks/yuan_ablation.py` trains seven networks that differ only in `local_filter`, each from three seeds, on
the same windows of real text for the same steps, and compares their losses on held-out files with the paper's. The
text is the source of Python's standard library, which every machine has. Takes 14 minutes on two cores.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from pairs import make_line, print_lines
from torch import Tensor, nn

from yuan.config import LocalFilterKind, ModelConfig
from yuan.model.attention_inputs import make_causal_inputs
from yuan.model.loss import head_loss
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer, train

NUM_LAYERS = 4
HIDDEN_SIZE = 128
NUM_HEADS = 4
VOCAB_SIZE = 2_048
SEQ_LEN = 128

SEEDS = (0, 1, 2)
MAX_STEPS = 400
WARMUP_STEPS = 40
GLOBAL_BATCH_SIZE = 8
LEARNING_RATE = 1e-3
NUM_TEST_WINDOWS = 256
FILES_PER_TEST_FILE = 20  # one file of so many is held out
PAPER_LOSSES = {  # Table 1 of the Yuan 2.0 paper: test loss of 6 layers, H 768
    "none": 1.251,
    "conv7": 1.2093,
    "two_convs": 1.2122,
    "two_convs_norm": 1.2069,
}


def make_windows() -> tuple[Tensor, Tensor, int]:
    """Return train and test windows (W, S + 1), of files split by a hash of their names, and the vocabulary size."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts}]
    texts = {path.relative_to(library).as_posix(): path.read_text(errors="ignore") for path in files}
    held_out = {name for name in texts if hashlib.sha256(name.encode()).digest()[0] % FILES_PER_TEST_FILE == 0}
    tokenizer = train(
        (row for name in sorted(texts.keys() - held_out)[::4] for row in texts[name].splitlines() if row.strip()),
        vocab_size=VOCAB_SIZE,
        pieces="bpe",
    )
    train_windows, test_windows = (
        cut_windows([texts[name] for name in sorted(texts) if (name in held_out) is is_test], tokenizer)
        for is_test in (False, True)
    )
    test_order = torch.randperm(len(test_windows), generator=torch.Generator().manual_seed(0))
    return train_windows, test_windows[test_order], len(tokenizer)


def cut_windows(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    tokens = torch.tensor([token for text in texts for token in [*tokenizer.encode(text), tokenizer.eod]])
    return tokens[: len(tokens) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].view(-1, SEQ_LEN + 1)


def run(variant: LocalFilterKind, seed: int) -> None:
    """Train one network and print its test loss, in nats a token."""
    torch.set_num_threads(1)
    train_windows, test_windows, vocab_size = make_windows()
    torch.manual_seed(seed)
    config = ModelConfig(
        name="ablation",
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        num_heads=NUM_HEADS,
        vocab_size=vocab_size,
        seq_len=SEQ_LEN,
        local_filter=variant,
    )
    model = Yuan(config)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, MAX_STEPS, pct_start=WARMUP_STEPS / MAX_STEPS, cycle_momentum=False
    )
    order = torch.randperm(
        len(train_windows), generator=torch.Generator().manual_seed(seed)
    )  # the same for every variant
    for step in range(MAX_STEPS):
        rows = train_windows[order[torch.arange(step * GLOBAL_BATCH_SIZE, (step + 1) * GLOBAL_BATCH_SIZE) % len(order)]]
        compute_mean_loss(model, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        losses = [
            float(compute_mean_loss(model, rows)) for rows in test_windows[:NUM_TEST_WINDOWS].split(GLOBAL_BATCH_SIZE)
        ]
    print(statistics.mean(losses))


def compute_mean_loss(model: Yuan, rows: Tensor) -> Tensor:
    x = model.embedding(rows[:, :-1])
    angles = make_causal_inputs(model.config, SEQ_LEN, x)
    for layer in model.layers:
        x = layer(x, angles)
    labels = rows[:, 1:]
    return head_loss(model.norm(x), model.embedding.weight, labels, torch.full(labels.shape, 1 / labels.numel()))


def main() -> int:
    @cache
    def loss(variant: str, seed: int) -> float:
        command = [sys.executable, __file__, variant, str(seed)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    variants = list(reversed(get_args(LocalFilterKind)))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda job: loss(job[1], job[0]), product(SEEDS, variants)))
    ok = True
    for variant in variants:
        losses = [loss(variant, seed) for seed in SEEDS]
        gains = [loss("none", seed) - loss(variant, seed) for seed in SEEDS]
        is_goal = variant == "two_convs_norm"
        entry = make_line(
            f"test loss, {variant}",
            round(statistics.mean(losses), 4),
            "nats/token",
            "basic attention",
            statistics.mean(losses) / statistics.mean([loss("none", seed) for seed in SEEDS]),
            goal="below basic attention from every seed" if is_goal else None,
            ok=min(gains) > 0 if is_goal else None,
        )
        seeds = {"seeds": [round(value, 4) for value in losses]}
        paper = (
            {"paper": PAPER_LOSSES[variant], "paper_ratio": round(PAPER_LOSSES[variant] / PAPER_LOSSES["none"], 4)}
            if variant in PAPER_LOSSES
            else {}
        )
        ok &= print_lines({**entry, **seeds, **paper})
    return 0 if ok else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kind = next(kind for kind in get_args(LocalFilterKind) if kind == sys.argv[1])
        run(kind, int(sys.argv[2]))
    else:
        sys.exit(main())
