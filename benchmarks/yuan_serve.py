"""Latency of streams through the portal, and a burst of 1,000 callers: `python benchmarks/yuan_serve.py`.

Starts its own stack, trains a tiny model, and calls it through the public API: first and last token for 1 and 16
callers. Goals: every call of the streams gets its response; every call of the burst gets one or a refusal with a
reason; a call after the burst gets a response.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import openai
from pairs import make_line, print_lines

from feedback.client import Client
from feedback.contracts import RoundParameters
from feedback.states import DatasetPurpose
from flows.cli.rounds import follow_round
from flows.demo.demo_corpus import BASE_SKILLS
from flows.demo.scenario import push_rows, wait_for_version
from flows.stack.stack_control import bring_up, take_down
from infra.settings import HOME_VARIABLE, Settings, load_settings
from yuan.data.skills import load_skills

NUM_CALLERS = 16
REQUESTS_PER_CALLER = 12
MAX_TOKENS = 32
NUM_BURST_CALLS = 1000
SHORT_TRAINING = RoundParameters(max_steps=60, learning_rate=2e-3)


def run_caller(url: str, token: str, first: list[float], whole: list[float], tokens: list[int]) -> None:
    """Send one caller's requests in sequence."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0) as client:
        for number in range(REQUESTS_PER_CALLER):
            began = time.perf_counter()
            prompt = f"What is {number} plus {number}?"
            stream = client.completions.create(
                model="yuan", prompt=prompt, max_tokens=MAX_TOKENS, temperature=1.0, seed=number, stream=True
            )
            count = 0
            for chunk in stream:
                if not count:
                    first.append(time.perf_counter() - began)
                count += bool(chunk.choices and chunk.choices[0].text)
            whole.append(time.perf_counter() - began)
            tokens.append(count)


def measure(url: str, operator: Client) -> bool:
    """Measure one caller, then NUM_CALLERS concurrent callers."""
    for callers in (1, NUM_CALLERS):
        accounts = [operator.add_contributor(f"caller-{callers}-{n}").token for n in range(callers)]
        first: list[float] = []
        whole: list[float] = []
        tokens: list[int] = []
        threads = [threading.Thread(target=run_caller, args=(url, token, first, whole, tokens)) for token in accounts]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        expected = callers * REQUESTS_PER_CALLER
        name = f"{callers} streams through the portal"
        print_lines(
            make_line(f"{name}, first token, median", round(statistics.median(first), 4), "s"),
            make_line(f"{name}, first token, p99", round(compute_percentile(first, 0.99), 4), "s"),
            make_line(f"{name}, whole answer, p99", round(compute_percentile(whole, 0.99), 4), "s"),
            make_line(f"{name}, pieces", round(sum(tokens) / seconds), "pieces/s"),
        )
        if not print_lines(
            make_line(f"{name}, answered", len(whole), "requests", goal=str(expected), ok=len(whole) == expected)
        ):
            return False
    return True


def measure_burst(url: str, token: str) -> bool:
    """Send NUM_BURST_CALLS calls at once, each to be answered or refused with a reason; then one to be answered."""
    body = {"model": "yuan", "prompt": "What is 1 plus 1?", "max_tokens": MAX_TOKENS}
    headers = {"Authorization": f"Bearer {token}"}

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(f"{url}/v1/completions", json=body, headers=headers)

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            return await asyncio.gather(*(ask(client) for _ in range(NUM_BURST_CALLS)))

    began = time.perf_counter()
    responses = asyncio.run(ask_all())
    seconds = time.perf_counter() - began
    num_answered = sum(response.status_code == 200 for response in responses)
    num_refused = sum(
        response.status_code in (429, 503) and bool(response.json()["error"]["message"]) for response in responses
    )
    later_answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
    ok = num_answered + num_refused == NUM_BURST_CALLS and later_answer.status_code == 200
    report = make_line(
        f"{NUM_BURST_CALLS} at once, answered or refused with a reason",
        num_answered + num_refused,
        "requests",
        goal=str(NUM_BURST_CALLS),
        ok=ok,
    )
    return print_lines({**report, "answered": num_answered, "refused": num_refused, "seconds": round(seconds, 1)})


def compute_percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        os.environ[HOME_VARIABLE] = str(home)
        bring_up(home)
        try:
            settings = load_settings(Settings)
            with Client(settings.portal_url, settings.operator_token.get_secret_value()) as operator:
                push_rows(
                    operator,
                    "base",
                    DatasetPurpose.BASE,
                    [row for s in load_skills(BASE_SKILLS)[:4] for row in s.make_rows(300, seed=0)],
                )
                training_round = follow_round(operator, operator.start_round(SHORT_TRAINING).id)
                wait_for_version(operator, int(training_round.candidate_version or 0))
                served = measure(settings.portal_url, operator)
                token = operator.add_contributor("crowd").token
                return 0 if measure_burst(settings.portal_url, token) and served else 1
        finally:
            take_down(home)


if __name__ == "__main__":
    sys.exit(main())
