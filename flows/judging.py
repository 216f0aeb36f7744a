"""Last part of a round: evaluate, decide, promote, tell."""

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from feedback import gate, promotion, rounds
from flows.context import Context, Records
from infra.confinement import Confinement, accelerator_files, built_environment
from infra.files import read_regular
from infra.launch import supervised
from infra.mlflow_rules import READER
from infra.services import MARK
from infra.settings import NO_TELEMETRY

log = logging.getLogger(__name__)

EVAL_ATTEMPTS = 3  # one that was killed is no verdict on the model
MAX_RESULT_BYTES = 1 << 20  # of a case, on average: an answer has at most as many tokens as the expected one, and some


def evaluate(context: Context, round_id: str) -> list[dict[str, int]]:
    """Let candidate and champion take the cases they have not taken: how many each took and could not be judged on."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "evaluate", context.attempt)
        turn = rounds.find_round(session, round_id)
        versions = [v for v in (turn.candidate_version, turn.parent_version) if v is not None]
    place = context.settings.home / "eval"
    place.mkdir(exist_ok=True)
    taken = [{"version": version, **evaluate_version(context, version, place)} for version in versions]
    with context.sessions.begin() as session:
        rounds.count_failed(session, round_id, {"evaluate": sum(one["failed"] for one in taken)})
    return taken


def evaluate_version(context: Context, version: int, place: Path | None = None) -> dict[str, int]:
    """Let a version take every case it has not taken yet: `cases` it took, `failed` those without a judgement.

    Args:
        place: where a scratch folder is made; None: the system's folder for these, where no service writes.
    """
    with context.sessions() as session:
        cases = [
            {"id": case.id, "prompt": case.prompt, "expected": case.expected, "checker": case.checker}
            for case in rounds.untested(session, version)
        ]
    if not cases:
        return {"cases": 0, "failed": 0}
    for left in place.glob(f"v{version}-*") if place else ():
        shutil.rmtree(left)  # of an evaluation that failed, kept for its log
    folder = Path(tempfile.mkdtemp(prefix=f"v{version}-", dir=place))
    results = _answer(context, folder, f"v{version}", cases)
    with context.sessions.begin() as session:
        promotion.store_results(session, version, results)
    shutil.rmtree(folder)
    failed = sum(result["reason"] is not None for result in results)
    log.info("v%d took %d cases, of which %d could not be judged", version, len(results), failed)
    return {"cases": len(results), "failed": failed}


def _answer(context: Context, folder: Path, model: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the evaluation in a process of its own, which has torch and can be killed.

    It fetches a version, such as v7, by itself with the account that only reads, or takes a model folder; it reaches
    nothing but that and its own folder.

    Raises:
        RuntimeError: if it fails, or leaves no file of results; the message names its log, which may hold text of the
            cases.
    """
    asked, answered = folder / "cases.jsonl", folder / "results.jsonl"
    log_file = folder / "eval.log"
    asked.write_bytes(b"".join(json.dumps(case).encode() + b"\n" for case in cases))
    confinement = Confinement(read=(Path(model),), write=(folder, *accelerator_files()), signal="SIGKILL")
    command = confinement.command(
        sys.executable, "-m", "yuan.eval.run", model, str(folder / "model"), str(asked), str(answered)
    )
    for _ in range(EVAL_ATTEMPTS):
        with supervised(command, folder, _evaluation_environment(context, folder), log_file.name) as process:
            status = process.wait()
        if status == 0:
            break
        log.warning("an evaluation ended with status %d", status)
    else:
        raise RuntimeError(f"evaluation ended with status {status}; its log is {log_file}")
    try:
        text = read_regular(answered, MAX_RESULT_BYTES * len(cases))
    except OSError as error:
        raise RuntimeError(f"the results of an evaluation cannot be read: {error}; its log is {log_file}") from None
    return [json.loads(line) for line in text.split("\n") if line]


def _evaluation_environment(context: Context, folder: Path) -> dict[str, str]:
    """Build what an evaluation needs: the address of the tracker and the account that only reads."""
    settings = context.settings
    return built_environment(
        folder,
        **NO_TELEMETRY,
        **{MARK: settings.stack_id},
        COTRAIN_MLFLOW_URL=settings.mlflow_url,
        COTRAIN_MLFLOW_USERNAME=READER,
        COTRAIN_MLFLOW_PASSWORD=settings.mlflow_reader_password.get_secret_value(),
    )


def decide(context: Context, round_id: str) -> dict[str, Any]:
    """Judge the candidate; promotion, verdicts, notices and the round's end are one transaction."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "decide", context.attempt)
        turn = rounds.find_round(session, round_id)
        decision = gate.decide(session, turn)
        if decision["promote"]:
            untold = promotion.promote(session, turn, decision)
            rounds.count_failed(session, round_id, {"tell": untold})
            rounds.finish(session, round_id, "promoted", f"v{decision['candidate']} is the champion")
        else:
            turn.decision = decision
            rounds.finish(session, round_id, "rejected", "; ".join(decision["reasons"]))
        rounds.notify(session)
    log.info("decided: promote=%s %s", decision["promote"], decision["reasons"])
    return decision


def tell(context: Records) -> int:
    """Bring notices to their reporters and the registry's aliases to the champion. Any process may, at any time."""
    with context.sessions.begin() as session:
        delivered = promotion.deliver(session)
    with context.sessions.begin() as session:  # the registry may not answer; what is delivered stays so
        changed = promotion.reconcile_aliases(session, context.tracker.aliases(), context.tracker.set_alias)
    if delivered or changed:
        log.info("delivered %d notices, set aliases %s", delivered, changed)
    return delivered
