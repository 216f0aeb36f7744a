"""Tokenize the shards of a snapshot in parallel; shards whose token files are in the cache are not read."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from flows.round.token_cache import CachedTokens, TokenCache
from yuan import tokenizer as tokenizers
from yuan.data.row_shards import RowShard, SnapshotManifest
from yuan.data.shard_tokens import SampleRules, compute_digest
from yuan.data.token_workers import TokenJob, TokenWorkers

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 2.0
PROGRESS_LOG_EVERY_S = 15.0

FetchShard = Callable[[str, RowShard, Path], None]  # the part's name, the shard, the file for its lines


@dataclass(frozen=True)
class TokenizedShard:
    """A shard of rows and its token files."""

    shard: RowShard
    tokens: CachedTokens


@dataclass(frozen=True)
class TokenizingProgress:
    """Progress over the shards that were not in the cache.

    Attributes:
        seconds: since the first of them was begun.
    """

    num_done: int
    num_shards: int
    rows_done: int
    num_rows: int
    seconds: float

    def describe(self) -> str:
        """Return the progress in one line.

        >>> TokenizingProgress(1, 4, 1000, 4000, 10.0).describe()
        'tokenizing: 1 of 4 shards, 100 rows/s, 30 s remaining'
        """
        text = f"tokenizing: {self.num_done} of {self.num_shards} shards"
        if not self.rows_done:
            return text
        rows_per_s = self.rows_done / max(self.seconds, 1e-3)
        return f"{text}, {rows_per_s:,.0f} rows/s, {(self.num_rows - self.rows_done) / rows_per_s:.0f} s remaining"


@dataclass(frozen=True)
class _ShardTask:
    """A shard whose token files are to be made."""

    part: str
    shard: RowShard
    digest: str
    rules: SampleRules


def tokenize_snapshot(
    cache: TokenCache,
    manifest: SnapshotManifest,
    fetch: FetchShard,
    *,
    tokenizer_folder: Path,
    rules: Mapping[str, SampleRules],
    num_workers: int,
    report: Callable[[TokenizingProgress], None],
    verify_tokens: bool = False,
) -> dict[str, list[TokenizedShard]]:
    """Return the token files of every shard, by part; hold the cache meanwhile.

    Shards that are done stay in the cache, so after a kill at most one shard of each worker is repeated.

    Args:
        fetch: writes the verified lines of a shard into a new file; called from several threads.
        rules: of each part.
        report: called every few seconds, and whenever a shard is done.
        verify_tokens: read all tokens in the cache, so that every damaged shard is made again; not only the other
            files, which are small.

    Raises:
        TokenizingFailed: if the processes die of a shard twice.
        OSError: if the disk is full.
    """
    tokenizer = tokenizers.load(tokenizer_folder)
    cached: dict[tuple[str, str], CachedTokens] = {}
    tasks = []
    for part in manifest.parts:
        for shard in dict.fromkeys(part.shards):
            digest = compute_digest(shard.sha256, tokenizer, rules[part.name])
            tokens = cache.find(digest, verify_tokens=verify_tokens)
            if tokens is None:
                tasks.append(_ShardTask(part.name, shard, digest, rules[part.name]))
            else:
                cached[part.name, shard.sha256] = tokens
    log.info("tokenizing %d shards, %d are in the cache", len(tasks), len(cached))

    for task, tokens in _run_tasks(cache, tasks, fetch, tokenizer_folder, num_workers, report):
        cached[task.part, task.shard.sha256] = tokens
    return {
        part.name: [TokenizedShard(shard, cached[part.name, shard.sha256]) for shard in dict.fromkeys(part.shards)]
        for part in manifest.parts
    }


def _run_tasks(
    cache: TokenCache,
    tasks: Sequence[_ShardTask],
    fetch: FetchShard,
    tokenizer_folder: Path,
    num_workers: int,
    report: Callable[[TokenizingProgress], None],
) -> list[tuple[_ShardTask, CachedTokens]]:
    """Tokenize shards, each worker one at a time; the first error ends all of them."""
    if not tasks:
        return []
    num_workers = min(num_workers, len(tasks))
    executor = ThreadPoolExecutor(num_workers, "tokenize")
    try:
        with TokenWorkers(num_workers) as workers:

            def tokenize(task: _ShardTask) -> CachedTokens:
                def write(folder: Path) -> None:
                    rows_file = folder.parent / "rows.jsonl"
                    fetch(task.part, task.shard, rows_file)
                    workers.run(
                        TokenJob(
                            rows_file=rows_file,
                            shard_sha256=task.shard.sha256,
                            folder=folder,
                            tokenizer_folder=tokenizer_folder,
                            rules=task.rules,
                        )
                    )

                return cache.add(task.digest, task.shard.sha256, write)

            try:
                # The largest first, so that no worker is left with one at the end.
                ordered = sorted(tasks, key=lambda task: -task.shard.num_bytes)
                futures = {executor.submit(tokenize, task): task for task in ordered}
                _wait_for_all(futures, report)
            finally:
                executor.shutdown(wait=False, cancel_futures=True)
    finally:
        executor.shutdown()
    return [(task, future.result()) for future, task in futures.items()]


def _wait_for_all(
    futures: Mapping[Future[CachedTokens], _ShardTask], report: Callable[[TokenizingProgress], None]
) -> None:
    """Report progress until every shard is done; raise the first error."""
    started_at, logged_at = time.monotonic(), time.monotonic()
    num_rows = sum(task.shard.num_rows for task in futures.values())
    remaining = set(futures)
    while remaining:
        completed, remaining = wait(remaining, PROGRESS_EVERY_S, FIRST_COMPLETED)
        for future in completed:
            future.result()
        rows_done = num_rows - sum(futures[future].shard.num_rows for future in remaining)
        seconds = time.monotonic() - started_at
        progress = TokenizingProgress(len(futures) - len(remaining), len(futures), rows_done, num_rows, seconds)
        report(progress)
        if time.monotonic() - logged_at > PROGRESS_LOG_EVERY_S or not remaining:
            logged_at = time.monotonic()
            log.info("%s", progress.describe())
