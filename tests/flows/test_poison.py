"""Send hostile items among honest ones through the real stack."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "faults_poison.py"


def test_hostile_items_do_not_affect_honest_items():
    command = [sys.executable, str(BENCHMARK), "--honest", "60", "--hostile", "50"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    lines = [json.loads(line) for line in result.stdout.split("\n") if line]
    assert lines and [line for line in lines if line["ok"] is False] == [], result.stderr[-4000:]
