"""Evaluations on devices of the pool: the lease that they wait for, and what happens when it is taken away."""

import contextlib
import dataclasses
import json
import threading
from types import SimpleNamespace

import pytest
import torch

from feedback import leases
from feedback.tables import Lease
from flows.context import Context
from flows.round import evaluation_process
from flows.round.evaluation_devices import EvaluationDevices, LeasedRunner, choose_evaluation_devices
from flows.round.evaluation_process import EvaluationFailed, EvaluationProcess
from flows.supervisor.lease_holder import hold_lease
from infra.database import make_session_factory
from infra.launchers.job import JobExit, make_job_name
from infra.launchers.local import JOB_VARIABLE
from infra.processes import find_pids, kill_processes
from tests.waiting import wait_until
from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, ModelConfig, yuan_2b, yuan_51b, yuan_102b
from yuan.device_faults import DEVICE_LOST_STATUS, OUT_OF_MEMORY_STATUS
from yuan.eval.results import DEVICE_FAULT_FILE, READY_FILE
from yuan.model.transformer import Yuan
from yuan.model.weights import save
from yuan.plan.generation_stages import GenerationModel
from yuan.plan.pool import make_cpu_pool
from yuan.plan.pool_file import load_pool, parse_pool
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


def test_device_that_the_process_does_not_see_is_taken_out_of_use_and_no_processor_answers(context, model, tmp_path):
    (tmp_path / "eval").mkdir()
    file = tmp_path / "pool.toml"
    file.write_text('[[pool]]\nname = "absent"\nserving = "host"\n[[pool.group]]\ndevice_class = "L40S"\ncount = 1\n')
    context = dataclasses.replace(context, settings=context.settings.model_copy(update={"pool": str(file)}))
    results, subject = [], "evaluation on an absent device"
    runner = LeasedRunner(context, subject)
    process = EvaluationProcess(runner, tmp_path / "eval", model, make_lines(3), DEFAULT_EVALUATION, results.extend)
    with pytest.raises(leases.NoCapacity, match=r"L40S/0 is lost: .*1 accelerators and sees 0"):
        process.run()
    (lease,) = find_leases(context, subject)
    assert not results and lease.released_at is not None


class BrokenRunner:
    """Run no process: each one ends with the same status, after it is ready."""

    def __init__(self, job_exit):
        self.job_exit = job_exit

    @contextlib.contextmanager
    def run(self, folder, model):
        (folder / READY_FILE).touch()
        yield self

    def wait(self, seconds):
        return self.job_exit


def test_device_lost_among_several_is_no_fault_of_the_cases(model, tmp_path):
    results = []
    runner = BrokenRunner(JobExit(status=DEVICE_LOST_STATUS, message="on A100-80/0, A100-80/1: device is lost"))
    process = EvaluationProcess(runner, tmp_path, model, make_lines(3), DEFAULT_EVALUATION, results.extend)
    with pytest.raises(EvaluationFailed, match=r"3 times, on A100-80/0, A100-80/1: device .*cotrain pool lose"):
        process.run()
    assert not results


@pytest.mark.parametrize(("shares", "cause"), [(True, "preempted"), (False, None)])
def test_evaluation_without_memory_beside_the_server_gets_devices_alone(context, tmp_path, shares, cause):
    (tmp_path / DEVICE_FAULT_FILE).write_text("CUDA out of memory")
    runner = LeasedRunner(context, "evaluation")
    lease = SimpleNamespace(devices=["L40S/0"])
    devices = EvaluationDevices("L40S", 1, 2**30 if shares else None)
    job_exit = runner.explain_exit(OUT_OF_MEMORY_STATUS, tmp_path, lease, devices)
    assert job_exit.cause == cause and "on L40S/0: CUDA out of memory" in job_exit.message
    assert runner.lacked_memory is shares
    assert runner.explain_exit(1, tmp_path, lease, devices) is None


@pytest.fixture
def folder_of_51b(tmp_path):
    folder = tmp_path / "51b"
    folder.mkdir()
    (folder / MODEL_CONFIG_FILE).write_text(json.dumps(yuan_51b().to_json()))
    return folder


def test_evaluation_runs_on_the_fewest_devices_of_the_class_with_most_memory(tmp_path, folder_of_51b):
    file = tmp_path / "pool.toml"
    groups = ('device_class = "A100-40"\ncount = 8', 'device_class = "A100-80"\ncount = 2')
    file.write_text('[[pool]]\nname = "mixed"\n' + "".join(f"[[pool.group]]\n{group}\n" for group in groups))
    pool = load_pool(str(file))
    assert choose_evaluation_devices(pool, folder_of_51b) == EvaluationDevices("A100-80", 2)
    small_pool = dataclasses.replace(pool, groups=(dataclasses.replace(pool.groups[1], count=1),))
    with pytest.raises(
        EvaluationFailed, match=r"need 10\d.\d GiB, and a node of pool 'mixed' has 1 A100-80 of 77.1 GiB"
    ):
        choose_evaluation_devices(small_pool, folder_of_51b)


def test_evaluation_shares_a_device_with_the_model_server_if_both_fit(model, folder_of_51b):
    group = {"device_class": "H100-80", "count": 2}
    shared = parse_pool({"name": "p", "group": [group], "serving": "share"})
    devices = choose_evaluation_devices(shared, model)
    assert (devices.device_class, devices.count, devices.shares, devices.num_accelerators) == ("H100-80", 1, True, 1)
    assert choose_evaluation_devices(shared, folder_of_51b) == EvaluationDevices("H100-80", 2)
    champion = GenerationModel(yuan_2b())
    beside = choose_evaluation_devices(shared, model, champion)
    assert beside.shares and devices.max_cache_bytes - beside.max_cache_bytes > 2 * yuan_2b().num_parameters
    assert not choose_evaluation_devices(shared, model, GenerationModel(yuan_102b())).shares
    for fields in ({"serving": "yield"}, {"serving": "own", "serving_devices": ["H100-80/0"]}):
        assert not choose_evaluation_devices(parse_pool({"name": "p", "group": [group], **fields}), model).shares


def test_evaluation_has_all_devices_of_the_default_pool(model):
    assert choose_evaluation_devices(POOL, model) == EvaluationDevices(DEVICE_CLASS, POOL.num_devices)


def test_evaluation_of_a_folder_without_configuration_says_so(tmp_path):
    with pytest.raises(EvaluationFailed, match=r"config\.json"):
        choose_evaluation_devices(parse_pool({"name": "p", "group": [{"device_class": "H200", "count": 1}]}), tmp_path)
