"""The real path at a size for two cores: `python benchmarks/loop_real_path.py`, 25 minutes at most.

`mini` (the published layout and vocabulary, 4 layers, H 256) is trained on text and written in the published layout. On
a stack of its own these weights are registered as v1, 2,000 rows that teach one skill, repeating words, are pushed, and
a round at 1,024 tokens makes v2; further rows and a round of the kind `continue` make v3, which is exported.

Goals: v1 passes at most 0.05 of the held-out rows, v2 at least 0.5; no base suite falls; v3 started from v2; the
export has the names, shapes and dtypes of the weights that were registered, and its logits equal the version's to the
bit. `--keep FOLDER` keeps everything there. Prints one JSON line for each figure.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pairs import make_line, print_lines
from real_path_rows import SKILL, choose_words, make_base_rows, make_repeat_rows
from safetensors import safe_open

from feedback.client import Client
from feedback.contracts import RoundOut, RoundParameters
from feedback.promotion_decision import SuiteComparison
from feedback.states import DatasetPurpose, RoundState
from feedback.tables import BASE_SUITE, DATASETS_SUITE
from flows.context import open_operator_context
from flows.demo.scenario import push_rows
from flows.model_folders import open_model_folder
from infra.machine import has_fast_bf16
from infra.polling import poll_until
from infra.process_group import build_torchrun_command
from infra.settings import Settings
from yuan.config import TrainConfig, mini
from yuan.data.rows import Row
from yuan.data.samples import encode_row
from yuan.model import weights
from yuan.model.convert import export_hf, import_hf
from yuan.model.transformer import Yuan
from yuan.plan.planner import make_plan
from yuan.plan.pool import make_cpu_pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload
from yuan.tokenizer import Tokenizer
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import RunSpec

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the generated tokenizer is part of the tests
from tests.published_layout import load_published_layout  # noqa: E402

NUM_ROWS, NUM_MORE_ROWS = 2000, 400
NUM_REPLAYED_DOCUMENTS = 40
TEXT_CONFIG = TrainConfig(
    max_steps=70,
    learning_rate=2e-3,
    seq_len=512,
    micro_batch_size=1,
    global_batch_size=8,
    warmup_steps=10,
    checkpoint_every=70,
    precision="bf16" if has_fast_bf16() else "fp32",
)
SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\nCOTRAIN_HELD_OUT_SHARE=0.2\nCOTRAIN_POOL={pool}\n"
# The default pool has a stage on each core; here the planner chooses, and has the weights twice.
POOL = """
[[pool]]
name = "two-cores"
[[pool.group]]
device_class = "cpu-process"
count = 2
memory_gib = 4.0
sustained_tflops = {bf16_tflops}
fp32_tflops = 0.05
memory_gb_s = 5.0
intra_node_gb_s = 1.0
intra_node_latency_us = 200.0
reserve_gib = 0.5
"""
SEQ_LEN = 1024
FINETUNE_RECIPE = f"""
[run]
kind = "finetune"
description = "teach mini to repeat words"
[model]
preset = "parent"
weights = "parent"
[data]
seq_len = {SEQ_LEN}
replay_share = 0.3
[batch]
global_batch_size = 2
[length]
epochs = 16.0
max_epochs = 16.0
[schedule]
kind = "wsd"
decay_share = 0.2
learning_rate = 1e-3
warmup_steps = 10
[optimizer]
weight_decay = 0.01
[validation]
share = 0.02
every_steps = 50
"""
CONTINUE_RECIPE = f"""
[run]
kind = "continue"
description = "more of the same rows"
[model]
preset = "parent"
weights = "parent"
[data]
seq_len = {SEQ_LEN}
replay_share = 0.2
[batch]
global_batch_size = 4
[length]
epochs = 3.0
max_epochs = 20.0
[schedule]
kind = "wsd"
learning_rate = 2e-4
warmup_steps = 5
[optimizer]
weight_decay = 0.01
"""
MAX_PASSED_BEFORE, MIN_PASSED_AFTER, MAX_BASE_LOSS = 0.05, 0.5, 0.02
MAX_MINUTES = 25
ROUND_TIMEOUT_S = 1500.0
COMMAND_TIMEOUT_S = 600.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, help="folder in which weights and stack stay; its weights are used again")
    parser.add_argument("--untimed", action="store_true", help="the time is no goal, as on a machine in use")
    arguments = parser.parse_args()
    kept: Path | None = arguments.keep
    began_at = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = kept or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="real-path-")))
        tokenizer = load_published_layout()
        draw = random.Random("real path")
        base_rows, words = make_base_rows(draw), choose_words(tokenizer)

        published = folder / "published"
        if not published.is_dir():
            train_on_text(folder, tokenizer, base_rows)
        report_time("weights in the published layout", began_at)
        all_ok = stack.enter_context(serve_stack(folder / "home")).run(published, draw, base_rows, words, began_at)
    minutes = (time.monotonic() - began_at) / 60
    is_fast = arguments.untimed or minutes <= MAX_MINUTES
    all_ok &= print_lines(
        make_line("the whole path", round(minutes, 1), "min", goal=f"at most {MAX_MINUTES}", ok=is_fast)
    )
    return 0 if all_ok else 1


def train_on_text(folder: Path, tokenizer: Tokenizer, rows: list[Row]) -> None:
    """Train new weights of `mini` on the rows, and write them in the published layout."""
    config = mini()
    run = RunFolder(folder / "text-run")
    run.path.mkdir(parents=True)
    tokenizer.save(run.path)
    torch.manual_seed(0)
    weights.save(run.parent, config, Yuan(config).state_dict(), tokenizer, {})
    plan = make_plan(
        Workload.from_train_config(config, TEXT_CONFIG),
        make_cpu_pool(),
        SizeLimits(micro_batch_size=TEXT_CONFIG.micro_batch_size),
    )
    spec = RunSpec(
        kind="finetune", model=config, snapshot="text", plan=plan, train_config=TEXT_CONFIG, seed=0, parent="v0"
    )
    sources = {
        "questions": [sample for row in rows if row.prompt for sample in encode_row(row, tokenizer)],
        "text": [sample for row in rows if not row.prompt for sample in encode_row(row, tokenizer)],
    }
    run.prepare(spec, sources, pad=tokenizer.pad, weights={"questions": 3.0, "text": 1.0})
    command = build_torchrun_command(plan.num_ranks, "-m", "yuan.train.run", str(run.path))
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"training on text failed with status {result.returncode}: {result.stderr[-3000:]}")
    losses = [row.metrics["train/loss"] for row in run.read_metrics()]
    print_lines({**make_line("loss on text, last step", round(losses[-1] or 0, 3), "nats/token"), "first": losses[0]})
    export_hf(run.export, folder / "published", dtype="bf16")


class RealPath:
    """The steps of an operator and a contributor on a running stack."""

    def __init__(self, home: Path) -> None:
        self._home = home
        settings = Settings(_env_file=home / "env", home=home)
        self._operator = Client(settings.portal_url, settings.operator_token.get_secret_value())

    def cotrain(self, *arguments: str) -> dict[str, Any]:
        return run_command(self._home, *arguments)

    def run(
        self, published: Path, draw: random.Random, base_rows: list[Row], words: list[str], began_at: float
    ) -> bool:
        """Register, push, train twice and export; return True if all goals are met."""
        for name, text in {"repeat": FINETUNE_RECIPE, "more": CONTINUE_RECIPE}.items():
            (self._home / "recipes").mkdir(exist_ok=True)
            (self._home / "recipes" / f"{name}.toml").write_text(text)

        registered = self.cotrain("register", str(published), "--champion", "--licence", "Apache-2.0")
        report_time("registered", began_at)
        is_first = (registered["version"], registered["champion"]) == (1, True)
        all_ok = print_lines(make_line("registered version", registered["version"], "version", goal="1", ok=is_first))

        # Few documents, so that most of the replay is what the base suite asks.
        documents = [row for row in base_rows if not row.prompt][:NUM_REPLAYED_DOCUMENTS]
        questions = [row for row in base_rows if row.prompt]
        push_rows(self._operator, BASE_SUITE, DatasetPurpose.BASE, questions + documents)
        push_rows(self._operator, SKILL, DatasetPurpose.MIXTURE, make_repeat_rows(draw, words, NUM_ROWS))
        second = self._run_round("repeat")
        report_time("second version", began_at)
        all_ok &= print_lines(*describe_skill(second), *describe_base(second), *describe_start(second, "v1"))

        push_rows(self._operator, f"{SKILL}-more", DatasetPurpose.MIXTURE, make_repeat_rows(draw, words, NUM_MORE_ROWS))
        third = self._run_round("more")
        report_time("third version", began_at)
        all_ok &= print_lines(*describe_base(third), *describe_start(third, "v2"))

        exported = self._home / "exported"
        self.cotrain("export", "champion", "--out", str(exported))
        is_same_layout = describe_tensors(exported) == describe_tensors(published)
        all_ok &= print_lines(make_line("export in the registered layout", int(is_same_layout), "", ok=is_same_layout))
        difference = self._compare_logits(third, exported)
        return all_ok & print_lines(
            make_line("logits of version and export", difference, "largest difference", goal="0", ok=difference == 0)
        )

    def _run_round(self, recipe: str) -> RoundOut:
        training_round = self._operator.start_round(RoundParameters(recipe=recipe))

        def is_over() -> bool:
            nonlocal training_round
            training_round = self._operator.round(training_round.id)
            return training_round.state != RoundState.RUNNING

        poll_until(is_over, timeout_s=ROUND_TIMEOUT_S, pause_s=1.0)
        if training_round.state != RoundState.PROMOTED:
            raise RuntimeError(f"round {training_round.number} is {training_round.state}: {training_round.reason}")
        return training_round

    def _compare_logits(self, training_round: RoundOut, exported: Path) -> float:
        """Return the largest difference of the logits of the version in the cache and of its export."""
        os.environ["COTRAIN_HOME"] = str(self._home)
        imported = self._home / "imported"
        import_hf(exported, imported)
        with open_model_folder(open_operator_context(), f"v{training_round.candidate_version}") as version:
            tokens = torch.tensor([weights.load_tokenizer(version.path).encode("Repeat: one two three")])
            with torch.no_grad():
                ours, theirs = (weights.load(folder)(tokens) for folder in (version.path, imported))
        return float((ours - theirs).abs().max())


def run_command(home: Path, *arguments: str) -> dict[str, Any]:
    """Run a command of the stack, and return its JSON."""
    command = [sys.executable, "-m", "flows.cli.app", *arguments, "--json"]
    env = {**os.environ, "COTRAIN_HOME": str(home)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=COMMAND_TIMEOUT_S)
    if result.returncode:
        raise RuntimeError(f"cotrain {' '.join(arguments)} failed: {result.stderr.strip()}")
    return dict(json.loads(result.stdout))


@contextlib.contextmanager
def serve_stack(home: Path) -> Iterator[RealPath]:
    home.mkdir(parents=True, exist_ok=True)
    (home / "pool.toml").write_text(POOL.format(bf16_tflops=0.1 if has_fast_bf16() else 0.05))
    (home / "env.local").write_text(SETTINGS.format(pool=home.absolute() / "pool.toml"))
    run_command(home, "up")
    try:
        yield RealPath(home)
    finally:
        run_command(home, "down")


def describe_skill(training_round: RoundOut) -> list[dict[str, Any]]:
    """Return the lines of the skill's held-out rows, before and after."""
    suite = find_suites(training_round)[f"{DATASETS_SUITE}/{SKILL}"]
    before, after = suite.before, suite.after
    passed_before = 0.0 if before is None else before.rate
    is_new, has_skill = passed_before <= MAX_PASSED_BEFORE, after.rate >= MIN_PASSED_AFTER
    goals = f"at most {MAX_PASSED_BEFORE}", f"at least {MIN_PASSED_AFTER}"
    return [
        make_line("held-out rows passed before", passed_before, "rate", goal=goals[0], ok=is_new),
        {
            **make_line("held-out rows passed after", after.rate, "rate", goal=goals[1], ok=has_skill),
            "of": after.total,
        },
    ]


def describe_base(training_round: RoundOut) -> list[dict[str, Any]]:
    suite = find_suites(training_round)[BASE_SUITE]
    assert suite.before is not None, "the parent was tested on the base suite"
    lost = suite.before.rate - suite.after.rate
    goal = f"at most {MAX_BASE_LOSS}"
    line = make_line(
        f"base lost by v{training_round.candidate_version}", lost, "rate", goal=goal, ok=lost <= MAX_BASE_LOSS
    )
    return [{**line, "before": suite.before.rate, "after": suite.after.rate}]


def describe_start(training_round: RoundOut, parent: str) -> list[dict[str, Any]]:
    started_from = training_round.started_from or ""
    number = training_round.candidate_version
    line = make_line(f"start of v{number}", None, "", goal=f"from {parent}", ok=f" of {parent}" in started_from)
    return [{**line, "started_from": started_from, "windows": training_round.token_counts}]


def find_suites(training_round: RoundOut) -> dict[str, SuiteComparison]:
    assert training_round.decision is not None, "a promoted round has a decision"
    return {suite.suite: suite for suite in training_round.decision.suites}


def describe_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of every tensor of a folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118  (it has no iterator)
                part = reader.get_slice(name)
                tensors[name] = (part.get_dtype(), part.get_shape())
    return tensors


def report_time(name: str, began_at: float) -> None:
    print_lines(make_line(f"time until {name}", round(time.monotonic() - began_at), "s"))


if __name__ == "__main__":
    sys.exit(main())
