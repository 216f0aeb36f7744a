"""Hostile items among honest ones: `python benchmarks/faults_poison.py [--honest 3000] [--hostile 300]`, ten minutes.

Six contributors send reports and datasets through the public API, some of them built to break a step of the loop; then
two rounds run. Every honest report must be reproduced, decided, and notified once of each promoted version; each
hostile item must be refused with 4xx or have a state with its reason; no round may fail because of one; and the public
front page must show none of their text. The model trains for a few steps only, as the loop is under test.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pairs import make_line, print_lines

from feedback.client import Client
from feedback.contracts import FeedbackOut, RoundOut, RoundParameters
from feedback.states import DatasetPurpose
from flows.demo.demo_corpus import BASE_SKILLS
from infra.settings import Settings
from yuan.data.rows import dump_rows
from yuan.data.skills import load_skills

MARK = "p0is0n"  # in every hostile text
NUM_CONTRIBUTORS = 6
ROUND = RoundParameters(max_steps=20, learning_rate=1e-3, replay_rows=200)
ROUND_LIMIT_S = 600
REPORTS_PATH = "/api/v1/feedback"
DATASETS_PATH = "/api/v1/datasets?name=rows"
Body = dict[str, Any]


@dataclass
class Item:
    """Hold one sent item and its response: the record's id, or the status of the refusal."""

    kind: str
    path: str
    content: bytes
    status: int = 0
    record_id: str = ""


@dataclass(frozen=True)
class Results:
    """Hold the results: rounds, versions promoted after the reports, state and reason of each record, the number of
    notices by report and version, and the front page."""

    training_rounds: list[RoundOut]
    promoted: list[int]
    records: dict[str, tuple[str, str | None]]
    num_notices: Counter[tuple[str, int]]
    page: str


@dataclass
class Sender:
    """Hold a contributor's token and the items that it sends."""

    token: str
    items: list[Item] = field(default_factory=list)


def make_report(number: int, prompt: str, expected: str, **fields: Any) -> Body:
    return {
        "kind": "correction",
        "prompt": prompt,
        "response": f"no answer {number}",
        "model_version": 1,
        "expected": expected,
        **fields,
    }


def make_honest_item(number: int, rng: random.Random) -> Item:
    word = "".join(rng.choices("abcdefgh", k=6)) + str(number)
    return Item("honest", REPORTS_PATH, json.dumps(make_report(number, f"Reverse: {word}", word[::-1])).encode())


def make_numeric_report(value: object, tolerance: object) -> Callable[[int, Body], object]:
    checker = {"type": "numeric", "value": value, "tolerance": tolerance}
    return lambda n, _: make_report(n, f"{MARK} count to {n}", "7", checker=checker)


def make_rows(*rows: Body) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass") + b"\n" for row in rows)


def make_checked_row(prompt: str, answer: str) -> Body:
    return {"prompt": prompt, "answer": answer, "checker": {"type": "exact", "value": answer}}


# Makers of hostile items, from the item's number and an honest report that was sent before it.
HOSTILE: dict[str, Callable[[int, Body], object]] = {
    "prompt beyond the window": lambda n, _: make_report(n, f"{MARK} {n} " + "x" * 300, "y"),
    "prompt as long as allowed": lambda n, _: make_report(n, f"{MARK} {n} ".ljust(20_000, "x"), "y"),
    "body too large": lambda n, _: make_report(n, f"{MARK} {n} " + "x" * 90_000, "y"),
    "line separators": lambda n, _: make_report(n, f"{MARK}\u2028{n}\u0085a\x1e\x0b", "a\u2028b\u0085c"),
    "U+0000": lambda n, _: make_report(n, f"{MARK} \0 {n}", "a\0b"),
    "half a character": lambda n, _: json.dumps(make_report(n, f"{MARK} {n} \ud83d", "a")),
    "white space alone": lambda n, _: make_report(n, " \u3000\n" * (n % 5 + 1), MARK),
    "right to left and control": lambda n, _: make_report(n, f"\u202e{MARK}\u2066\x07\x1b[2J\ufeff {n}", "\u202ea"),
    "combining marks and emoji": lambda n, _: make_report(n, f"{MARK} {n} a" + "\u0301" * 200, "\U0001f469\u200d" * 40),
    "markup and statements": lambda n, _: make_report(
        n, f"<script>alert('{MARK}')</script>'; drop table \"case\"; {n}", "a"
    ),
    "special tokens": lambda n, _: make_report(n, f"{MARK} <eod><sep><pad> {n}", "<eod><sep>"),
    "number beyond all": make_numeric_report("1e9999999", 0),
    "number near the limit": make_numeric_report("7", "1e999999"),
    "number of many digits": lambda n, _: make_report(n, f"{MARK} digits {n}", "9" * 4000, checker=None),
    "duplicate": lambda n, earlier: {**earlier, "response": MARK},
    "contradiction": lambda n, earlier: {**earlier, "response": MARK, "expected": f"{MARK} {n}"},
    "a version there is not": lambda n, _: {**make_report(n, f"{MARK} when {n}", "a"), "model_version": 10**40},
    "an answer there is not": lambda n, _: make_report(n, f"{MARK} which {n}", "a", response_id=f"{MARK}{n}"),
    "not JSON": lambda n, _: f'{{"kind": NaN, "prompt": "{MARK}", {n}',
    "deep": lambda n, _: f'{{"prompt": {"[" * 5_000}"{MARK}"{"]" * 5_000}}}',
    "unknown field": lambda n, _: make_report(n, f"{MARK} {n}", "a", admin=True),
    "rows with separators": lambda n, _: make_rows(
        *(make_checked_row(f"{MARK}\u2028{n} {i}\u0085", "a\u2028") for i in range(10))
    ),
    "rows with U+0000": lambda n, _: make_rows(*(make_checked_row(f"{MARK}\0{n} {i}", "a\0") for i in range(10))),
    "rows of white space": lambda n, _: make_rows(*(make_checked_row(" ", f"{MARK} {n} {i}") for i in range(10))),
    "rows beyond the window": lambda n, _: make_rows(
        *(make_checked_row(f"{MARK} {n} {i} " + "x" * 300, "y") for i in range(10))
    ),
}


def make_hostile_item(number: int, earlier: Body) -> Item:
    kind = list(HOSTILE)[number % len(HOSTILE)]
    body = HOSTILE[kind](number, earlier)
    content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return Item(kind, DATASETS_PATH if kind.startswith("rows") else REPORTS_PATH, content)


def distribute_items(senders: list[Sender], num_honest: int, num_hostile: int) -> None:
    """Distribute items to the contributors; an item based on an honest report follows it, from the same contributor."""
    rng = random.Random(0)
    for number in range(num_honest):
        senders[number % len(senders)].items.append(make_honest_item(number, rng))
    for number in range(num_hostile):
        items = senders[number % len(senders)].items
        place = rng.randrange(1, len(items) + 1)
        earlier = next(item for item in reversed(items[:place]) if item.kind == "honest")
        items.insert(place, make_hostile_item(number, json.loads(earlier.content)))


def send_items(url: str, sender: Sender) -> None:
    headers = {"Authorization": f"Bearer {sender.token}", "Content-Type": "application/json"}
    for item in sender.items:
        for _ in range(3):  # a 500 closes the connection, on which the next request fails
            with contextlib.suppress(httpx.TransportError):
                response = httpx.post(url + item.path, content=item.content, headers=headers, timeout=60)
                item.status = response.status_code
                item.record_id = response.json()["id"] if response.status_code == 201 else ""
                break


@contextlib.contextmanager
def start_stack() -> Iterator[Settings]:
    home = Path(tempfile.mkdtemp(prefix="poison-"))
    (home / "env.local").write_text("COTRAIN_ROUND_AFTER_REPORTS=0\n")
    env = {**os.environ, "COTRAIN_HOME": str(home)}
    cotrain = [sys.executable, "-m", "flows.cli.app"]
    try:
        subprocess.run([*cotrain, "up"], env=env, check=True, stdout=sys.stderr)
        yield Settings(_env_file=home / "env", home=home)
    finally:
        subprocess.run([*cotrain, "down"], env=env, check=False, stdout=sys.stderr)
        shutil.rmtree(home, ignore_errors=True)


def run_round(operator: Client) -> RoundOut:
    start, training_round = time.monotonic(), operator.start_round(ROUND)
    while (current := operator.round(training_round.id)).state == "running":
        if time.monotonic() - start > ROUND_LIMIT_S:
            raise TimeoutError(f"round {current.number} is at {current.step} after {ROUND_LIMIT_S} s")
        time.sleep(1)
    print(f"round {current.number} {current.state}: {current.reason}; failed {current.failed_items}", file=sys.stderr)
    return current


def read_records(senders: list[Sender], url: str) -> dict[str, tuple[str, str | None]]:
    """Return state and reason of every record, as its owner sees them."""
    outcomes: dict[str, tuple[str, str | None]] = {}
    for sender in senders:
        with Client(url, sender.token, timeout_s=300) as client:
            reports: list[FeedbackOut] = client.all_feedback()
            for report in reports:
                outcomes[report.id] = (report.state, report.reason)
            for item in sender.items:
                if item.path == DATASETS_PATH and item.record_id:
                    dataset = client.dataset(item.record_id)
                    outcomes[dataset.id] = (dataset.state, dataset.reason)
    return outcomes


def is_explained(item: Item, records: dict[str, tuple[str, str | None]]) -> bool:
    if not item.record_id:
        return 400 <= item.status < 500
    state, reason = records[item.record_id]
    return state == "accepted" or reason is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--honest", type=int, default=3000)
    parser.add_argument("--hostile", type=int, default=300)
    arguments = parser.parse_args()
    start = time.monotonic()
    with start_stack() as settings, Client(settings.portal_url, settings.operator_token.get_secret_value()) as operator:
        base = [row for skill in load_skills(BASE_SKILLS)[:4] for row in skill.make_rows(300, seed=0)]
        (settings.home / "rows.jsonl").write_bytes(dump_rows(base))
        operator.push_dataset(settings.home / "rows.jsonl", name="base", purpose=DatasetPurpose.BASE)
        first = run_round(operator)
        senders = [Sender(operator.add_contributor(f"sender-{n}").token) for n in range(NUM_CONTRIBUTORS)]
        distribute_items(senders, arguments.honest, arguments.hostile)
        with ThreadPoolExecutor(NUM_CONTRIBUTORS) as pool:
            list(pool.map(lambda sender: send_items(settings.portal_url, sender), senders))
        print(f"sent after {time.monotonic() - start:.0f} s", file=sys.stderr)
        training_rounds = [run_round(operator) for _ in range(2)]
        promoted = [
            training_round.candidate_version or 0
            for training_round in training_rounds
            if training_round.state == "promoted"
        ]
        results = Results(
            training_rounds=[first, *training_rounds],
            promoted=promoted,
            records=read_records(senders, settings.portal_url),
            num_notices=count_notices(senders, settings.portal_url, len(promoted)),
            page=httpx.get(settings.portal_url).text,
        )
    lines = [*make_honest_lines(senders, results), *make_hostile_lines(senders, results)]
    return 0 if print_lines(*lines, make_line("poison/seconds", round(time.monotonic() - start), "s")) else 1


def count_notices(senders: list[Sender], url: str, num_promoted: int) -> Counter[tuple[str, int]]:
    """Count the notices by report and version, after their number has stopped changing."""
    end, counts = time.monotonic() + 60, Counter[tuple[str, int]]()
    while True:
        before, counts = counts, Counter()
        for sender in senders:
            with Client(url, sender.token, timeout_s=300) as client:
                counts.update((notice.feedback_id, notice.version) for notice in client.notices())
        if time.monotonic() > end or (counts == before and (counts or not num_promoted)):
            return counts
        time.sleep(3)


def make_honest_lines(senders: list[Sender], results: Results) -> list[dict[str, Any]]:
    honest = [item.record_id for sender in senders for item in sender.items if item.kind == "honest"]
    states = Counter(results.records.get(record_id, ("lost", None))[0] for record_id in honest)
    decided = states["accepted"] + states["rejected"] + states["disputed"]
    accepted = [record_id for record_id in honest if results.records.get(record_id, ("lost", None))[0] == "accepted"]
    num_notified_once = sum(
        all(results.num_notices[record_id, version] == 1 for version in results.promoted) for record_id in accepted
    )
    is_once = (
        bool(results.promoted)
        and num_notified_once == len(accepted)
        and max(results.num_notices.values(), default=0) == 1
    )
    unit = f"of {len(accepted)} accepted reports, for each of {len(results.promoted)} versions"
    return [
        make_line("poison/honest_decided", decided, f"of {len(honest)} reports", goal="all", ok=decided == len(honest)),
        make_line("poison/honest_notified_once", num_notified_once, unit, goal="all", ok=is_once),
    ]


def make_hostile_lines(senders: list[Sender], results: Results) -> list[dict[str, Any]]:
    items = [item for sender in senders for item in sender.items]
    hostile = [item for item in items if item.kind != "honest"]
    explained = sum(is_explained(item, results.records) for item in hostile)
    outcomes = Counter((item.kind, item.status, *results.records.get(item.record_id, ("", ""))) for item in hostile)
    for (kind, status, state, reason), count in sorted(outcomes.items(), key=str):
        print(f"{count} x {kind}: {status} {state} {reason or ''}"[:200], file=sys.stderr)
    errors = sum(item.status >= 500 or item.status == 0 for item in items)
    ended = sum(training_round.state in ("promoted", "rejected") for training_round in results.training_rounds)
    shown = results.page.count(MARK)
    of_rounds = f"of {len(results.training_rounds)} rounds"
    return [
        make_line(
            "poison/hostile_explained", explained, f"of {len(hostile)} items", goal="all", ok=explained == len(hostile)
        ),
        make_line("poison/server_errors", errors, "requests", goal="0", ok=errors == 0),
        make_line("poison/rounds_ended", ended, of_rounds, goal="all", ok=ended == len(results.training_rounds)),
        make_line("poison/shown", shown, "hostile texts on the front page", goal="0", ok=shown == 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
