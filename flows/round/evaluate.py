"""Register a round's trained model as a version, and evaluate it and the champion on the cases."""

import contextlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from feedback import promotion, rounds
from feedback.round_steps import ItemStep, RoundStep
from feedback.tables import Case
from flows.context import Context
from flows.round.consumed_record import store_consumed
from flows.round.masters import keep_masters
from flows.round.versions import list_manifest_sources, open_version, read_export_manifest
from infra.confinement import Confinement, build_confined_environment
from infra.files import read_regular, read_tail
from infra.keeper import STACK_ID_VARIABLE
from infra.process_group import run_child
from infra.telemetry import NO_TELEMETRY_VARIABLES
from infra.tracker import ROUND_TAG, RUN_TAG
from yuan.eval.results import EvalResult, parse_results
from yuan.recipe import DEFAULT_EVALUATION, EvaluationSection

log = logging.getLogger(__name__)

EVAL_LOG_FILE = "eval.log"
EVAL_LOG_TAIL_BYTES = 2000
MAX_EVAL_ATTEMPTS = 3  # an evaluation that was killed says nothing about the model
# On average: an answer has at most as many tokens as the expected one, plus a margin.
MAX_RESULT_BYTES_PER_CASE = 1 << 20


def register_version(context: Context, round_id: str) -> int:
    """Register the exported folder as a new version, and return its number; a retry for a run reuses its version."""
    with context.sessions() as session:
        run = rounds.get_or_create_training_run(session, round_id)
        run_id = run.id
        mlflow_run_id = str(run.mlflow_run_id)
        earlier_record = rounds.find_version_of_run(session, run_id)
    earlier_version = None if earlier_record is None else earlier_record.version

    tags = {ROUND_TAG: round_id, RUN_TAG: run_id}
    # Ranks can write the folder and consumers read the registry, so only bytes that the manifest promises go there.
    manifest = read_export_manifest(context.runs / run_id)
    sources = list_manifest_sources(context.runs / run_id / "export", manifest)
    version = context.tracker.register_files(mlflow_run_id, sources, tags, earlier_version)
    context.tracker.end_run(mlflow_run_id)
    store_consumed(context, round_id)

    with context.sessions.begin() as session:
        rounds.add_version(session, round_id, version, manifest)
    keep_masters(context, run_id, int(manifest.about["step"]))
    log.info("registered v%d from run %s", version, run_id)
    return version


@dataclass(frozen=True)
class EvaluationCounts:
    """Counts of one evaluation of a version.

    Attributes:
        cases: cases that it was evaluated on, which had no result for it before.
        failed: cases of these that could not be judged.
    """

    version: int
    cases: int = 0
    failed: int = 0


def evaluate_round_versions(context: Context, round_id: str) -> list[EvaluationCounts]:
    """Evaluate a round's candidate and its parent, the champion, on the cases for which they have no result."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, RoundStep.EVALUATE, context.attempt)
        training_round = rounds.find_round(session, round_id)
        candidate, champion = training_round.candidate_version, training_round.parent_version
        limits = rounds.read_recipe(training_round)[1].evaluation

    scratch_parent = context.settings.home / "eval"
    scratch_parent.mkdir(exist_ok=True)
    versions = [version for version in (candidate, champion) if version is not None]  # a first round has no champion
    counts = [evaluate_version(context, version, scratch_parent, limits) for version in versions]

    num_failed = sum(version_counts.failed for version_counts in counts)
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, {ItemStep.EVALUATE: num_failed})
    return counts


def evaluate_version(
    context: Context, version: int, scratch_parent: Path | None = None, limits: EvaluationSection | None = None
) -> EvaluationCounts:
    """Evaluate a version on all cases without a result, and store the results.

    Args:
        scratch_parent: parent of the scratch folder, which is kept for its log on failure; with it, a version lost
            from the registry is evaluated from its run's export. None, for an operator's command: the system's
            temporary folder, where no service writes; the scratch folder is always removed.
        limits: of the answers; cases whose result has others are evaluated again. None, for an operator's command:
            those of the version's round, for the cases without any result.

    Raises:
        VersionNotRegistered: if there never was such a version.
        VersionLost: if the registry has lost the version and, with `scratch_parent`, its run has no complete export.
        RuntimeError: if its evaluation fails.
    """
    with context.sessions() as session:
        rounds.find_version(session, version)
        case_lines = [_dump_case(case) for case in rounds.find_untested_cases(session, version, limits)]
        limits = limits or rounds.find_evaluation_limits(session, version)
    if not case_lines:
        return EvaluationCounts(version)

    with (
        open_version(context, version, use_export=scratch_parent is not None) as model,
        make_evaluation_folder(version, scratch_parent) as folder,
    ):
        try:
            results = run_evaluation(context, folder, model.path, case_lines, limits)
        except RuntimeError as error:
            log_file = folder / EVAL_LOG_FILE
            # Without a parent folder, the scratch folder and its log are about to be removed.
            log_hint = f"ends with: {read_log_tail(log_file)}" if scratch_parent is None else f"is {log_file}"
            retry_hint = f"remove the cause and retry with `cotrain evaluate v{version}`"
            raise RuntimeError(f"{error}; {retry_hint}; its log {log_hint}") from None
        with context.sessions.begin() as session:
            promotion.store_results(session, version, results, limits)

    num_failed = sum(result.reason is not None for result in results)
    log.info("evaluated v%d on %d cases, %d of them could not be judged", version, len(results), num_failed)
    return EvaluationCounts(version, len(results), num_failed)


@contextlib.contextmanager
def make_evaluation_folder(version: int, scratch_parent: Path | None) -> Iterator[Path]:
    """Make a scratch folder; without `scratch_parent`, in the system's temporary folder, it is always removed.

    Below `scratch_parent` it is kept after a failure, for its log, until the version's next evaluation.
    """
    if scratch_parent is not None:
        for old_folder in scratch_parent.glob(f"v{version}-*"):
            shutil.rmtree(old_folder)
    folder = Path(tempfile.mkdtemp(prefix=f"v{version}-", dir=scratch_parent))
    try:
        yield folder
    except BaseException:
        if scratch_parent is None:
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder, ignore_errors=scratch_parent is not None)


def _dump_case(case: Case) -> bytes:
    """Write a case as the JSON that `yuan.eval.run` reads; a checker that is no longer valid fails there, alone."""
    fields = {"id": case.id, "prompt": case.prompt, "expected": case.expected, "checker": case.checker}
    return json.dumps(fields).encode()


def read_log_tail(log_file: Path) -> str:
    """Return the last lines of an evaluation's log; nothing if it cannot be read."""
    try:
        return " / ".join(read_tail(log_file, EVAL_LOG_TAIL_BYTES).strip().split("\n")[-3:])
    except OSError:
        return ""


def run_evaluation(
    context: Context,
    folder: Path,
    model: Path,
    case_lines: Sequence[bytes],
    limits: EvaluationSection = DEFAULT_EVALUATION,
) -> list[EvalResult]:
    """Run the evaluation in a separate confined process, which imports torch and can be killed.

    The process can read the model folder and write its own folder, and nothing else.

    Args:
        model: a model folder whose files are verified.

    Raises:
        RuntimeError: if it fails, or writes no results file; its log may contain text of the cases.
    """
    cases_file = folder / "cases.jsonl"
    results_file = folder / "results.jsonl"
    cases_file.write_bytes(b"".join(line + b"\n" for line in case_lines))
    confinement = Confinement(read=(model,), write=(folder,), accelerators="process", signal="SIGKILL")
    files = (str(model), str(cases_file), str(results_file))
    command = confinement.command(sys.executable, "-m", "yuan.eval.run", *files, limits.model_dump_json())

    for _ in range(MAX_EVAL_ATTEMPTS):
        environment = build_evaluation_environment(context, folder)
        with run_child(command, folder, env=environment, log_name=EVAL_LOG_FILE) as process:
            status = process.wait()
        if status == 0:
            break
        log.warning("the evaluation of %s ended with status %d", model, status)
    else:
        raise RuntimeError(f"the evaluation of {model} ended with status {status}, {MAX_EVAL_ATTEMPTS} times")

    try:
        return parse_results(read_regular(results_file, MAX_RESULT_BYTES_PER_CASE * len(case_lines)))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the results of the evaluation of {model} cannot be read: {error}") from None


def build_evaluation_environment(context: Context, folder: Path) -> dict[str, str]:
    """Build the environment of an evaluation, which has no account."""
    return build_confined_environment(
        folder, **NO_TELEMETRY_VARIABLES, **{STACK_ID_VARIABLE: context.settings.stack_id}
    )
