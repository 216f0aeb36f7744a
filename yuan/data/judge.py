"""Run checkers in a child process that can be killed: `with AnswerJudge() as judge: judge.check(checker, answer)`.

A checker's rule is untrusted input. One that raises, never returns or exhausts memory fails its own check only; the
calling process is not affected.
"""

import json
import os
import resource
import select
import subprocess
import sys
import time
from types import TracebackType

from pydantic import TypeAdapter

from yuan.data.checkers import Checker

CHECK_TIMEOUT_S = 5.0  # for one check
JUDGE_START_TIMEOUT_S = 60.0  # for the process to start, also on a heavily loaded machine
JUDGE_MEMORY_BYTES = 1 << 30
_CHECKER_ADAPTER: TypeAdapter[Checker] = TypeAdapter(Checker)


class CheckFailed(ValueError):
    """Report that a checker gave no verdict; the message has the reason."""


class AnswerJudge:
    """Check answers one at a time in a child process, started at the first check and restarted after a kill."""

    def __init__(self, limit_s: float = CHECK_TIMEOUT_S) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Return the pid of the process that judges; None before the first check and after a kill."""
        return self._process.pid if self._process else None

    def __enter__(self) -> "AnswerJudge":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill_process()

    def check(self, checker: Checker, answer: str) -> bool:
        """Return true if the checker accepts the answer.

        Raises:
            CheckFailed: if the checker raises, exceeds 1 GiB, or has no verdict within the limit.
        """
        process = self._process or self._start_process()
        end = time.monotonic() + self._limit_s
        try:
            _send(process, {"checker": checker.model_dump(mode="json"), "answer": answer}, end)
            response = _receive(process, end)
        except TimeoutError:
            self._kill_process()
            raise CheckFailed(f"the checker gave no verdict within {self._limit_s:g} s; simplify its rule") from None
        except (BrokenPipeError, EOFError):
            self._kill_process()
            raise CheckFailed("the checker ended the process that ran it; simplify its rule") from None
        if "passed" not in response:
            raise CheckFailed(f"the checker raised {response['raised']}; correct its rule")
        return bool(response["passed"])

    def _start_process(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "yuan.data.judge"]
        self._process = subprocess.Popen(
            command,
            env={"LC_ALL": "C.UTF-8"},  # none of the caller's credentials
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None, "opened with a pipe"
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            _receive(self._process, time.monotonic() + JUDGE_START_TIMEOUT_S)
        except (TimeoutError, EOFError):
            self._kill_process()
            raise RuntimeError("the process that checks answers does not start; see its error in this log") from None
        return self._process

    def _kill_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None, "opened with a pipe"
                pipe.close()


def _send(process: subprocess.Popen[bytes], message: dict[str, object], end: float) -> None:
    assert process.stdin is not None, "opened with a pipe"
    line = memoryview(json.dumps(message).encode() + b"\n")
    while line:
        if not select.select([], [process.stdin], [], max(0.0, end - time.monotonic()))[1]:
            raise TimeoutError
        line = line[process.stdin.write(line) or 0 :]


def _receive(process: subprocess.Popen[bytes], end: float) -> dict[str, object]:
    assert process.stdout is not None, "opened with a pipe"
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        chunk = os.read(process.stdout.fileno(), 4096)
        if not chunk:
            raise EOFError
        line += chunk
    return dict(json.loads(line))


def main() -> None:
    """Check the answers that arrive on standard input, one JSON object a line, until end of file."""
    resource.setrlimit(resource.RLIMIT_AS, (JUDGE_MEMORY_BYTES, JUDGE_MEMORY_BYTES))
    write_message({"ready": True})
    for line in sys.stdin.buffer:
        message = json.loads(line)
        try:
            checker = _CHECKER_ADAPTER.validate_python(message["checker"])
            write_message({"passed": checker.check(message["answer"])})
        except Exception as error:  # the rule is untrusted and may raise anything
            write_message({"raised": f"{type(error).__name__}: {str(error)[:300]}"})


def write_message(message: dict[str, object]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
