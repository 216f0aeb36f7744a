"""Tokenize shards in child processes: `with TokenWorkers(2) as workers: workers.run(job)`, called from several threads.

The processes exit when the calling process does, however it does.
"""

import json
import os
import select
import shutil
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from yuan import tokenizer as tokenizers
from yuan.data.shard_tokens import SampleRules, write_shard_tokens
from yuan.data.text import make_printable
from yuan.data.worker_pool import MAX_ITEM_TRIES, WorkerDied, WorkerPool, WorkersEnded
from yuan.tokenizer import TOKENIZER_MODEL_FILE

MAX_IN_PROCESS_BYTES = 2**20  # of rows that this process tokenizes itself, since starting another one takes longer
EXIT_PARENT_GONE = 75
MAX_WORKER_REASON_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class TokenJob:
    """A shard to tokenize.

    Attributes:
        rows_file: its lines.
        shard_sha256: of its lines.
        folder: an existing folder, empty, for the token files.
        tokenizer_folder: the folder of tokenizer.model.
    """

    rows_file: Path
    shard_sha256: str
    folder: Path
    tokenizer_folder: Path
    rules: SampleRules

    def run(self) -> None:
        """Tokenize the shard in this process.

        Raises:
            OSError: if a file cannot be read or written.
        """
        write_shard_tokens(
            self.rows_file,
            self.folder,
            shard_sha256=self.shard_sha256,
            tokenizer=_load_tokenizer(
                self.tokenizer_folder, (self.tokenizer_folder / TOKENIZER_MODEL_FILE).stat().st_mtime_ns
            ),
            rules=self.rules,
        )

    def to_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TokenJob":
        return cls(
            rows_file=Path(data["rows_file"]),
            shard_sha256=data["shard_sha256"],
            folder=Path(data["folder"]),
            tokenizer_folder=Path(data["tokenizer_folder"]),
            rules=SampleRules(**data["rules"]),
        )


@lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, written_at_ns: int) -> tokenizers.Tokenizer:
    """Load a tokenizer, once for all shards, and again if its file was replaced."""
    return tokenizers.load(folder)


class TokenizingFailed(RuntimeError):
    """A shard cannot be tokenized; another try would fail as well."""


class TokenWorkers(WorkerPool):
    """Child processes, each of which tokenizes one shard at a time.

    Args:
        count: processes at most.
    """

    def __init__(self, count: int) -> None:
        super().__init__("yuan.data.token_workers", count)

    def run(self, job: TokenJob) -> None:
        """Tokenize a shard, once there is a free process; a process that dies is replaced, and the shard tried again.

        Raises:
            TokenizingFailed: if two processes died of the shard, or it fails for another reason.
            OSError: if a file cannot be read or written.
        """
        if job.rows_file.stat().st_size <= MAX_IN_PROCESS_BYTES:
            return job.run()

        def empty_folder() -> None:
            shutil.rmtree(job.folder)
            job.folder.mkdir()

        try:
            reply = self.process(lambda to_process, answers: _exchange(to_process, answers, job), empty_folder)
        except WorkersEnded:
            raise TokenizingFailed("the processes that tokenize shards are ended; start the round again") from None
        except WorkerDied as death:
            raise TokenizingFailed(
                f"the process that tokenizes shard {job.shard_sha256[:12]} {_describe_exit(death.status)}, "
                f"{MAX_ITEM_TRIES} times; if memory is out, free some or set COTRAIN_TOKEN_WORKERS lower"
            ) from None
        _raise_reported_error(job, reply)


def _exchange(to_process: IO[bytes], answers: IO[bytes], job: TokenJob) -> dict[str, Any] | None:
    """Send a job and wait for the reply; None if the process died."""
    to_process.write(json.dumps(job.to_json()).encode() + b"\n")
    to_process.flush()
    line = answers.readline()
    return dict(json.loads(line)) if line.endswith(b"\n") else None


def _raise_reported_error(job: TokenJob, reply: dict[str, Any]) -> None:
    if reply["error"] is None:
        return
    if reply["errno"] is not None:
        raise OSError(reply["errno"], reply["error"])
    raise TokenizingFailed(f"shard {job.shard_sha256[:12]} cannot be tokenized: {reply['error']}; see the flow's log")


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def main() -> None:
    """Tokenize the shards that arrive on standard input, one JSON object a line, until end of file."""
    threading.Thread(target=exit_with_caller, daemon=True, name="caller-watch").start()
    for line in sys.stdin:
        reply: dict[str, Any] = {"error": None, "errno": None}
        try:
            TokenJob.from_json(json.loads(line)).run()
        except Exception as error:  # reported to the caller, which decides
            text = make_printable(f"{type(error).__name__}: {error}")[:MAX_WORKER_REASON_CHARACTERS]
            number = error.errno if isinstance(error, OSError) else None
            reply = {"error": text, "errno": number}
        print(json.dumps(reply), flush=True)


def exit_with_caller() -> None:
    """Exit when the other end of standard input closes, also in the middle of a shard."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLHUP)
    poll.poll()
    os._exit(EXIT_PARENT_GONE)


if __name__ == "__main__":
    main()
