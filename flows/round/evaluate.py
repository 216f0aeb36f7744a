"""Register a round's trained model as a version, and evaluate it and the champion on the cases."""

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from feedback import promotion, rounds
from flows.context import Context
from flows.round.versions import copy_export, copy_lost_version, make_scratch_folder
from infra.confinement import Confinement, build_confined_environment, find_accelerator_files
from infra.files import read_regular, read_tail
from infra.keeper import STACK_ID_VARIABLE
from infra.mlflow_rules import READER_ACCOUNT
from infra.process_group import run_child
from infra.telemetry import NO_TELEMETRY_VARIABLES
from infra.tracker import VersionLost

log = logging.getLogger(__name__)

EVAL_LOG_FILE, EVAL_LOG_TAIL_BYTES = "eval.log", 2000
MAX_EVAL_ATTEMPTS = 3  # an evaluation that was killed says nothing about the model
# On average: an answer has at most as many tokens as the expected one, plus a margin.
MAX_RESULT_BYTES_PER_CASE = 1 << 20


def register_version(context: Context, round_id: str) -> int:
    """Register the exported folder as a new version, and return its number; a retry for a run reuses its version."""
    with context.sessions() as session:
        run = rounds.get_or_create_training_run(session, round_id)
        run_id, mlflow_run = run.id, str(run.mlflow_run_id)
        known = rounds.find_version_of_run(session, run_id)
    tags = {"cotrain.round": round_id, "cotrain.run": run_id}
    # Ranks can write the folder and consumers read the registry, so only verified copies of manifest files go there.
    with make_scratch_folder(context.runs / f".register-{run_id}") as scratch:
        manifest = copy_export(context.runs / run_id, scratch)
        version = context.tracker.register_version(mlflow_run, scratch, tags, known.version if known else None)
    context.tracker.end_run(mlflow_run)
    with context.sessions.begin() as session:
        rounds.add_version(session, round_id, version, manifest)
    log.info("registered v%d from run %s", version, run_id)
    return version


def evaluate(context: Context, round_id: str) -> list[dict[str, int]]:
    """Evaluate candidate and champion on cases without a result; return the numbers of cases and failures of each."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "evaluate", context.attempt)
        training_round = rounds.find_round(session, round_id)
        versions = [v for v in (training_round.candidate_version, training_round.parent_version) if v is not None]
    place = context.settings.home / "eval"
    place.mkdir(exist_ok=True)
    counts = [{"version": version, **evaluate_version(context, version, place)} for version in versions]
    num_failed = sum(version_counts["failed"] for version_counts in counts)
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, {"evaluate": num_failed})
    return counts


def evaluate_version(context: Context, version: int, place: Path | None = None) -> dict[str, int]:
    """Evaluate a version on all cases without a result; return the numbers of `cases` and of those `failed` to judge.

    Args:
        place: parent of the scratch folder, which is kept for its log on failure; with it, a version lost from the
            registry is evaluated from its run's export. None, for an operator's command: the system's temporary
            folder, where no service writes; the scratch folder is always removed.

    Raises:
        NeverRegistered: if there never was such a version.
        VersionLost: if the version is lost from the registry and, with `place`, its run has no complete export.
        RuntimeError: if its evaluation fails.
    """
    with context.sessions() as session:
        rounds.find_version(session, version)
        cases = [
            {"id": case.id, "prompt": case.prompt, "expected": case.expected, "checker": case.checker}
            for case in rounds.find_untested_cases(session, version)
        ]
    if not cases:
        return {"cases": 0, "failed": 0}
    is_lost = False
    try:
        context.tracker.require_version(version)
    except VersionLost:
        if place is None:
            raise
        is_lost = True
    for old_folder in place.glob(f"v{version}-*") if place else ():
        shutil.rmtree(old_folder)  # kept for the log of a failed evaluation
    folder = Path(tempfile.mkdtemp(prefix=f"v{version}-", dir=place))
    try:
        model = str(copy_lost_version(context, version, folder)) if is_lost else f"v{version}"
        results = _run_evaluation(context, folder, model, cases)
    except RuntimeError as error:
        where = (
            f"ends with: {_read_log_tail(folder / EVAL_LOG_FILE)}" if place is None else f"is {folder / EVAL_LOG_FILE}"
        )
        raise RuntimeError(f"{error}; its log {where}") from None
    finally:
        if place is None:
            shutil.rmtree(folder)
    with context.sessions.begin() as session:
        promotion.store_results(session, version, results)
    shutil.rmtree(folder, ignore_errors=True)
    failed = sum(result["reason"] is not None for result in results)
    log.info("evaluated v%d on %d cases, %d of them could not be judged", version, len(results), failed)
    return {"cases": len(results), "failed": failed}


def _read_log_tail(log_file: Path) -> str:
    """Return the last lines of an evaluation's log; nothing if it cannot be read."""
    try:
        return " / ".join(read_tail(log_file, EVAL_LOG_TAIL_BYTES).strip().split("\n")[-3:])
    except OSError:
        return ""


def _run_evaluation(context: Context, folder: Path, model: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the evaluation in a separate confined process, which imports torch and can be killed.

    `model` is a version such as v7, which the process fetches with the read-only account, or a model folder; the
    process can access only that and its own folder.

    Raises:
        RuntimeError: if it fails, or writes no results file; its log may contain text of the cases.
    """
    cases_file, results_file = folder / "cases.jsonl", folder / "results.jsonl"
    log_file = folder / EVAL_LOG_FILE
    cases_file.write_bytes(b"".join(json.dumps(case).encode() + b"\n" for case in cases))
    confinement = Confinement(read=(Path(model),), write=(folder, *find_accelerator_files()), signal="SIGKILL")
    command = confinement.command(
        sys.executable, "-m", "yuan.eval.run", model, str(folder / "model"), str(cases_file), str(results_file)
    )
    for _ in range(MAX_EVAL_ATTEMPTS):
        with run_child(
            command, folder, env=_build_evaluation_environment(context, folder), log_name=log_file.name
        ) as process:
            status = process.wait()
        if status == 0:
            break
        log.warning("an evaluation ended with status %d", status)
    else:
        raise RuntimeError(f"evaluation ended with status {status}")
    try:
        text = read_regular(results_file, MAX_RESULT_BYTES_PER_CASE * len(cases))
    except OSError as error:
        raise RuntimeError(f"the results of an evaluation cannot be read: {error}") from None
    return [json.loads(line) for line in text.split("\n") if line]


def _build_evaluation_environment(context: Context, folder: Path) -> dict[str, str]:
    """Build the environment of an evaluation: the tracker's URL and its read-only account."""
    settings = context.settings
    return build_confined_environment(
        folder,
        **NO_TELEMETRY_VARIABLES,
        **{STACK_ID_VARIABLE: settings.stack_id},
        COTRAIN_MLFLOW_URL=settings.mlflow_url,
        COTRAIN_MLFLOW_USERNAME=READER_ACCOUNT,
        COTRAIN_MLFLOW_PASSWORD=settings.mlflow_reader_password.get_secret_value(),
    )
