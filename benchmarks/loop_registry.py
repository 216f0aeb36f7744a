"""Goals of files that pass to and from the registry: `python benchmarks/loop_registry.py [--full] [MB]`.

A file of 1 GB goes up and down, in interleaved pairs with boto3's `upload_file` and `download_file` and their defaults,
which neither compute nor compare a sha256 of the file. MB/s are medians over the pairs. Goal: at least 0.7 of boto3's
speed, directly between this process and the store. The way through MLflow's server is measured without a goal. Ten
minutes on a quiet machine; `--pairs N` measures N pairs of the direct way, not ten.

`--full`: a sparse file of 12 GB goes up and down once, each way cut off by a kill half way and resumed; the address
that MLflow signs is that of a relay in front of the store, which counts the bytes. Goals: at most 500 MiB of resident
memory in this process and in MLflow's, and no byte that was recorded before the kill is sent again.

The real MLflow server behind its gate, PostgreSQL and the store run in a temporary folder, which needs 45 GB on the
disk of TMPDIR with `--full`, else 30 GB. MB replaces the size, for a quick look. Prints JSON lines.
"""

import contextlib
import filecmp
import functools
import hashlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pairs import PAIRS, make_at_least_line, make_line, measure_ratios, print_lines

from flows.stack.services import make_services
from flows.stack.stack_config import load_config, load_or_make_config, write_environment
from infra.artifact_server import ArtifactServer
from infra.artifact_transfer import ArtifactSource, ArtifactTransfer
from infra.confinement import parse_port
from infra.keeper import Keeper, find_stack_pids
from infra.logs import configure_logging
from infra.object_store import ObjectStore, open_object_store
from infra.polling import poll_until
from infra.settings import Settings, StoreAccess
from infra.tracker import Tracker
from infra.transfer_records import ARTIFACT_PART_BYTES, UploadProgress

GB = 10**9
FULL_BYTES = 12 * GB
RANDOM_BLOCK_BYTES = 10**6
STREAMED_PAIRS = 3
REGISTRY_START_TIMEOUT_S = 300.0
MAX_RESIDENT_MIB = 500
SERVICES = ("postgres", "s3", "mlflow")
MAX_OVERHEAD_BYTES = 8 * 2**20  # less than a part: heads of requests and responses, and MLflow's own requests
PROCESS_NAMES = {"weed": "the store", "mlflow": "MLflow", "uvicorn": "MLflow", "postgres": "PostgreSQL"}
UNLIMITED_PROCESSES = ("other", "PostgreSQL", "the store")


def main() -> int:
    match sys.argv[1:]:
        case ["--stack", home, *relay_url]:
            run_stack(Path(home), *relay_url)
            return 0
        case ["--transfer", direction, home, folder, file, size]:
            transfer_once(direction, Path(home), folder, Path(file), int(size))
            return 0
    is_full = "--full" in sys.argv
    with tempfile.TemporaryDirectory() as name, run_services(Path(name), with_relay=is_full) as services:
        settings, store, relay = services
        work = Path(name) / "work"
        work.mkdir()
        tracker = Tracker(settings)
        run_id = tracker.start_run("benchmark", {})
        folder = f"{tracker.client.get_run(run_id).info.artifact_uri.partition(':/')[2]}/model"
        pairs = int(sys.argv.pop(sys.argv.index("--pairs") + 1)) if "--pairs" in sys.argv else PAIRS
        sizes = [int(argument) * 10**6 for argument in sys.argv[1:] if argument.isdecimal()]
        num_bytes = sizes[0] if sizes else FULL_BYTES if is_full else GB
        if relay is not None:
            return 0 if measure_full(settings, relay, folder, work, num_bytes) else 1
        return 0 if measure_pairs(settings, store, folder, work, num_bytes, pairs) else 1


class CountingRelay:
    """A port that forwards connections to the store, and counts the bytes.

    Attributes:
        num_sent: bytes to the store.
        num_received: bytes from the store.
    """

    def __init__(self, store_port: int) -> None:
        self.num_sent = self.num_received = 0
        self._lock = threading.Lock()
        self._store_port = store_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            store = socket.create_connection(("127.0.0.1", self._store_port))
            threading.Thread(target=self._forward, args=(client, store, "num_sent"), daemon=True).start()
            threading.Thread(target=self._forward, args=(store, client, "num_received"), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        buffer = memoryview(bytearray(256 * 1024))
        with contextlib.suppress(OSError):  # one side is closed, or was killed
            while num_read := source.recv_into(buffer):
                with self._lock:
                    setattr(self, counter, getattr(self, counter) + num_read)
                target.sendall(buffer[:num_read])
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def run_services(
    home: Path, *, with_relay: bool = False
) -> Iterator[tuple[Settings, ObjectStore, CountingRelay | None]]:
    """Run the services in a process of their own, and yield settings, MLflow's bucket and the relay."""
    config = load_or_make_config(home, durable=False)
    write_environment(home, config)
    settings = Settings(_env_file=home / "env", home=home)
    access = StoreAccess(
        s3_endpoint=settings.s3_endpoint,
        s3_access_key=config.secrets["s3_admin_access_key"],
        s3_secret_key=config.secrets["s3_admin_secret_key"],
    )
    relay = CountingRelay(parse_port(settings.s3_endpoint)) if with_relay else None
    command = [sys.executable, __file__, "--stack", str(home)]
    command += [] if relay is None else [f"http://127.0.0.1:{relay.port}"]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        log = home / "logs" / "mlflow.log"

        def is_ready() -> bool:
            with contextlib.suppress(Exception):
                return Tracker(settings).client.get_experiment_by_name("yuan") is not None
            return False

        if not poll_until(is_ready, timeout_s=REGISTRY_START_TIMEOUT_S, pause_s=0.5):
            raise RuntimeError(f"MLflow did not start within {REGISTRY_START_TIMEOUT_S:.0f} s; see {log}")
        yield settings, open_object_store(access, "mlflow"), relay
    finally:
        process.terminate()
        process.wait()


def run_stack(home: Path, relay_url: str | None = None) -> None:
    """Keep PostgreSQL, S3 and MLflow running until a signal; MLflow reaches S3 at the relay, if there is one."""
    configure_logging()
    (home / "logs").mkdir(exist_ok=True, mode=0o700)
    config = load_config(home)
    settings = Settings(_env_file=home / "env", home=home)
    services = {service.name: service for service in make_services(home, config, settings)}
    if relay_url is not None:
        settings = settings.model_copy(update={"s3_endpoint": relay_url})
        services["mlflow"] = next(
            service for service in make_services(home, config, settings) if service.name == "mlflow"
        )
    Keeper([services[name] for name in SERVICES], home, config.stack_id).run()


def make_transfer(settings: Settings, mode: Any, work: Path) -> ArtifactTransfer:
    account = (settings.mlflow_username, settings.mlflow_password.get_secret_value())
    return ArtifactTransfer(ArtifactServer(settings.mlflow_url, account), mode, work / "uploads")


def measure_pairs(
    settings: Settings, store: ObjectStore, folder: str, work: Path, num_bytes: int, num_pairs: int
) -> bool:
    """Compare both ways with boto3 on a file of random bytes."""
    content, sha256 = work / "content", write_random_file(work / "content", num_bytes)
    source = ArtifactSource("content", lambda: content.open("rb"), sha256)
    key = f"{folder}/content"
    all_ok = True

    def send(mode: str) -> None:
        transfer = make_transfer(settings, mode, work)
        transfer.upload(folder, source)
        transfer.forget_uploads([key])

    def fetch(mode: str) -> None:
        (work / "fetched").unlink(missing_ok=True)
        make_transfer(settings, mode, work).download(key, work / "fetched", num_bytes, sha256)

    def send_with_boto3() -> None:
        store.client.upload_file(str(content), store.bucket, "benchmark/boto3")

    def fetch_with_boto3() -> None:
        (work / "fetched-boto3").unlink(missing_ok=True)
        store.client.download_file(store.bucket, "benchmark/boto3", str(work / "fetched-boto3"))

    send("direct")  # what is fetched; also warms both sides
    send_with_boto3()
    for mode, pairs in (("direct", num_pairs), ("streamed", STREAMED_PAIRS)):
        comparisons: list[tuple[str, Callable[[str], None], Callable[[], None]]] = [
            ("up", send, send_with_boto3),
            ("down", fetch, fetch_with_boto3),
        ]
        for direction, ours, theirs in comparisons:
            speeds: dict[str, list[float]] = {"ours": [], "boto3": []}
            measure = functools.partial(measure_speed, num_bytes, speeds)
            run_ours = functools.partial(ours, mode)
            ratios = measure_ratios(
                functools.partial(measure, "ours", run_ours), functools.partial(measure, "boto3", theirs), pairs
            )
            goal = 0.7 if mode == "direct" else 0.0
            line = make_at_least_line(
                f"{num_bytes / GB:g} GB {direction}, {mode}",
                ratios,
                goal,
                figure=round(statistics.median(speeds["ours"])),
                unit="MB/s",
                peer="boto3",
            )
            all_ok &= print_lines(line)
    return all_ok


def write_random_file(file: Path, num_bytes: int) -> str:
    """Write random bytes and return their sha256."""
    digest, source = hashlib.sha256(), random.Random(0)
    with file.open("wb") as out:
        for start in range(0, num_bytes, RANDOM_BLOCK_BYTES):
            data = source.randbytes(min(RANDOM_BLOCK_BYTES, num_bytes - start))
            digest.update(data)
            out.write(data)
    return digest.hexdigest()


def measure_speed(num_bytes: int, speeds: dict[str, list[float]], name: str, run: Callable[[], None]) -> float:
    """Run a transfer; return its MB/s, and keep it among those of its name."""
    start = time.perf_counter()
    run()
    speeds[name].append(num_bytes / 1e6 / (time.perf_counter() - start))
    return speeds[name][-1]


def transfer_once(direction: str, home: Path, folder: str, file: Path, num_bytes: int) -> None:
    """Send or fetch a file in this process, which reports its peak memory in MiB."""
    settings = Settings(_env_file=home / "env", home=home)
    transfer = make_transfer(settings, "direct", file.parent)
    if direction == "up":
        transfer.upload(folder, ArtifactSource(file.name, lambda: file.open("rb")))
    else:
        transfer.download(f"{folder}/sparse", file, num_bytes, None)
    print(json.dumps({"peak_mib": read_peak_mib(os.getpid())}))


def measure_full(settings: Settings, relay: CountingRelay, folder: str, work: Path, num_bytes: int) -> bool:
    """Send and fetch a sparse file once, with a kill half way."""
    size = f"{num_bytes / GB:g} GB"
    sparse, fetched = work / "sparse", work / "fetched"
    write_sparse_file(sparse, num_bytes)
    record = make_transfer(settings, "direct", work).get_progress_file(f"{folder}/sparse")

    def count_sent() -> int:
        progress = UploadProgress.read(record)
        return 0 if progress is None else len(progress.parts) * progress.part_bytes

    def count_fetched() -> int:
        parts = work / ".fetched.parts"
        return 0 if not parts.exists() else (parts.read_text().count("\n") - 1) * ARTIFACT_PART_BYTES

    all_ok = True
    for direction, target, count_recorded, count_passed in (
        ("up", sparse, count_sent, lambda: relay.num_sent),
        ("down", fetched, count_fetched, lambda: relay.num_received),
    ):
        command = [sys.executable, __file__, "--transfer", direction, str(settings.home), folder, str(target)]
        transfer = cut_and_resume([*command, str(num_bytes)], settings, num_bytes, count_recorded, count_passed)
        all_ok &= print_lines(*describe_transfer(f"{size} {direction}", num_bytes, transfer))
    is_same = filecmp.cmp(sparse, fetched, shallow=False)
    return print_lines(make_line(f"{size}, same bytes", float(is_same), "1 if so", goal="1", ok=is_same)) and all_ok


def write_sparse_file(file: Path, num_bytes: int) -> None:
    """Write a file of holes, in which no two parts are the same by chance."""
    with file.open("wb") as out:
        out.truncate(num_bytes)
        for offset in range(0, num_bytes, GB):
            out.seek(offset)
            out.write(offset.to_bytes(8))


@dataclass(frozen=True)
class ResumedTransfer:
    """A transfer that was killed half way, and resumed.

    Attributes:
        seconds: of both together.
        num_recorded: bytes recorded before the kill.
        num_passed: bytes that passed the relay after the restart.
        peaks: peak resident memory in MiB, by process.
    """

    seconds: float
    num_recorded: int
    num_passed: int
    peaks: dict[str, float]


def cut_and_resume(
    command: list[str],
    settings: Settings,
    num_bytes: int,
    count_recorded: Callable[[], int],
    count_passed: Callable[[], int],
) -> ResumedTransfer:
    """Run a transfer in a process of its own, kill it half way, and run it again."""
    service_pids = list(find_stack_pids(load_config(settings.home).stack_id))
    for pid in service_pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # reset the peak, which a start has raised
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    poll_until(lambda: count_recorded() >= num_bytes // 2, timeout_s=1800, pause_s=0.05)
    peaks = {"this process": read_peak_mib(process.pid)}
    process.kill()
    process.wait()
    num_recorded, num_before = count_recorded(), count_passed()

    resumed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    peaks["this process"] = max(peaks["this process"], json.loads(resumed.stdout)["peak_mib"])
    for pid in service_pids:
        name = name_process(pid)
        peaks[name] = max(peaks.get(name, 0.0), read_peak_mib(pid))
    return ResumedTransfer(seconds, num_recorded, count_passed() - num_before, peaks)


def describe_transfer(title: str, num_bytes: int, transfer: ResumedTransfer) -> list[dict[str, Any]]:
    """Return the lines of a transfer."""
    limit = num_bytes - transfer.num_recorded + MAX_OVERHEAD_BYTES
    lines = [
        make_line(f"{title}, cut and resumed", round(num_bytes / 1e6 / transfer.seconds), "MB/s"),
        make_line(f"{title}, recorded before the kill", round(transfer.num_recorded / GB, 3), "GB"),
        make_line(
            f"{title}, passed after the restart",
            round(transfer.num_passed / GB, 3),
            "GB",
            goal=f"at most {limit / GB:.3f}",
            ok=transfer.num_passed <= limit,
        ),
    ]
    for name, peak in transfer.peaks.items():
        goal = None if name in UNLIMITED_PROCESSES else f"at most {MAX_RESIDENT_MIB}"
        ok = None if goal is None else peak <= MAX_RESIDENT_MIB
        lines.append(make_line(f"{title}, peak memory of {name}", round(peak), "MiB", goal=goal, ok=ok))
    return lines


def name_process(pid: int) -> str:
    """Return the service that a process belongs to, by its command line."""
    try:
        line = " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        line = ""
    return next((name for word, name in PROCESS_NAMES.items() if word in line), "other")


def read_peak_mib(pid: int) -> float:
    """Return the peak resident memory of a process, in MiB; 0 if it has exited."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


if __name__ == "__main__":
    sys.exit(main())
