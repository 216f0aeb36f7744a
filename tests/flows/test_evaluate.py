"""The process of an evaluation: its progress, its restarts, cases that end it, and results that it falsifies."""

import contextlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.round import evaluation_process
from flows.round.evaluation_process import (
    EVAL_LOG_FILE,
    MAX_KILLING_CASES,
    EvaluationFailed,
    EvaluationProcess,
    ProgressMeter,
)
from infra.confinement import build_confined_environment
from infra.launchers.job import Job, JobExit
from infra.launchers.local import LocalLauncher
from infra.process_group import run_child
from yuan.eval.results import EvalResult, dump_results
from yuan.recipe import DEFAULT_EVALUATION

ATTACKS = {
    "link": "os.symlink({victim!r}, results)",
    "fifo": "os.mkfifo(results)",
    "huge": "open(results, 'wb').truncate(1 << 40)",
    "folder": "os.mkdir(results)",
}
# Answers every case in its order, as the real process does, but ends before it answers certain ones.
ANSWERING_PROGRAM = """
open(os.path.join(folder, "ready"), "w").close()
with open(results, "a", buffering=1) as out:
    lines = [json.loads(line)["id"] for line in open(os.path.join(folder, "cases.jsonl"))]
    batch = rows
    for start in range(0, len(lines), batch):
        chunk = lines[start : start + batch]
        if set(chunk) & set({killing!r}):
            os._exit(9)
        for case_id in chunk:
            print(json.dumps({{"case_id": case_id, "answer": "a", "passed": True, "reason": None}}), file=out)
"""


@dataclass
class ProgramRunner:
    """Run a Python program instead of `yuan.eval.run`, with the confinement of evaluations."""

    program: Path

    @contextlib.contextmanager
    def run(self, folder, model):
        job = Job(
            name="evaluation",
            module="unused",
            folder=folder,
            num_processes=1,
            processes_per_node=1,
            environment=build_confined_environment(folder),
            log_name=EVAL_LOG_FILE,
            input_folders=(self.program.parent,),
            is_distributed=False,
        )
        command = LocalLauncher(confined=True).build_command(job)
        start = command.index("-m")
        assert command[start : start + 3] == ["-m", "unused", str(folder)]
        with run_child(
            [*command[:start], str(self.program), str(folder)], folder, env=job.environment, log_name=job.log_name
        ) as process:
            yield RunningProgram(process)


@dataclass
class RunningProgram:
    process: Any

    def wait(self, seconds):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return JobExit(status=self.process.wait(seconds))
        return None


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Return a function that evaluates cases by a Python text."""
    monkeypatch.setattr(evaluation_process, "EVAL_POLL_S", 0.05)

    def run_text(text, case_ids=("1",), store=None):
        folder, program, stored = tmp_path / "folder", tmp_path / "program" / "program.py", []
        folder.mkdir()
        program.parent.mkdir()
        program.write_text(
            "import json, os, sys\nfolder, log = sys.argv[1], 'eval.log'\n"
            "rows = json.load(open(os.path.join(folder, 'evaluation.json')))['max_rows']\n"
            f"results = os.path.join(folder, 'results.jsonl')\n{text}\n"
        )
        lines = {case_id: json.dumps({"id": case_id}).encode() for case_id in case_ids}
        collect = store or stored.extend
        EvaluationProcess(ProgramRunner(program), folder, tmp_path, lines, DEFAULT_EVALUATION, collect).run()
        return stored

    return run_text


def test_results_of_an_evaluation_are_read(evaluate):
    result = EvalResult("1", "e\ud83d\n", True)
    assert evaluate(f"open(results, 'wb').write({dump_results([result])!r})") == [result]


@pytest.mark.parametrize("line", ["{", "[]", "7", "{}", '{"case_id": "1", "answer": 7, "passed": true}', "[" * 99_999])
def test_invalid_result_line_is_rejected_without_being_quoted(evaluate, line):
    with pytest.raises(EvaluationFailed, match=r"cannot be read: line 2 is not a result$"):
        evaluate(f"open(results, 'w').write('\\n' + {line!r} + '\\n')")


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.timeout(60)
def test_results_that_are_not_a_small_regular_file_are_rejected(evaluate, tmp_path, attack):
    victim = tmp_path / "env"
    victim.write_text('{"secret": 1}')
    with pytest.raises(EvaluationFailed, match=r"results of the evaluation of .* cannot be read"):
        evaluate(ATTACKS[attack].format(victim=str(victim)))


@pytest.mark.timeout(60)
def test_next_attempt_does_not_follow_a_symlink_at_the_log_path(evaluate, tmp_path):
    victim = tmp_path / ".bashrc"
    victim.write_text("mine")
    attack = "print('evil', flush=True)\nlog = os.path.join(folder, log)\nos.unlink(log)\n"
    attack += f"os.symlink({str(victim)!r}, log)\nsys.exit(1)"
    with pytest.raises(EvaluationFailed, match="ended with status 1, 3 times without a result"):
        evaluate(attack)
    assert victim.read_text() == "mine"
    assert os.path.islink(tmp_path / "folder" / "eval.log")


def test_results_of_other_cases_are_dropped_and_the_first_of_a_case_counts(evaluate):
    results = [EvalResult("other", "", True), EvalResult("1", "first", False), EvalResult("1", "second", True)]
    first, _ = results[1:]
    lines = [dump_results(results[:2]), dump_results(results[2:])]
    program = f"import time\nfor part in {lines!r}:\n    open(results, 'ab').write(part)\n    time.sleep(0.3)"
    assert evaluate(program) == [first]


def test_process_that_ends_without_every_result_fails(evaluate):
    with pytest.raises(EvaluationFailed, match="1 of 1 cases have none"):
        evaluate("open(results, 'w').close()")


@pytest.mark.timeout(120)
def test_case_that_ends_the_process_fails_alone(evaluate):
    case_ids = [f"{number:03}" for number in range(300)]
    results = {result.case_id: result for result in evaluate(ANSWERING_PROGRAM.format(killing=["140"]), case_ids)}
    assert sorted(results) == case_ids
    assert [case_id for case_id, result in results.items() if not result.passed] == ["140"]
    assert "ended with status 9, also with this case alone" in results["140"].reason


@pytest.mark.timeout(300)
def test_evaluation_fails_if_too_many_cases_end_its_process(evaluate, monkeypatch):
    monkeypatch.setattr(evaluation_process, "MAX_KILLING_CASES", 1)
    with pytest.raises(EvaluationFailed, match="during 2 single cases"):
        evaluate(ANSWERING_PROGRAM.format(killing=["1", "2"]), ["1", "2"])
    assert MAX_KILLING_CASES > 1


def test_results_are_stored_while_the_process_runs_and_are_not_repeated_after_a_kill(evaluate, tmp_path):
    program = ANSWERING_PROGRAM.format(killing=[]) + (
        f"\nif not os.path.exists({str(tmp_path / 'folder' / 'second')!r}):\n"
        f"    open({str(tmp_path / 'folder' / 'second')!r}, 'w').close()\n    os._exit(9)\n"
    )
    # The first run answers everything and is killed: nothing is evaluated again.
    stored = evaluate(program, ["1", "2"])
    assert [result.case_id for result in stored] == ["1", "2"]


def test_error_of_the_callback_ends_the_evaluation(evaluate):
    def give_up(results):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(ANSWERING_PROGRAM.format(killing=[]) + "import time\ntime.sleep(100)", ["1"], give_up)


def test_progress_counts_results_and_estimates_the_remaining_time():
    meter = ProgressMeter(7, 4)
    results = [EvalResult("1", "", True), EvalResult("2", "", False)]
    progress = meter.add(results)
    assert (progress.num_done, progress.num_cases, progress.num_passed) == (2, 4, 1)
    assert progress.eta_s is not None and progress.eta_s >= 0
    assert progress.describe().startswith("v7: 2 of 4 cases, 50 % passed")
    waiting = meter.add([], 2)
    assert waiting.describe() == "v7: 2 of 4 cases, waits for devices, 2 leases ahead"
