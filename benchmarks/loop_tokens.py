"""Shards to token files, beside `datasets.map(num_proc=2)`: `python benchmarks/loop_tokens.py [--mb 24]`, six minutes.

Rows are those of GSM8K in English and Chinese, numbered so that none is repeated, in shards of JSONL, tokenized with
the published tokenizer; both need COTRAIN_TEST_DATA. Ours shuffles, encodes, masks and packs them into token files with
two processes. The peer encodes prompt, separator and answer with the same tokenizer in two processes, in batches, and
writes an Arrow file; loading the rows into it is not counted. Goal: at least the peer's rows and tokens per second.
Then the peak memory of the process that tokenizes one shard, over the size of the shard. Prints one JSON line for each.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pairs import PAIRS, make_at_least_line, make_line, measure_ratios, print_lines

from yuan import tokenizer as tokenizers
from yuan.data.rows import Row, dump_rows
from yuan.data.shard_tokens import SampleRules, read_shard_report
from yuan.data.token_workers import TokenJob, TokenWorkers

NUM_PROCESSES = 2
NUM_SHARDS = 4
RULES = SampleRules(seq_len=1024)
MEMORY_SIZES_MB = (8, 32, 128)
MAX_MEMORY_GROWTH_MIB = 100.0  # from the smallest to the largest shard: its index, not its rows
PEER = f"datasets.map(num_proc={NUM_PROCESSES})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=int, default=24, help="megabytes of rows in the pairs, at most 200")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        return measure_memory_of(arguments.memory_of)
    data = os.environ.get("COTRAIN_TEST_DATA")
    if data is None:
        return print_skipped("COTRAIN_TEST_DATA names no folder of test data")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(Path(data) / "tokenizer" / "tokenizer.model", folder)
        is_ok = compare_with_peer(folder, read_rows(Path(data)), min(arguments.mb, 200))
        is_ok &= measure_memory(folder, read_rows(Path(data)))
    return 0 if is_ok else 1


def print_skipped(reason: str) -> int:
    print(json.dumps({"name": "tokenize shards", "skipped": reason}))
    return 0


def read_rows(data: Path) -> list[Row]:
    lines = [
        line
        for name in ("gsm8k_En.txt", "gsm8k_Cn.txt")
        for line in (data / "gsm8k" / name).read_text().splitlines()
        if "[SEP]" in line
    ]
    return [Row(prompt=prompt, answer=answer) for prompt, _, answer in (line.partition("[SEP]") for line in lines)]


def write_shard(file: Path, rows: list[Row], num_bytes: int, first: int) -> int:
    """Write numbered rows until the file has a size, and return their number."""
    number = first
    with file.open("wb") as out:
        while out.tell() < num_bytes:
            row = rows[number % len(rows)]
            out.write(dump_rows([Row(prompt=f"{number}. {row.prompt}", answer=row.answer)]))
            number += 1
    return number - first


def compare_with_peer(folder: Path, rows: list[Row], size_mb: int) -> bool:
    """Compare rows per second in pairs; tokens per second have the same ratio but for the window's first tokens."""
    if importlib.util.find_spec("datasets") is None:
        return print_skipped("datasets is not installed; install the extra [bench]") == 0
    files = [folder / f"shard{n}.jsonl" for n in range(NUM_SHARDS)]
    num_rows = 0
    for file in files:
        num_rows += write_shard(file, rows, size_mb * 10**6 // NUM_SHARDS, num_rows)
    peer = PeerEncoder(folder, files)
    ours = OurTokens(folder, files)
    with TokenWorkers(NUM_PROCESSES) as workers:
        ours.measure(workers)  # starts the processes
        peer.measure()
        ratios = measure_ratios(lambda: 1 / ours.measure(workers), lambda: 1 / peer.measure(), PAIRS)
    token_ratios = [ratio * ours.num_tokens / peer.num_tokens for ratio in ratios]
    name = f"tokenize {size_mb} MB in {NUM_SHARDS} shards"
    return print_lines(
        make_at_least_line(f"{name}: rows", ratios, 1.0, figure=num_rows / ours.seconds, unit="rows/s", peer=PEER),
        make_at_least_line(
            f"{name}: tokens", token_ratios, 1.0, figure=ours.num_tokens / ours.seconds, unit="tokens/s", peer=PEER
        ),
    )


class OurTokens:
    """Tokenize the shards in processes, and count what was written."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self._folder, self._files = folder, files
        self.seconds = 0.0
        self.num_tokens = 0

    def measure(self, workers: TokenWorkers) -> float:
        out = self._folder / "ours"
        shutil.rmtree(out, ignore_errors=True)
        jobs = [make_job(self._folder, file, out / str(n)) for n, file in enumerate(self._files)]
        start = time.perf_counter()
        with ThreadPoolExecutor(NUM_PROCESSES) as threads:
            list(threads.map(workers.run, jobs))
        self.seconds = time.perf_counter() - start
        counts = [read_shard_report(job.folder).training for job in jobs]
        self.num_tokens = sum(count.targets + count.masked + count.samples for count in counts)
        return self.seconds


def make_job(folder: Path, file: Path, out: Path) -> TokenJob:
    out.mkdir(parents=True)
    sha256 = hashlib.sha256(file.name.encode()).hexdigest()
    return TokenJob(rows_file=file, shard_sha256=sha256, folder=out, tokenizer_folder=folder, rules=RULES)


class PeerEncoder:
    """Encode the rows with `datasets.map`; the tokens are counted from its result."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import datasets

        datasets.disable_progress_bars()
        self._datasets = datasets
        self._folder = folder
        cache = str(folder / "cache")
        names = [str(file) for file in files]
        self._rows = datasets.load_dataset("json", data_files=names, split="train", cache_dir=cache)
        self.num_tokens = 0

    def measure(self) -> float:
        file = self._folder / "peer.arrow"
        encode = PeerFunction(self._folder)
        start = time.perf_counter()
        result = self._rows.map(
            encode,
            batched=True,
            num_proc=NUM_PROCESSES,
            remove_columns=self._rows.column_names,
            load_from_cache_file=False,
            cache_file_name=str(file),
        )
        seconds = time.perf_counter() - start
        if not self.num_tokens:
            self.num_tokens = sum(map(len, result["input_ids"]))
        return seconds


class PeerFunction:
    """Encode a batch of rows: token ids, and labels that leave the prompt out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer: tokenizers.Tokenizer | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_folder": self._folder, "_tokenizer": None}  # each process loads it

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokenizer = self._tokenizer = self._tokenizer or tokenizers.load(self._folder)
        input_ids, labels = [], []
        for prompt, answer in zip(batch["prompt"], batch["answer"], strict=True):
            prompt_ids = [*tokenizer.encode(prompt), tokenizer.sep]
            answer_ids = [*tokenizer.encode(answer), tokenizer.eod]
            input_ids.append(prompt_ids + answer_ids)
            labels.append([-100] * len(prompt_ids) + answer_ids)
        return {"input_ids": input_ids, "labels": labels}


def measure_memory(folder: Path, rows: list[Row]) -> bool:
    """Measure the peak memory of a process that tokenizes one shard, over the size of the shard."""
    peaks = []
    for size_mb in MEMORY_SIZES_MB:
        file = folder / "memory.jsonl"
        write_shard(file, rows, size_mb * 10**6, 0)
        output = subprocess.run(
            [sys.executable, __file__, "--memory-of", str(file)], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        peaks.append(json.loads(output)["peak_mib"])
        print_lines(make_line(f"peak memory, a shard of {size_mb} MB", peaks[-1], "MiB"))
    growth = peaks[-1] - peaks[0]
    goal = f"at most {MAX_MEMORY_GROWTH_MIB:g}"
    name = f"peak memory, growth from {MEMORY_SIZES_MB[0]} to {MEMORY_SIZES_MB[-1]} MB"
    return print_lines(make_line(name, growth, "MiB", goal=goal, ok=growth <= MAX_MEMORY_GROWTH_MIB))


def measure_memory_of(file: Path) -> int:
    out = file.parent / "memory"
    shutil.rmtree(out, ignore_errors=True)
    make_job(file.parent, file, out).run()
    # Not ru_maxrss, which includes the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak_mib": round(int(line.split()[1]) / 1024, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
