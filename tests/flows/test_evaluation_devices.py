"""Evaluations on devices of the pool: the lease that they wait for, and what happens when it is taken away."""

import dataclasses
import json
import threading

import pytest
import torch

from feedback import leases
from feedback.tables import Lease
from flows.context import Context
from flows.round import evaluation_process
from flows.round.evaluation_devices import LeasedRunner, choose_evaluation_devices
from flows.round.evaluation_process import EvaluationFailed, EvaluationProcess
from flows.supervisor.lease_holder import hold_lease, make_job_name
from infra.database import make_session_factory
from infra.launchers.local import JOB_VARIABLE
from infra.processes import find_pids, kill_processes
from tests.waiting import wait_until
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.model.transformer import Yuan
from yuan.model.weights import save
from yuan.plan.pool import load_pool, make_cpu_pool
from yuan.recipe import DEFAULT_EVALUATION

POOL = make_cpu_pool()
DEVICE_CLASS = POOL.groups[0].device_class
EXACT = {"type": "exact", "value": "a"}


@pytest.fixture
def context(stores, engine, objects, tmp_path):
    return Context(stores.model_copy(update={"home": tmp_path, "pool": ""}), make_session_factory(engine), objects)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "model"
    tokenizer = tokenizers.train(["abcdefghij 0123456789"], vocab_size=512)
    config = ModelConfig(name="test", num_layers=1, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=512)
    torch.manual_seed(0)
    save(folder, config, Yuan(config).state_dict(), tokenizer, {})
    return folder


def make_lines(number, expected="a"):
    cases = [{"id": f"{n:04}", "prompt": f"a{n}", "expected": expected, "checker": EXACT} for n in range(number)]
    return {case["id"]: json.dumps(case).encode() for case in cases}


def find_leases(context, subject):
    with context.sessions() as session:
        return session.query(Lease).filter(Lease.run_id == subject).order_by(Lease.requested_at).all()


def test_evaluation_waits_for_devices_says_so_and_returns_them(context, model, tmp_path):
    (tmp_path / "eval").mkdir()
    results, nums_ahead, may_end = [], [], threading.Event()
    with context.sessions.begin() as session:
        leases.register_pool(session, POOL)

    def hold_devices():
        with hold_lease(context.sessions, POOL.name, {DEVICE_CLASS: 1}, run_id="training", team="t"):
            holding.set()
            may_end.wait(60)

    holding = threading.Event()
    other = threading.Thread(target=hold_devices)
    other.start()
    holding.wait(60)

    def report_waiting(num_ahead):
        nums_ahead.append(num_ahead)
        may_end.set()

    runner = LeasedRunner(context, "evaluation of v1", report_waiting=report_waiting)
    process = EvaluationProcess(runner, tmp_path / "eval", model, make_lines(5), DEFAULT_EVALUATION, results.extend)
    process.run()
    other.join()
    assert nums_ahead and len(results) == 5 and all(result.reason is None for result in results)
    (lease,) = find_leases(context, "evaluation of v1")
    assert len(lease.devices) == 2 and lease.released_at is not None and lease.end_reason == "done"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lease revoked", "process killed"])
def test_evaluation_resumes_after_a_fault_and_leaves_no_lease(context, model, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(evaluation_process, "EVAL_POLL_S", 0.1)
    (tmp_path / "eval").mkdir()
    results, subject, fault_done = [], f"evaluation with {fault}", False

    def store(new):
        nonlocal fault_done
        results.extend(new)
        if results and not fault_done:
            fault_done = True
            (lease,) = find_leases(context, subject)
            if fault == "process killed":
                kill_processes(JOB_VARIABLE, make_job_name(lease.id))
            else:
                with context.sessions.begin() as session:
                    leases.fence_silent_leases(session, exited_lease_ids=[lease.id])
                    leases.free_fenced_lease(session, session.get_one(Lease, lease.id))

    # So many that it takes longer than a heartbeat of the lease after the first results.
    lines = make_lines(1000, "abcdefghij" * 8)
    runner = LeasedRunner(context, subject, ttl_s=2.0)
    EvaluationProcess(runner, tmp_path / "eval", model, lines, DEFAULT_EVALUATION, store).run()
    assert sorted(result.case_id for result in results) == sorted(lines)
    held = find_leases(context, subject)
    assert fault_done and len(held) == 2 and all(lease.released_at is not None for lease in held)
    wait_until(lambda: not any(find_pids(JOB_VARIABLE, make_job_name(held[0].id))))


def test_evaluation_runs_on_one_device_of_the_class_with_most_memory(tmp_path):
    file = tmp_path / "pool.toml"
    groups = ('device_class = "A100-40"\ncount = 8', 'device_class = "A100-80"\ncount = 2')
    file.write_text('[[pool]]\nname = "mixed"\n' + "".join(f"[[pool.group]]\n{group}\n" for group in groups))
    devices = choose_evaluation_devices(load_pool(str(file)))
    assert (devices.device_class, devices.count) == ("A100-80", 1)
    devices.check_holds(60 * 2**30)
    with pytest.raises(EvaluationFailed, match=r"need 80.5 GiB on one device, .* A100-80, has 77.1; set COTRAIN_POOL"):
        devices.check_holds(70 * 2**30)


def test_evaluation_has_all_devices_of_the_default_pool():
    devices = choose_evaluation_devices(POOL)
    assert (devices.device_class, devices.count) == (DEVICE_CLASS, POOL.num_devices)
    assert dataclasses.replace(devices, count=1).memory_gib < 2.0
