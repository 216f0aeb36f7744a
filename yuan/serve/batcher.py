"""Requests of many callers, answered together by one model."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from yuan.generate import Completion, generate
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A model in service and its version."""

    model: Yuan
    tokenizer: Tokenizer
    version: int


@dataclass(frozen=True)
class Job:
    """Prompts of one request; the future gets the version that answered and its completions."""

    prompts: list[str]
    max_tokens: int
    temperature: float
    seed: int
    answer: "Future[tuple[int, list[Completion]]]" = field(default_factory=Future)


class Batcher:
    """A thread that decodes whatever is waiting in one go.

    The model may be replaced between two batches; no request is dropped or answered by two versions.
    """

    def __init__(self, current: Callable[[], Served | None], *, max_waiting: int = 256) -> None:
        self._current = current
        self._waiting: queue.Queue[Job] = queue.Queue(max_waiting)
        threading.Thread(target=self._work, daemon=True, name="batcher").start()

    def submit(self, job: Job) -> "Future[tuple[int, list[Completion]]]":
        """Queue a job.

        Raises:
            queue.Full: if too many wait.
        """
        self._waiting.put_nowait(job)
        return job.answer

    def _work(self) -> None:
        while True:
            jobs = [self._waiting.get()]
            while not self._waiting.empty():
                jobs.append(self._waiting.get())
            greedy = [job for job in jobs if job.temperature == 0]
            for group in (greedy, *([job] for job in jobs if job.temperature != 0)):
                if group:
                    self._answer(group)

    def _answer(self, jobs: list[Job]) -> None:
        served = self._current()
        try:
            if served is None:
                raise LookupError("no model is in service yet; promote a version")
            prompts = [prompt for job in jobs for prompt in job.prompts]
            first = jobs[0]
            most = max(job.max_tokens for job in jobs)
            done = generate(
                served.model, served.tokenizer, prompts, max_tokens=most, temperature=first.temperature, seed=first.seed
            )
        except Exception as error:  # belongs to the callers, who wait for it
            for job in jobs:
                job.answer.set_exception(error)
            return
        for job in jobs:
            own, done = done[: len(job.prompts)], done[len(job.prompts) :]
            job.answer.set_result((served.version, [_cut(served.tokenizer, c, job.max_tokens) for c in own]))


def _cut(tokenizer: Tokenizer, done: Completion, max_tokens: int) -> Completion:
    """Shorten an answer that was decoded beside a request that asked for more."""
    if done.num_tokens <= max_tokens:
        return done
    text = tokenizer.decode(tokenizer.encode(done.text)[:max_tokens])
    return Completion(text, "length", done.num_prompt_tokens, max_tokens)
