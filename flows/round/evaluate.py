"""Register a round's trained model as a version, and evaluate it and the champion on the cases."""

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from feedback import promotion, rounds
from feedback.contracts import RepeatedVerdicts
from feedback.leases import NoCapacity
from feedback.round_steps import ItemStep, RoundStep
from feedback.tables import Case
from flows.context import Context
from flows.round.consumed_record import store_consumed
from flows.round.evaluation_devices import LeasedRunner, choose_evaluation_class
from flows.round.evaluation_process import (
    EVAL_LOG_FILE,
    EvaluationCallback,
    EvaluationFailed,
    EvaluationProcess,
    EvaluationProgress,
    ProgressMeter,
)
from flows.round.masters import keep_masters
from flows.round.versions import list_manifest_sources, open_version, read_export_manifest
from flows.supervisor.pool_launcher import load_configured_pool
from flows.supervisor.run_reporter import tolerate_outage
from infra.files import read_tail
from infra.tracker import ROUND_TAG, RUN_TAG
from yuan.eval.conditions import EvaluationConditions
from yuan.eval.results import EvalResult
from yuan.recipe import EvaluationSection

log = logging.getLogger(__name__)

# Cases of the champion that are repeated: a tenth of those that the round evaluates, since it costs as much time each.
MIN_REPEATED_CASES, MAX_REPEATED_CASES = 20, 200
REPEATED_ROWS = 17  # cases decoded together when they are repeated: another shape than that of the first time

EVAL_LOG_TAIL_BYTES = 2000


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


def evaluate_round_versions(
    context: Context, round_id: str, report: EvaluationCallback = lambda _: None
) -> list[EvaluationCounts]:
    """Evaluate a round's candidate and its parent, the champion, on the cases for which they have no result.

    Args:
        report: called about every second with the progress; may raise to give up, and what is evaluated stays stored.

    Raises:
        RoundOwnershipLost: if the round has ended, or a later attempt works on it.
        Exception: as `evaluate_version`, and any error of `report` but an outage of Prefect.
    """
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, RoundStep.EVALUATE, context.attempt)
        training_round = rounds.find_round(session, round_id)
        candidate, champion = training_round.candidate_version, training_round.parent_version
        cut_off = training_round.cut_off
        limits = rounds.read_recipe(training_round)[1].evaluation
        priority = rounds.read_parameters(training_round).priority

    def record_progress(progress: EvaluationProgress) -> None:
        with tolerate_outage("the round's record"), context.sessions.begin() as session:
            rounds.record_activity(session, round_id, progress.describe(), context.attempt)
        with tolerate_outage("Prefect"):
            report(progress)

    scratch_parent = context.settings.home / "eval"
    scratch_parent.mkdir(exist_ok=True)
    versions = [version for version in (candidate, champion) if version is not None]  # a first round has no champion
    counts = [
        evaluate_version(context, version, scratch_parent, limits, record_progress, priority=priority)
        for version in versions
    ]

    if champion is not None:
        num_evaluated = sum(version_counts.cases for version_counts in counts)
        num_repeated = min(max(num_evaluated // 10, MIN_REPEATED_CASES), MAX_REPEATED_CASES)
        repeat_verdicts(context, round_id, champion, limits, num_repeated, record_progress, priority=priority)
    with context.sessions.begin() as session:
        # Counted from the records, since an earlier attempt may have stored some of the results.
        num_failed = promotion.count_unjudged_cases(session, versions, cut_off)
        rounds.record_failed_items(session, round_id, {ItemStep.EVALUATE: num_failed})
    return counts


def evaluate_version(
    context: Context,
    version: int,
    scratch_parent: Path | None = None,
    limits: EvaluationSection | None = None,
    report: EvaluationCallback = lambda _: None,
    *,
    priority: int = 0,
) -> EvaluationCounts:
    """Evaluate a version on all cases without a result, and store each result as soon as it is there.

    It runs on devices of the configured pool, for which it waits until training or another evaluation returns theirs.

    Args:
        scratch_parent: parent of the scratch folder, which is kept for its log on failure; with it, a version lost
            from the registry is evaluated from its run's export. None, for an operator's command: the system's
            temporary folder, where no service writes; the scratch folder is always removed.
        limits: of the answers; cases whose result has others, or was computed by devices of another class, are
            evaluated again. None, for an operator's command: those of the version's round, for the cases without any
            result.
        report: called about every second with the progress; may raise to give up.
        priority: of its lease.

    Raises:
        VersionNotRegistered: if there never was such a version.
        VersionLost: if the registry has lost the version and, with `scratch_parent`, its run has no complete export.
        RuntimeError: if its evaluation fails.
    """
    with context.sessions() as session:
        rounds.find_version(session, version)
        device_class = choose_evaluation_class(load_configured_pool(context.settings))
        conditions = None if limits is None else EvaluationConditions(limits, device_class)
        case_lines = {case.id: dump_case(case) for case in rounds.find_untested_cases(session, version, conditions)}
        limits = limits or rounds.find_evaluation_limits(session, version)
        conditions = EvaluationConditions(limits, device_class)
    if not case_lines:
        return EvaluationCounts(version)

    meter, num_failed = ProgressMeter(version, len(case_lines)), 0

    def store(results: list[EvalResult]) -> None:
        nonlocal num_failed
        num_failed += sum(result.reason is not None for result in results)
        if results:
            with context.sessions.begin() as session:
                promotion.store_results(session, version, results, conditions)
        report(meter.add(results))

    runner = LeasedRunner(
        context, f"evaluation of v{version}", priority, report_waiting=lambda ahead: report(meter.add([], ahead))
    )
    with (
        open_version(context, version, use_export=scratch_parent is not None) as model,
        make_evaluation_folder(version, scratch_parent) as folder,
    ):
        try:
            EvaluationProcess(runner, folder, model.path, case_lines, limits, store).run()
        except (EvaluationFailed, NoCapacity) as error:
            log_file = folder / EVAL_LOG_FILE
            # Without a parent folder, the scratch folder and its log are about to be removed.
            log_hint = f"ends with: {read_log_tail(log_file)}" if scratch_parent is None else f"is {log_file}"
            retry_hint = f"remove the cause and retry with `cotrain evaluate v{version}`"
            raise RuntimeError(f"{error}; {retry_hint}; its log {log_hint}") from None

    log.info("evaluated v%d on %d cases, %d of them could not be judged", version, len(case_lines), num_failed)
    return EvaluationCounts(version, len(case_lines), num_failed)


def repeat_verdicts(
    context: Context,
    round_id: str,
    version: int,
    limits: EvaluationSection,
    max_cases: int,
    report: EvaluationCallback,
    *,
    priority: int,
) -> None:
    """Evaluate some cases of a version again, in another order and other batches, and record how many verdicts differ.

    What differs is the noise of all verdicts: of rounding, since it depends on the batch, and of nothing else.
    """
    device_class = choose_evaluation_class(load_configured_pool(context.settings))
    conditions = EvaluationConditions(limits, device_class)
    with context.sessions() as session:
        if rounds.find_round(session, round_id).repeated_verdicts is not None:  # by an earlier attempt
            return
        judged = rounds.find_judged_verdicts(session, version, conditions, max_cases, round_id)
    if not judged:
        return
    first_verdicts = {case.id: passed for case, passed in judged}
    meter, verdicts = ProgressMeter(version, len(judged)), dict[str, bool]()

    def store(results: list[EvalResult]) -> None:
        verdicts.update({result.case_id: result.passed for result in results if result.reason is None})
        report(meter.add(results))

    runner = LeasedRunner(
        context,
        f"repeated evaluation of v{version}",
        priority,
        report_waiting=lambda ahead: report(meter.add([], ahead)),
    )
    lines = {case.id: dump_case(case) for case, _ in judged}
    with (
        open_version(context, version, use_export=True) as model,
        make_evaluation_folder(version, context.settings.home / "eval") as folder,
    ):
        try:
            EvaluationProcess(runner, folder, model.path, lines, limits, store, max_rows=REPEATED_ROWS).run()
        except (EvaluationFailed, NoCapacity) as error:  # the verdicts that count are there
            log.warning("the verdicts on v%d could not be repeated: %s", version, error)
    if not verdicts:
        return
    num_flipped = sum(passed != first_verdicts[case_id] for case_id, passed in verdicts.items())
    repeated = RepeatedVerdicts(version=version, num_cases=len(verdicts), num_flipped=num_flipped)
    log.log(logging.WARNING if num_flipped else logging.INFO, "%s", repeated.describe())
    with context.sessions.begin() as session:
        rounds.record_repeated_verdicts(session, round_id, repeated)


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


def dump_case(case: Case) -> bytes:
    """Write a case as the JSON that `yuan.eval.run` reads; a checker that is no longer valid fails there, alone."""
    fields = {"id": case.id, "prompt": case.prompt, "expected": case.expected, "checker": case.checker}
    return json.dumps(fields).encode()


def read_log_tail(log_file: Path) -> str:
    """Return the last lines of an evaluation's log; nothing if it cannot be read."""
    try:
        return " / ".join(read_tail(log_file, EVAL_LOG_TAIL_BYTES).strip().split("\n")[-3:])
    except OSError:
        return ""
