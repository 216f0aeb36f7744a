"""Middle of a round: lay out the run folder, supervise the ranks, track them, register the result."""

import dataclasses
import json
import logging
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from feedback import datasets, rounds
from flows.context import Context
from infra.devices import has_fast_bf16, has_room
from infra.launch import supervised, torchrun_command
from infra.settings import child_environment
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig, Recipe, tiny
from yuan.data.rows import Row, parse_rows
from yuan.data.samples import Sample, encode_row
from yuan.plan.job import Work
from yuan.plan.planner import draw_plan, make_plan
from yuan.plan.pool import cpu_pool
from yuan.plan.record import Plan
from yuan.plan.search import Limits
from yuan.train.folder import RunFolder, RunSpec

log = logging.getLogger(__name__)

SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH = 128, 2, 8
VOCAB_LIMIT, VOCAB_MULTIPLE = 1024, 64
MAX_RESTARTS = 5
REPORT_EVERY_S = 2.0
PICTURE = "plan.svg"

Progress = Callable[[dict[str, Any]], None]


def lay_out(context: Context, round_id: str) -> Plan:
    """Write the run folder: tokenizer, packed windows, parent weights, plan, run.json. Done once."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "plan", context.attempt)
        turn = rounds.find_round(session, round_id)
        run_id = rounds.training_run(session, round_id).id
        snapshot_id, parent, parameters = str(turn.snapshot_id), turn.parent_version, turn.parameters
        parts = datasets.parts_of(session, snapshot_id)
    folder = RunFolder(context.runs / run_id)
    if (folder.path / "run.json").exists():
        return folder.spec().plan
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)
    rows = [
        row for row in parse_rows(context.objects.get(f"{datasets.SNAPSHOTS}/{snapshot_id}")) if isinstance(row, Row)
    ]
    model, tokenizer = _model(context, folder, parent, rows)
    tokenizer.save(folder.path)
    recipe = _recipe(parameters)
    pool = cpu_pool()
    limits = Limits(pipeline_size=pool.num_devices, micro_batch_size=recipe.micro_batch_size)
    plan = make_plan(Work.of(model, recipe), pool, limits)
    with context.sessions.begin() as session:
        plan = Plan.from_json(rounds.keep_plan(session, round_id, plan.to_json()))
    spec = RunSpec(
        kind="pretrain" if parent is None else "finetune",
        model=model,
        snapshot=snapshot_id,
        plan=plan,
        recipe=recipe,
        seed=int(parameters["seed"]),
        parent=None if parent is None else f"v{parent}",
    )
    picture = draw_plan(Work.of(model, recipe), pool, plan)
    (folder.path / PICTURE).write_text(picture)
    context.objects.put(rounds.picture_key(run_id), picture.encode())
    folder.write(spec, _sources(rows, parts, tokenizer, spec.seed), pad=tokenizer.pad)
    log.info("laid out run %s: %d rows, stages %s", run_id, len(rows), plan.bounds)
    return plan


def _sources(
    rows: list[Row], parts: dict[str, int], tokenizer: tokenizers.Tokenizer, seed: int
) -> dict[str, Iterator[Sample]]:
    """The mixture's parts, as they follow each other in the snapshot, each packed in an order of its own."""
    sources: dict[str, Iterator[Sample]] = {}
    start = 0
    for name, count in parts.items():
        own = rows[start : start + count]
        start += count
        random.Random(f"{seed} {name}").shuffle(own)
        if own:
            sources[name] = (encode_row(row, tokenizer) for row in own)
    return sources


def _model(
    context: Context, folder: RunFolder, parent: int | None, rows: list[Row]
) -> tuple[ModelConfig, tokenizers.Tokenizer]:
    """The parent's shape and tokenizer, or the tiny preset with a tokenizer trained on these rows."""
    if parent is not None:
        made = context.tracker.download(parent, folder.path / ".download")
        made.rename(folder.parent)
        shutil.rmtree(folder.path / ".download")
        config = ModelConfig.from_json(json.loads((folder.parent / "config.json").read_text()))
        return config, tokenizers.load(folder.parent)
    tokenizer = tokenizers.train((f"{row.prompt}\n{row.answer}" for row in rows), vocab_size=VOCAB_LIMIT)
    padded = -(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return tiny(padded), tokenizer


def _recipe(parameters: dict[str, Any]) -> Recipe:
    steps = int(parameters["max_steps"])
    return Recipe(
        max_steps=steps,
        learning_rate=float(parameters["learning_rate"]),
        seq_len=SEQ_LEN,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=GLOBAL_BATCH,
        warmup_steps=min(20, steps - 1),
        precision="bf16" if has_fast_bf16() else "fp32",
        checkpoint_every=200,
    )


def train(context: Context, round_id: str, progress: Progress) -> None:
    """Run the ranks until the run has exported its weights; start them again when they die.

    Raises:
        RoundEnded: if the round was ended meanwhile; the ranks are gone.
        RuntimeError: if the ranks died too often; the message holds the end of their log.
    """
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "train", context.attempt)
        run = rounds.training_run(session, round_id)
        run_id, number = run.id, rounds.find_round(session, round_id).number
    folder = RunFolder(context.runs / run_id)
    mlflow_run = _tracked(context, folder, run_id, number)
    with context.sessions.begin() as session:
        rounds.training_run(session, round_id).mlflow_run_id = mlflow_run
    reporter = _Reporter(context, round_id, folder, mlflow_run, progress)
    for restart in range(MAX_RESTARTS + 1):
        if (folder.export / "manifest.json").exists():
            break
        status = _run_ranks(context, folder, reporter)
        if status != 0:
            log.warning("the ranks of run %s ended with status %d", run_id, status)
            if not has_room(folder.path):  # the dispatcher starts the next attempt when there is some
                raise OSError(f"the disk of {folder.path} is full; make room, and the run goes on from its checkpoint")
            event = {"event": "ranks ended", "status": status, "restart": restart, "time": time.time()}
            folder.append("events.jsonl", event)
    else:
        raise RuntimeError(f"the ranks of run {run_id} died {MAX_RESTARTS + 1} times: {_log_end(folder)}")
    reporter.report()
    if (folder.path / "events.jsonl").exists():
        context.tracker.log_artifact(mlflow_run, folder.path / "events.jsonl")


def _run_ranks(context: Context, folder: RunFolder, reporter: "_Reporter") -> int:
    plan = folder.spec().plan
    command = torchrun_command("yuan.train.run", folder.path, plan.pipeline_size * plan.data_size)
    env = {**child_environment(context.settings), "OMP_NUM_THREADS": "1"}
    with supervised(command, folder.path, env, "train.log") as process:
        while True:
            try:
                return process.wait(REPORT_EVERY_S)
            except subprocess.TimeoutExpired:
                reporter.report()


def _tracked(context: Context, folder: RunFolder, run_id: str, number: int) -> str:
    """The tracker's run, with plan, snapshot id and configuration as its artifacts."""
    spec = folder.spec()
    mlflow_run = context.tracker.start_run(f"round-{number}-{run_id[:8]}", {"cotrain.run": run_id})
    parameters = {
        **dataclasses.asdict(spec.recipe),
        "snapshot": spec.snapshot,
        "parent": spec.parent,
        "kind": spec.kind,
    }
    context.tracker.log(mlflow_run, [], parameters)
    (folder.path / "plan.json").write_text(json.dumps(spec.plan.to_json(), indent=2))
    for name in ("run.json", "plan.json", PICTURE):
        context.tracker.log_artifact(mlflow_run, folder.path / name)
    return mlflow_run


class _Reporter:
    """Carries a run's status to the round and its metrics to the tracker; raises when the round has ended."""

    def __init__(self, context: Context, round_id: str, folder: RunFolder, mlflow_run: str, progress: Progress) -> None:
        self._context, self._round_id, self._folder = context, round_id, folder
        self._mlflow_run, self._progress = mlflow_run, progress
        self._sent_step = -1

    def report(self) -> None:
        status = self._folder.status()
        with self._context.sessions.begin() as session:
            rounds.training_run(session, self._round_id).status = status or None
            rounds.check_attempt(rounds.find_round(session, self._round_id), self._context.attempt)
        if status:
            self._progress(status)
        rows = self._folder.metrics(after_step=self._sent_step)
        if rows:
            self._context.tracker.log(self._mlflow_run, rows)
            self._sent_step = rows[-1]["step"]


def _log_end(folder: RunFolder) -> str:
    try:
        return (folder.path / "train.log").read_text(errors="replace")[-800:]
    except FileNotFoundError:
        return "no log"


def register(context: Context, round_id: str) -> int:
    """Register the exported folder as a new version; the same run keeps its version."""
    with context.sessions() as session:
        run = rounds.training_run(session, round_id)
        run_id, mlflow_run = run.id, str(run.mlflow_run_id)
    export: Path = context.runs / run_id / "export"
    manifest = json.loads((export / "manifest.json").read_text())
    version = context.tracker.register(mlflow_run, export, {"cotrain.round": round_id, "cotrain.run": run_id})
    context.tracker.end_run(mlflow_run)
    with context.sessions.begin() as session:
        rounds.add_version(session, round_id, version, manifest)
    log.info("registered v%d from run %s", version, run_id)
    return version
