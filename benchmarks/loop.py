"""End-to-end goals of the feedback loop: `python benchmarks/loop.py [SEED ...]`, four minutes for each seed.

Runs the demo for each seed. Goals: the reported skills rise from at most 0.2 to at least 0.8 while the base suite loses
at most 0.02; every report gets one verdict and one notice; the stack is up within 20 s and a demo takes at most 360 s.
Prints one JSON line for each figure: name, figure, unit, goal, ok. Rates are fractions.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)


def main(seeds: list[int]) -> int:
    all_ok = True
    for seed in seeds:
        for entry in measure(seed):
            all_ok &= entry["ok"]
            print(json.dumps({**entry, "seed": seed}), flush=True)
    return 0 if all_ok else 1


def measure(seed: int) -> Iterator[dict[str, Any]]:
    """Run one demo and compare its figures with the goals."""
    command = [sys.executable, "-m", "flows.cli.app", "demo", "--seed", str(seed), "--json", "--down"]
    demo = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if demo.returncode != 0:
        yield {"name": "demo", "figure": demo.returncode, "unit": "exit status", "goal": "0", "ok": False}
        return
    result = json.loads(demo.stdout)
    for suite in result["suites"]:
        if suite["suite"].startswith("fresh/"):
            before, after = suite["before"]["rate"], suite["after"]["rate"]
            yield make_line(f"{suite['suite']} before", before, "rate", "at most 0.2", before <= 0.2)
            yield make_line(f"{suite['suite']} after", after, "rate", "at least 0.8", after >= 0.8)
    lost = result["base_before"] - result["base_after"]
    yield make_line("base lost", round(lost, 4), "rate", "at most 0.02", lost <= 0.02)
    yield make_line("reports", result["reports"], "reports", "at least 100", result["reports"] >= 100)
    is_one_each = result["notices"] == result["reports"] == result["fixed"] + result["still_failing"]
    yield make_line("one verdict and one notice each", result["notices"], "notices", "as many as reports", is_one_each)
    yield make_line("stack up", result["parts"]["stack up"], "s", "at most 20", result["parts"]["stack up"] <= 20)
    yield make_line("demo", result["seconds"], "s", "at most 360", result["seconds"] <= 360)
    overhead_s = result["round_overhead_s"]
    yield make_line("round less training and evaluation", overhead_s, "s", "at most 30", overhead_s <= 30)


def make_line(name: str, figure: float, unit: str, goal: str, ok: bool) -> dict[str, Any]:
    return {"name": name, "figure": figure, "unit": unit, "goal": goal, "ok": ok}


if __name__ == "__main__":
    sys.exit(main([int(seed) for seed in sys.argv[1:]] or list(SEEDS)))
