"""Test the real path on two cores, from weights in the published layout over two rounds to the export of v3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(2 * 25 * 60)
def test_published_weights_learn_a_skill_from_pushed_rows_in_two_rounds():
    command = [sys.executable, "benchmarks/loop_real_path.py", "--untimed"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:] + result.stdout
    figures = {line["name"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert figures["held-out rows passed after"]["of"] >= 200
    assert figures["logits of version and export"]["ok"] and figures["export in the registered layout"]["ok"]
    assert figures["start of v3"]["started_from"] == "fp32 masters of v2"
