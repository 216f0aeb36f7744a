"""Soak test: 2,000 callers call, stream, time out and disconnect; no resource leaks, and answers stay correct."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch

from infra.process_group import find_free_port
from tests.waiting import wait_until
from tests.yuan.model_server import TOKEN, make_served_model, read_metric
from yuan.generate.answers import generate
from yuan.generate.limits import Sampling

CALLERS, AT_ONCE, WARM_UP = 2000, 64, 300
GROWTH_MIB = 48.0  # what the allocators may keep of a peak after the warm-up
PATH = "/v1/completions"
LETTERS = "abcdefghij 0123456789 加减"
INVALID = ({"prompt": "a\0"}, {"prompt": "a", "n": 0}, {"prompt": [10**6]}, {"top_k": 2**70, "prompt": "a"}, {})


@pytest.fixture
def server():
    """Run a model server as a process; yield its pid and URL."""
    port = find_free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.yuan.model_server", str(port)], cwd=Path(__file__).parents[2]
    )
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: process.poll() is not None or is_healthy(url))
    yield process.pid, url
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def is_healthy(url):
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


def measure_rss_mib(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_request_body(rng):
    """Make a caller's request: a prompt and decoding parameters."""
    body = {
        "prompt": rng.choice(LETTERS.split()[0]) + "".join(rng.choices(LETTERS, k=rng.randint(0, 39))),
        "max_tokens": rng.choice([1, 5, 20, 60]),
        "n": rng.choice([1, 1, 1, 2, 4]),
        "temperature": rng.choice([0, 0, 0.7, 2]),
        "seed": rng.randrange(1000),
    }
    if rng.random() < 0.3:
        body["stop"] = rng.choices(LETTERS.split()[0], k=2)
    if rng.random() < 0.2:
        body["logprobs"] = rng.randint(0, 5)
    if rng.random() < 0.1:
        body["repetition_penalty"] = 1.3
    return body


async def run_caller(client, rng, counts, checked):
    """Run one caller: refused, patient, timing out, or disconnecting in the middle of a stream."""
    kind = rng.choices(["whole", "stream", "impatient", "leaves", "invalid"], [40, 20, 15, 20, 5])[0]
    body = make_request_body(rng)
    try:
        if kind == "invalid":
            response = await client.post(PATH, json=rng.choice(INVALID))
            assert response.status_code in (400, 422), response.text
        elif kind in ("whole", "impatient"):
            limit_s = 60 if kind == "whole" else rng.uniform(0.001, 0.5)
            response = await client.post(PATH, json=body, timeout=limit_s)
            assert response.status_code in (200, 503), response.text
            if response.status_code == 200:
                checked.append((body, [choice["text"] for choice in response.json()["choices"]]))
        else:
            body |= {"max_tokens": 500} if kind == "leaves" else {}
            await read_events(client, body, rng.randint(0, 20) if kind == "leaves" else None)
        counts[kind] += 1
    except httpx.TimeoutException:
        counts["impatient, left"] += 1


async def read_events(client, body, number):
    """Read all events of a stream, or the given number."""
    async with client.stream("POST", PATH, json={**body, "stream": True}) as answer:
        assert answer.status_code in (200, 503)
        lines = [line async for line in take_lines(answer.aiter_lines(), number) if line]
        assert number is not None or answer.status_code == 503 or lines[-1] == "data: [DONE]"


async def take_lines(lines, number):
    async for line in lines:
        if number is not None and (number := number - 1) < 0:
            return
        yield line


def run_callers(url, number, seed):
    """Run the callers, 64 at a time; return the counts by outcome, and answers to check."""
    counts, checked, rng = Counter(), [], random.Random(seed)

    async def run_all():
        slots = asyncio.Semaphore(AT_ONCE)
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120) as client:

            async def run_one(caller_rng):
                async with slots:
                    await run_caller(client, caller_rng, counts, checked)

            await asyncio.gather(*(run_one(random.Random(rng.random())) for _ in range(number)))

    asyncio.run(run_all())
    return counts, checked


def generate_expected(served, body):
    """Return `generate`'s answer to the prompt alone, for each choice; on one thread, as callers share the cores."""
    torch.set_num_threads(1)
    names = ("max_tokens", "temperature", "repetition_penalty")
    sampling_values = {name: body[name] for name in names if name in body}
    return [
        generate(
            served.model,
            served.tokenizer,
            [body["prompt"]],
            Sampling(**sampling_values, stop=tuple(body.get("stop", ())), seed=body["seed"] + n),
        )[0].text
        for n in range(body["n"])
    ]


@pytest.mark.slow
def test_2000_callers_leak_no_resources_and_get_correct_completions(server):
    pid, url = server
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:

        def is_idle():
            return (
                read_metric(http, "yuan_running")
                == read_metric(http, "yuan_waiting")
                == read_metric(http, "yuan_calls")
                == 0
            )

        run_callers(url, WARM_UP, seed=1)
        wait_until(is_idle)
        before, start = measure_rss_mib(pid), time.monotonic()
        counts, checked = run_callers(url, CALLERS, seed=2)
        seconds = time.monotonic() - start
        wait_until(is_idle)
        after = measure_rss_mib(pid)
        print(f"{CALLERS} callers in {seconds:.0f} s {dict(counts)}; RSS {before:.0f} MiB before, {after:.0f} after")
        assert sum(counts.values()) == CALLERS and min(counts.values()) > 20
        assert read_metric(http, "yuan_engine_errors_total") == 0
        assert http.get("/health").status_code == 200
        assert after - before < GROWTH_MIB
        served = make_served_model(1)
        sample = random.Random(3).sample(checked, 100)
        assert [texts for _, texts in sample] == [generate_expected(served, body) for body, _ in sample]
        body = {"prompt": "abc", "max_tokens": 20, "n": 1, "seed": 0}
        choices = http.post(PATH, json=body).json()["choices"]
        assert [choice["text"] for choice in choices] == generate_expected(served, body)
