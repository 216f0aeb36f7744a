"""Test the reading of results and logs that a compromised evaluation process may have written."""

import os
from types import SimpleNamespace

import pytest

from flows.round import evaluate as evaluation
from yuan.eval.results import EvalResult, dump_results

CASE_LINES = [b'{"id": "1", "prompt": "p", "expected": "e", "checker": {"type": "exact"}}']
ATTACKS = {
    "link": "os.symlink({victim!r}, results)",
    "fifo": "os.mkfifo(results)",
    "huge": "open(results, 'wb').truncate(1 << 40)",
    "folder": "os.mkdir(results)",
}


@pytest.fixture
def context():
    return SimpleNamespace(settings=SimpleNamespace(stack_id="s"))


@pytest.fixture
def evaluate(context, tmp_path, monkeypatch):
    """Return a function that runs a Python text instead of `yuan.eval.run`, with the confinement of evaluations."""

    def run_text(text):
        folder = tmp_path / "folder"
        folder.mkdir()
        (tmp_path / "program.py").write_text(f"import os, sys\nresults, log = sys.argv[3], 'eval.log'\n{text}\n")
        command = evaluation.Confinement.command

        def run_program_instead(self, program, *arguments):
            assert arguments[:2] == ("-m", "yuan.eval.run")
            readable = evaluation.Confinement(read=(*self.read, tmp_path / "program.py"), write=self.write)
            return command(readable, program, str(tmp_path / "program.py"), *arguments[2:])

        monkeypatch.setattr(evaluation.Confinement, "command", run_program_instead)
        return evaluation.run_evaluation(context, folder, tmp_path / "model", CASE_LINES)

    return run_text


def test_results_of_an_evaluation_are_read(evaluate):
    result = EvalResult("1", "e\ud83d\n", True)
    assert evaluate(f"open(results, 'wb').write({dump_results([result])!r})") == [result]


@pytest.mark.parametrize("line", ["{", "[]", "7", "{}", '{"case_id": "1", "answer": 7, "passed": true}', "[" * 99_999])
def test_invalid_result_line_is_rejected_without_being_quoted(evaluate, line):
    with pytest.raises(RuntimeError, match=r"cannot be read: line 2 is not a result$"):
        evaluate(f"open(results, 'w').write('\\n' + {line!r})")


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.timeout(60)
def test_results_that_are_not_a_small_regular_file_are_rejected(evaluate, tmp_path, attack):
    victim = tmp_path / "env"
    victim.write_text('{"secret": 1}')
    with pytest.raises(RuntimeError, match=r"results of the evaluation of .* cannot be read"):
        evaluate(ATTACKS[attack].format(victim=str(victim)))


@pytest.mark.timeout(60)
def test_next_attempt_does_not_follow_a_symlink_at_the_log_path(evaluate, tmp_path):
    victim = tmp_path / ".bashrc"
    victim.write_text("mine")
    attack = "print('evil', flush=True)\nlog = os.path.join(os.path.dirname(results), log)\nos.unlink(log)\n"
    attack += f"os.symlink({str(victim)!r}, log)\nsys.exit(1)"
    with pytest.raises(RuntimeError, match="ended with status 1"):
        evaluate(attack)
    assert victim.read_text() == "mine"
    assert os.path.islink(tmp_path / "folder" / "eval.log")
