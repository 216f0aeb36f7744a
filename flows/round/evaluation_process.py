"""The process that evaluates a version's cases: its progress, its restarts, and the cases that end it."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from feedback.leases import LeaseLost
from infra.files import open_regular, remove_path
from infra.launchers.job import JobExit, LauncherUnreachable, RunningJob
from yuan.config import format_count
from yuan.device_faults import DEVICE_LOST_STATUS
from yuan.eval.results import (
    CASES_FILE,
    DEVICE_FAULT_FILE,
    EVALUATION_FILE,
    READY_FILE,
    RESULTS_FILE,
    EvalResult,
    parse_results,
)
from yuan.eval.spec import EvaluationSpec
from yuan.generate.limits import MAX_BATCH_ROWS
from yuan.recipe import EvaluationSection

log = logging.getLogger(__name__)

EVAL_LOG_FILE = "eval.log"
EVAL_POLL_S = 1.0
DEVICE_RETRY_PAUSE_S = 5.0
RESULT_READ_BYTES = 16 * 2**20  # of one poll
# On average: an answer has at most as many tokens as the expected one, plus a margin.
MAX_RESULT_BYTES_PER_CASE = 1 << 20
MAX_EVAL_ATTEMPTS = 3  # in succession without a result: a process that was killed says nothing about the model
BLAMELESS_CAUSES = ("preempted", "node lost", "cancelled")  # of an end that says nothing about the cases
MAX_KILLING_CASES = 20  # cases of one evaluation that end its process


@dataclass(frozen=True)
class EvaluationProgress:
    """Progress of an evaluation.

    Attributes:
        eta_s: remaining seconds by the rate so far; None before the first result.
        num_leases_ahead: leases that come first, while it waits for devices; None once it has them.
    """

    version: int
    num_done: int
    num_cases: int
    num_passed: int
    eta_s: float | None
    num_leases_ahead: int | None = None

    def describe(self) -> str:
        """Describe it in one line.

        >>> EvaluationProgress(7, 50, 200, 40, 90.0).describe()
        'v7: 50 of 200 cases, 80 % passed, 90 s remaining'
        """
        line = f"v{self.version}: {self.num_done:,} of {self.num_cases:,} cases"
        if self.num_leases_ahead is not None:
            return f"{line}, waits for devices, {format_count(self.num_leases_ahead, 'lease')} ahead"
        if self.num_done:
            line += f", {self.num_passed / self.num_done:.0%} passed".replace("%", " %")
        return line if self.eta_s is None else f"{line}, {self.eta_s:.0f} s remaining"


EvaluationCallback = Callable[[EvaluationProgress], None]


class EvaluationFailed(RuntimeError):
    """An evaluation has ended before every case had a result."""


ResultsCallback = Callable[[list[EvalResult]], None]


class EvaluationRunner(Protocol):
    """Start the process of an evaluation; it has exited when the block ends."""

    def run(self, folder: Path, model: Path) -> AbstractContextManager[RunningJob]: ...


@dataclass
class EvaluationProcess:
    """Evaluate cases in a process that imports torch and can be killed; restart it until all have results.

    Results are passed on as the process writes them, so a restart repeats only the cases that were being decoded. When
    it ends twice without a result, each case is decoded by itself; a case during which it ends then fails with that
    reason, and the others are evaluated together again.

    Attributes:
        folder: the process can write it, and nothing else.
        model: a model folder whose files are verified; the process can read it.
        case_lines: JSON of the cases, by their ids.
        store: called about every second with the new results, possibly none.
        max_rows: cases that are decoded together.
    """

    runner: EvaluationRunner
    folder: Path
    model: Path
    case_lines: dict[str, bytes]
    limits: EvaluationSection
    store: ResultsCallback
    max_rows: int = MAX_BATCH_ROWS
    _unfinished: dict[str, bytes] = field(init=False)
    _offset: int = field(init=False, default=0)
    _num_killing: int = field(init=False, default=0)

    def run(self) -> None:
        """Evaluate every case.

        Raises:
            EvaluationFailed: if the process ends without a result again and again, or writes an invalid one; its log
                may contain text of the cases.
            Exception: any error of the runner or of `store`; the process has ended.
        """
        self._unfinished = dict(self.case_lines)
        num_fruitless = num_device_losses = 0
        while self._unfinished:
            is_single, num_before = num_fruitless >= MAX_EVAL_ATTEMPTS - 1, len(self._unfinished)
            try:
                job_exit = self._run_once(1 if is_single else self.max_rows)
            except (LeaseLost, LauncherUnreachable) as error:
                log.warning("the evaluation of %s waits: %s", self.model, error)
                self.store([])  # which may raise to give up
                time.sleep(DEVICE_RETRY_PAUSE_S)
                continue
            if job_exit.status == 0 and self._unfinished:
                raise EvaluationFailed(
                    f"the results of the evaluation of {self.model} cannot be read: {len(self._unfinished)} of "
                    f"{len(self.case_lines)} cases have none"
                )
            if job_exit.status != 0:
                parts = "".join(f", {part}" for part in (job_exit.cause, job_exit.message) if part)
                log.warning("the evaluation of %s ended with status %d%s", self.model, job_exit.status, parts)
            if job_exit.cause in BLAMELESS_CAUSES or not self._unfinished:
                continue
            if job_exit.status == DEVICE_LOST_STATUS:  # of several, so that it is not known which one
                num_device_losses = 1 if len(self._unfinished) < num_before else num_device_losses + 1
                if num_device_losses == MAX_EVAL_ATTEMPTS:
                    raise EvaluationFailed(
                        f"the evaluation of {self.model} lost a device {num_device_losses} times, "
                        f"{job_exit.message or 'which it could not name'}; check them, and take the broken one out of "
                        "use with `cotrain pool lose`"
                    )
                continue
            if is_single and (self.folder / READY_FILE).exists():
                self._fail_killing_case(job_exit.status)
                num_fruitless = 0
            elif len(self._unfinished) < num_before:
                num_fruitless = 0
            else:
                num_fruitless += 1
            if num_fruitless > MAX_EVAL_ATTEMPTS - 1:
                raise EvaluationFailed(
                    f"the evaluation of {self.model} ended with status {job_exit.status}, {num_fruitless} times "
                    "without a result"
                )

    def _run_once(self, num_rows: int) -> JobExit:
        """Run the process on the unfinished cases until it ends."""
        for name in (RESULTS_FILE, READY_FILE, CASES_FILE, EVALUATION_FILE, DEVICE_FAULT_FILE):
            remove_path(self.folder / name)
        self._offset = 0
        EvaluationSpec(model=self.model, limits=self.limits, max_rows=num_rows).write(self.folder)
        with (self.folder / CASES_FILE).open("xb") as out:
            out.writelines(line + b"\n" for line in self._unfinished.values())
        with self.runner.run(self.folder, self.model) as job:
            while True:
                job_exit = job.wait(EVAL_POLL_S)
                while self._take_results():
                    pass
                if job_exit is not None:
                    return job_exit

    def _take_results(self) -> bool:
        """Pass on the results written since the last call; return True if there may be more.

        Raises:
            EvaluationFailed: if they cannot be read.
        """
        file = self.folder / RESULTS_FILE
        try:
            with os.fdopen(open_regular(file), "rb") as stream:
                stream.seek(self._offset)
                content = stream.read(RESULT_READ_BYTES)
            complete = content[: content.rfind(b"\n") + 1]
            if self._offset + len(content) > MAX_RESULT_BYTES_PER_CASE * len(self.case_lines) or (
                len(content) == RESULT_READ_BYTES and not complete
            ):
                raise OSError(f"{file} has more than {MAX_RESULT_BYTES_PER_CASE:,} bytes for each case")
            results = parse_results(complete.decode(errors="replace"))
        except FileNotFoundError:  # the model is being loaded
            self.store([])
            return False
        except (OSError, ValueError) as error:
            raise EvaluationFailed(f"the results of the evaluation of {self.model} cannot be read: {error}") from None
        self._offset += len(complete)
        new = {result.case_id: result for result in results if result.case_id in self._unfinished}
        self.store(list(new.values()))
        for case_id in new:
            del self._unfinished[case_id]
        return len(content) == RESULT_READ_BYTES

    def _fail_killing_case(self, status: int) -> None:
        """Fail the case during which the process ended: cases are evaluated in their order.

        Raises:
            EvaluationFailed: if there were too many of them.
        """
        self._num_killing += 1
        if self._num_killing > MAX_KILLING_CASES:
            raise EvaluationFailed(
                f"the evaluation of {self.model} ended with status {status} during {self._num_killing} single cases"
            )
        case_id = next(iter(self._unfinished))
        reason = f"the process that evaluates it ended with status {status}, also with this case alone"
        self.store([EvalResult(case_id, "", passed=False, reason=reason)])
        del self._unfinished[case_id]


class ProgressMeter:
    """Count the results of an evaluation, and estimate the remaining time."""

    def __init__(self, version: int, num_cases: int) -> None:
        self._version, self._num_cases = version, num_cases
        self._num_done = self._num_passed = 0
        self._began_at = time.monotonic()

    def add(self, results: Sequence[EvalResult], num_leases_ahead: int | None = None) -> EvaluationProgress:
        """Count results, and return the progress."""
        self._num_done += len(results)
        self._num_passed += sum(result.passed for result in results)
        eta_s = None
        if self._num_done:
            eta_s = (time.monotonic() - self._began_at) * (self._num_cases - self._num_done) / self._num_done
        return EvaluationProgress(
            self._version, self._num_done, self._num_cases, self._num_passed, eta_s, num_leases_ahead
        )
