"""Block-wise loss with a fused head, forward and backward, compared with peers: `python benchmarks/yuan_loss.py`.

Goals: at most 1.15 times the time of each peer, at most 220 MiB above the start, and no peer both faster and smaller.

V 135,040, 768 tokens, H 256, fp32, one thread. Each implementation runs in its own process; times are interleaved pairs
with ours.
"""

import contextlib
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

import torch
from pairs import (
    Peer,
    make_at_most_line,
    make_line,
    measure_peak_memory_mib,
    measure_ratios,
    print_lines,
    serve_measurements,
)
from torch import Tensor
from torch.nn import functional as F

VOCAB_SIZE = 135_040
NUM_TOKENS = 768
HIDDEN_SIZE = 256
CHUNK_TOKENS = 64
PEERS = ("plain", "torch linear_cross_entropy", "cut-cross-entropy torch_compile")
MAX_TIME_RATIO = 1.15
MAX_MEMORY_MIB = 220

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_loss(name: str) -> Loss:
    """Return the named loss function of hidden states (N, H), head (V, H) and labels (N)."""
    if name == "ours":
        from yuan.model.loss import head_loss

        weights = torch.full((NUM_TOKENS,), 1 / NUM_TOKENS)
        return lambda x, head, labels: head_loss(x, head, labels, weights)
    if name == "plain":
        return lambda x, head, labels: F.cross_entropy(x @ head.T, labels)
    if name == "torch linear_cross_entropy":
        chunks = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=CHUNK_TOKENS, chunking_method=None, acc_policy="compact"
        )
        return lambda x, head, labels: F.linear_cross_entropy(x, head, labels, options=chunks)
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, head, labels: linear_cross_entropy(x, head, labels, impl="torch_compile")


def run(name: str) -> None:
    """Serve the measurements of one loss: seconds of a step, and its peak memory increase in MiB."""
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=random).requires_grad_()
    head = (0.05 * torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=random)).requires_grad_()
    labels = torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,), generator=random)
    loss_of = make_loss(name)

    def step() -> None:
        loss_of(x, head, labels).backward()

    def measure() -> dict[str, float]:
        x.grad = head.grad = None
        gc.collect()
        began = time.perf_counter()
        mib = measure_peak_memory_mib(step)
        return {"seconds": time.perf_counter() - began, "mib": mib}

    with contextlib.redirect_stdout(sys.stderr):
        step()
    serve_measurements(measure)


def main() -> int:
    ours = Peer(__file__, "ours")
    ok, times = True, {}
    for name in PEERS:
        if name.startswith("cut") and importlib.util.find_spec("cut_cross_entropy") is None:
            print_lines(
                {**make_line(f"loss time against {name}", None, "s", name), "skipped": "needs the extra [bench]"}
            )
            continue
        peer = Peer(__file__, name)
        seconds: dict[str, list[float]] = {"ours": [], name: []}
        mib: dict[str, list[float]] = {"ours": [], name: []}

        def time_step(process: Peer, label: str) -> float:
            figures = process.measure()
            seconds[label].append(figures["seconds"])  # noqa: B023
            mib[label].append(figures["mib"])  # noqa: B023
            return figures["seconds"]

        pair_ratios = measure_ratios(lambda: time_step(ours, "ours"), lambda: time_step(peer, name))  # noqa: B023
        times[name] = statistics.median(seconds[name])
        our_mib, peer_mib = statistics.median(mib["ours"]), statistics.median(mib[name])
        figure = round(statistics.median(seconds["ours"]), 3)
        ok &= print_lines(
            make_at_most_line(
                f"loss time against {name}", pair_ratios, MAX_TIME_RATIO, figure=figure, unit="s", peer=name
            ),
            make_line(
                f"loss memory beside {name}",
                round(our_mib),
                "MiB",
                name,
                our_mib / peer_mib,
                None,
                f"at most {MAX_MEMORY_MIB} MiB",
                our_mib <= MAX_MEMORY_MIB,
            ),
            make_line(
                f"{name} is not both faster and leaner",
                round(peer_mib),
                "MiB",
                name,
                ok=not (statistics.median(pair_ratios) > 1 and peer_mib < our_mib),
            ),
        )
        peer.close()
    ours.close()
    return 0 if ok else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        sys.exit(main())
