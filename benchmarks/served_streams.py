"""Streams of requests to the engine of the model server, in this process, and their times to first token."""

import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from pairs import make_line, print_lines

from infra.machine import measure_available_memory_gib
from yuan.generate.cache_slots import CacheBudget
from yuan.generate.limits import Sampling
from yuan.generate.placement import load_over_devices, measure_cache_room
from yuan.model.accelerator import list_devices
from yuan.model.weights import load_tokenizer
from yuan.serve.batching import BatchingEngine
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import AnswerPiece, GenerationRequest, ServedModel

NUMS_STREAMS = (1, 16)
STREAM_LIMIT_S = 600.0
FIRST_PLAIN_TOKEN = 5  # the ones before are special


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """The requests of a stream, one after the other, and the tokens of each."""

    num_requests: int
    num_prompt_tokens: int
    num_answer_tokens: int


def measure_streams(folder: Path, shape: StreamShape) -> None:
    """Answer one stream, then NUMS_STREAMS at a time, and print tokens/s and times to first token."""
    served = ServedModel(load_over_devices(folder, list_devices()[:1]), load_tokenizer(folder), version=2)
    room_bytes = measure_cache_room(served.model, lambda: int(measure_available_memory_gib() * 2**30))
    engine = BatchingEngine(served, ModelServerMetrics(), CacheBudget(room_bytes // 2))
    run_stream(engine, shape, seed=-1)  # which compiles and allocates
    for num_streams in NUMS_STREAMS:
        begun = time.perf_counter()
        with ThreadPoolExecutor(num_streams) as threads:
            by_stream = threads.map(lambda seed: run_stream(engine, shape, seed), range(num_streams))
            first_s = sorted(chain.from_iterable(by_stream))
        seconds = time.perf_counter() - begun
        num_requests = num_streams * shape.num_requests
        rate = round(num_requests * shape.num_answer_tokens / seconds)
        is_ok = len(first_s) == num_requests
        line = make_line(f"{num_streams} streams served", rate if is_ok else None, "tokens/s", ok=is_ok)
        if first_s:
            line |= {
                "first_token_s": round(statistics.median(first_s), 4),
                "slowest_first_token_s": round(first_s[-1], 4),
            }
        print_lines({**line, "prompt_tokens": shape.num_prompt_tokens, "answer_tokens": shape.num_answer_tokens})
    engine.drain()


class StreamedAnswer:
    """Receive the pieces of one answer.

    Attributes:
        first_s: when the first piece came; None before it.
        is_whole: the last piece came.
    """

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.is_whole = False
        self.ended = threading.Event()

    def receive(self, piece: AnswerPiece | Exception) -> None:
        if isinstance(piece, Exception):
            print(f"a request failed: {piece}", file=sys.stderr)
            self.ended.set()
            return
        self.first_s = self.first_s or time.perf_counter()
        if piece.finish_reason is not None:
            self.is_whole = True
            self.ended.set()


def run_stream(engine: BatchingEngine, shape: StreamShape, seed: int) -> list[float]:
    """Send the requests of one stream; return the time to first token of each that was answered to its end."""
    draw = np.random.default_rng(seed + 1)
    sampling = Sampling(max_tokens=shape.num_answer_tokens, stop_ids=())
    seconds = []
    for _ in range(shape.num_requests):
        tokens = draw.integers(FIRST_PLAIN_TOKEN, len(engine.served.tokenizer), shape.num_prompt_tokens).tolist()
        answer = StreamedAnswer()
        begun = time.perf_counter()
        request = GenerationRequest(
            engine.served, [tokens], sampling, deliver=answer.receive, limit_s=STREAM_LIMIT_S, caller=str(seed)
        )
        engine.submit(request)
        answer.ended.wait(STREAM_LIMIT_S)
        if answer.is_whole and answer.first_s is not None:
            seconds.append(answer.first_s - begun)
    return seconds
