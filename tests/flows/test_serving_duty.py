"""The dispatcher's duty for the model server's devices: each state in which lease, queue and server can be."""

import datetime
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import update
from sqlalchemy.orm import sessionmaker

from feedback import leases, serving_leases
from feedback.tables import Lease
from flows.context import DispatcherContext
from flows.dispatcher import serving_devices
from flows.dispatcher.serving_devices import MAX_RETRY_AFTER_S, ServingDevices, ServingProblem, describe_lender
from flows.supervisor import reaper
from infra.launchers.local import LocalLauncher
from infra.processes import get_own_identity
from tests.serving import serve_app
from yuan.config import tiny, yuan_2b, yuan_51b, yuan_102b
from yuan.generate.cache_slots import CacheBudget
from yuan.plan.generation_stages import GenerationModel, NoGenerationDevices
from yuan.plan.memory_model import GIB
from yuan.plan.pool_file import load_pool
from yuan.serve.api import make_api
from yuan.serve.device_holder import DeviceHolder
from yuan.serve.grants import DeviceGrant
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.service import ModelService
from yuan.train.run_status import RunStatus

GROUP = """[[pool]]
name = "d"
serving = "{serving}"
{more}
[[pool.group]]
device_class = "A100-80"
count = {count}
"""


class Server:
    """A model server without a model, which gets a new holder where the real one executes itself again."""

    def __init__(self):
        self.identity, self.restarts = get_own_identity(), []
        self.start(DeviceGrant())

    def start(self, grant):
        service = ModelService(ModelServerMetrics(), CacheBudget(grant.cache_bytes or None))
        self.service = service
        self.holder = DeviceHolder(service, self.identity, grant, self.restarts.append)

    def settle(self):
        """Do what the real process does within seconds."""
        self.holder.poll()
        if self.restarts:
            self.start(self.restarts.pop())

    def read_state(self):
        return self.holder.read_state()

    def apply(self, grant):
        return self.holder.apply(grant)


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def make_duty(stores, session, objects, server, tmp_path, monkeypatch):
    """Return a function that starts the duty on a pool, with a champion of a configuration."""
    monkeypatch.setattr(serving_devices, "RETAKE_AFTER_S", 0.0)
    token = stores.model_server_token.get_secret_value()
    with serve_app(make_api(token, ModelService(ModelServerMetrics()), server)) as url:

        def make(serving, *, model=None, count=1, more=""):
            pool = tmp_path / "pool.toml"
            pool.write_text(GROUP.format(serving=serving, count=count, more=more))
            settings = stores.model_copy(update={"pool": str(pool), "model_server_url": url})
            sessions = sessionmaker(
                session.connection(), join_transaction_mode="create_savepoint", expire_on_commit=False
            )
            duty = ServingDevices(DispatcherContext(settings, sessions, objects))
            config = model or tiny()
            monkeypatch.setattr(
                duty,
                "_choose_devices",
                lambda session, pool: serving_devices.choose_serving_devices(pool, GenerationModel(config)),
            )
            return duty

        yield make


def advance(duty, server, times=3):
    for _ in range(times):
        duty.advance()
        server.settle()


def request(session, name="run", shares=False, count=1):
    return leases.request_lease(
        session,
        "d",
        {"A100-80": count},
        run_id=name,
        team="t",
        holder=get_own_identity(),
        shares_devices=shares,
    )


def test_server_gets_a_lease_yields_it_to_a_run_and_takes_it_back(make_duty, server, session):
    duty = make_duty("yield")
    advance(duty, server)
    serving = serving_leases.find_serving_lease(session)
    assert server.read_state().lease_id == serving.id and serving.devices == ["A100-80/0"] and not duty.is_lent

    run = request(session)
    advance(duty, server)
    session.refresh(run)
    assert run.devices == ["A100-80/0"] and serving_leases.find_serving_lease(session) is None and duty.is_lent
    assert server.read_state().state == "waiting"

    leases.release_lease(session, run.id, run.generation, "done")
    advance(duty, server)
    assert server.read_state().state == "serving" and not duty.is_lent


def test_server_shares_with_a_run_that_leaves_room_and_yields_to_one_that_does_not(make_duty, server, session):
    duty = make_duty("auto")
    advance(duty, server)
    first = server.read_state().lease_id
    sharing = request(session, shares=True)
    leases.grant_leases(session, "d")
    advance(duty, server)
    assert sharing.devices == ["A100-80/0"] and server.read_state().lease_id == first

    leases.release_lease(session, sharing.id, sharing.generation, "done")
    alone = request(session)
    advance(duty, server)
    session.refresh(alone)
    assert alone.devices and server.read_state().lease_id is None


def test_own_devices_stay_with_the_server_while_runs_wait(make_duty, server, session):
    duty = make_duty("own", count=2, more='serving_devices = ["A100-80/1"]')
    advance(duty, server)
    request(session), request(session)
    leases.grant_leases(session, "d")
    advance(duty, server)
    assert server.read_state().state == "serving"
    assert serving_leases.find_serving_lease(session).devices == ["A100-80/1"]


def test_lost_device_is_returned_and_without_another_one_the_duty_fails_and_callers_get_the_reason(
    make_duty, server, session
):
    duty = make_duty("yield", count=2)
    advance(duty, server)
    leases.set_device_lost(session, "d", "A100-80/0", "Xid 79")
    advance(duty, server)
    assert serving_leases.find_serving_lease(session).devices == ["A100-80/1"]
    leases.set_device_lost(session, "d", "A100-80/1", "Xid 79")
    duty.advance()
    server.settle()
    duty.advance()
    with pytest.raises(ServingProblem, match=r"working devices.*A100-80/1 is lost: Xid 79"):
        advance(duty, server)
    assert serving_leases.find_serving_lease(session) is None and duty.is_lent


def test_champion_that_fits_nowhere_is_a_problem_of_the_duty(make_duty, server, session):
    duty = make_duty("yield", model=yuan_102b())
    with pytest.raises(ServingProblem, match=r"need 2\d\d.\d GiB, and a node of pool 'd' has 1 A100-80 of 77.1 GiB"):
        duty.advance()
    assert serving_leases.find_serving_lease(session) is None


def test_former_version_stays_in_service_if_the_next_champion_fits_nowhere(make_duty, server, session, monkeypatch):
    duty = make_duty("yield")
    advance(duty, server)
    lease_id = server.read_state().lease_id
    choose = serving_devices.choose_serving_devices
    monkeypatch.setattr(duty, "_choose_devices", lambda session, pool: choose(pool, GenerationModel(yuan_102b())))
    for _ in range(3):
        with pytest.raises(ServingProblem, match="a node of pool 'd' has 1 A100-80"):
            duty.advance()
        server.settle()
    assert server.read_state().lease_id == lease_id and not duty.is_lent


@pytest.mark.parametrize(
    ("serving", "model", "holds_two"),
    [("yield", yuan_2b(), True), ("yield", yuan_51b(), False), ("share", tiny(), None)],
)
def test_cache_leaves_room_for_the_next_champion_where_it_is_small(tmp_path, serving, model, holds_two):
    pool = tmp_path / "pool.toml"
    pool.write_text(GROUP.format(serving=serving, count=8, more="serving_gib = 3.0"))
    pool = load_pool(str(pool))
    devices = serving_devices.choose_serving_devices(pool, GenerationModel(model))
    cache_bytes = serving_devices.choose_cache_bytes(pool, devices)
    if holds_two is None:
        assert cache_bytes == 3 * GIB
    else:
        room_bytes = devices.count * (pool.groups[0].memory_gib - pool.groups[0].reserve_gib) * GIB
        assert (cache_bytes + 2 * 1.05 * devices.weight_bytes <= room_bytes) is holds_two


def test_champion_that_needs_more_than_the_own_devices_is_refused(tmp_path):
    pool = tmp_path / "pool.toml"
    pool.write_text(GROUP.format(serving="own", count=8, more='serving_devices = ["A100-80/1"]'))
    with pytest.raises(NoGenerationDevices, match=r"needs 3 devices of class A100-80, and serving has 1 of its own"):
        serving_devices.choose_serving_devices(load_pool(str(pool)), GenerationModel(yuan_102b()))


def test_larger_champion_gets_more_devices(make_duty, server, session, monkeypatch):
    duty = make_duty("yield", count=4, model=yuan_2b())
    advance(duty, server)
    assert len(serving_leases.find_serving_lease(session).devices) == 1
    choose = serving_devices.choose_serving_devices
    monkeypatch.setattr(duty, "_choose_devices", lambda session, pool: choose(pool, GenerationModel(yuan_102b())))
    advance(duty, server, times=4)
    assert len(serving_leases.find_serving_lease(session).devices) == 3
    assert len(server.holder.read_state().lease_id) > 0


def test_lease_of_a_server_that_was_started_again_is_released(make_duty, server, session):
    duty = make_duty("yield")
    advance(duty, server)
    first = serving_leases.find_serving_lease(session)
    # The identity of a process that has exited.
    session.execute(update(Lease).where(Lease.id == first.id).values(holder=get_own_identity()[:-1] + "x"))
    server.start(DeviceGrant())
    advance(duty, server)
    second = serving_leases.find_serving_lease(session)
    assert second.id != first.id and server.read_state().lease_id == second.id
    assert session.get_one(Lease, first.id, populate_existing=True).end_reason == "the model server exited"


def test_lease_of_another_process_that_runs_is_not_released(make_duty, server, session):
    duty = make_duty("yield")
    advance(duty, server)
    lease = serving_leases.find_serving_lease(session)
    with subprocess.Popen(["sleep", "60"]) as other:
        identity = get_own_identity().replace(f":{os.getpid()}:", f":{other.pid}:")
        start_tick = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        holder = f"{identity.rpartition(':')[0]}:{start_tick}"
        session.execute(update(Lease).where(Lease.id == lease.id).values(holder=holder))
        server.start(DeviceGrant())
        advance(duty, server)
        assert session.get_one(Lease, lease.id, populate_existing=True).released_at is None
        assert server.read_state().lease_id is None
        other.kill()


def change_pool(folder, **fields):
    file = folder / "pool.toml"
    file.write_text(GROUP.format(**{"serving": "yield", "count": 1, "more": "", **fields}))
    return file


def test_pool_that_no_longer_gives_devices_ends_the_lease_and_says_what_to_do(make_duty, server, session, tmp_path):
    duty = make_duty("yield")
    advance(duty, server)
    change_pool(tmp_path, serving="host")
    run = request(session)
    advance(duty, server, times=2)
    session.refresh(run)
    assert serving_leases.find_serving_lease(session) is None and run.devices == ["A100-80/0"]
    with pytest.raises(ServingProblem, match=r"run `cotrain down` and `cotrain up`"):
        duty.advance()


def test_pool_with_a_new_name_ends_the_lease_of_the_former_and_waits_for_its_runs(make_duty, server, session, tmp_path):
    duty = make_duty("yield", count=2)
    advance(duty, server)
    run = request(session)
    leases.grant_leases(session, "d")
    assert run.devices and serving_leases.find_serving_lease(session).pool == "d"
    file = change_pool(tmp_path, count=2)
    file.write_text(file.read_text().replace('"d"', '"e"'))
    advance(duty, server, times=4)
    assert serving_leases.find_serving_lease(session) is None and duty.is_lent
    leases.release_lease(session, run.id, run.generation, "done")
    advance(duty, server)
    assert serving_leases.find_serving_lease(session).pool == "e"


def test_dead_holder_of_a_former_pool_is_reaped_and_serving_continues(make_duty, server, session, tmp_path):
    """The stack was down while the pool got another name, so that nothing of the former one runs."""
    duty = make_duty("yield")
    advance(duty, server)
    lease = serving_leases.find_serving_lease(session)
    session.execute(update(Lease).where(Lease.id == lease.id).values(holder=get_own_identity()[:-1] + "x"))
    server.start(DeviceGrant())
    file = change_pool(tmp_path)
    file.write_text(file.read_text().replace('"d"', '"e"'))
    sessions = sessionmaker(session.connection(), join_transaction_mode="create_savepoint", expire_on_commit=False)
    assert reaper.reap_dead_leases(sessions, {"e": LocalLauncher()}) == [lease.id]
    session.expire_all()
    advance(duty, server)
    assert serving_leases.find_serving_lease(session).pool == "e" and not duty.is_lent


def test_lease_whose_processes_do_not_end_is_named_to_operators(make_duty, server, session, monkeypatch):
    """This test's own process holds the lease, and no launcher can end its job."""
    advance(make_duty("yield"), server)
    lease = serving_leases.find_serving_lease(session)
    sessions = sessionmaker(session.connection(), join_transaction_mode="create_savepoint", expire_on_commit=False)
    launcher = SimpleNamespace(end=lambda name, timeout_s: False)
    monkeypatch.setattr(reaper, "FENCED_TIMEOUT_S", 3600.0)
    leases.fence_silent_leases(session, exited_lease_ids=[lease.id])
    reaper.reclaim_leases(sessions, {"d": launcher})
    monkeypatch.setattr(reaper, "FENCED_TIMEOUT_S", -1.0)
    with pytest.raises(reaper.ProcessesRemain, match=f"{lease.id[:8]} of serving on A100-80/0 of pool d"):
        reaper.reclaim_leases(sessions, {"d": launcher})
    reaper.reclaim_leases(sessions, {"d": SimpleNamespace(end=lambda name, timeout_s: True)})


def test_own_device_that_leaves_the_file_is_not_waited_for(make_duty, server, session, tmp_path):
    duty = make_duty("own", count=8, more='serving_devices = ["A100-80/7"]')
    advance(duty, server)
    change_pool(tmp_path, count=7)
    advance(duty, server, times=4)
    assert serving_leases.find_serving_lease(session).devices == ["A100-80/0"]


def test_own_devices_are_granted_again_while_runs_wait_for_others(make_duty, server, session):
    duty = make_duty("own", count=2, more='serving_devices = ["A100-80/1"]')
    duty.advance()
    held = request(session)
    request(session)
    leases.grant_leases(session, "d")
    assert held.devices == ["A100-80/0"]
    advance(duty, server)
    lease = serving_leases.find_serving_lease(session)
    leases.release_lease(session, lease.id, lease.generation, "the model server exited")
    server.start(DeviceGrant())
    advance(duty, server)
    assert serving_leases.find_serving_lease(session).devices == ["A100-80/1"]


def test_faults_of_others_do_not_end_the_service(make_duty, server, session, tmp_path, monkeypatch):
    duty = make_duty("yield")
    advance(duty, server)
    lease = serving_leases.find_serving_lease(session)

    def keeps_lease(message):
        long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
        session.execute(update(Lease).where(Lease.id == lease.id).values(heartbeat_at=long_ago))
        with pytest.raises((ServingProblem, ValueError), match=message):
            duty.advance()
        server.settle()
        session.refresh(lease)
        return lease.heartbeat_at > long_ago and server.read_state().lease_id == lease.id

    def find_no_model(session, versions):
        raise ValueError("config.json is damaged")

    monkeypatch.undo()  # of the fixture's choice of devices
    with monkeypatch.context() as patch:
        patch.setattr(serving_devices, "find_champion_model", find_no_model)
        assert keeps_lease("model folder cannot be read: config.json is damaged")
    (tmp_path / "pool.toml").write_text("[[pool]")
    assert keeps_lease("pool.toml")


def test_pool_is_registered_again_after_an_error_in_the_same_pass(make_duty, server, session, monkeypatch):
    duty = make_duty("yield")
    with monkeypatch.context() as patch:
        patch.setattr(duty, "_choose_devices", lambda session, pool: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            duty.advance()
    advance(duty, server)
    assert server.read_state().state == "serving"


def test_other_own_devices_in_the_file_are_taken_and_the_former_ones_given_back(make_duty, server, session, tmp_path):
    duty = make_duty("own", count=3, more='serving_devices = ["A100-80/2"]')
    advance(duty, server)
    assert serving_leases.find_serving_lease(session).devices == ["A100-80/2"]
    change_pool(tmp_path, serving="own", count=3, more='serving_devices = ["A100-80/1"]')
    advance(duty, server, times=4)
    assert serving_leases.find_serving_lease(session).devices == ["A100-80/1"]


def test_lost_device_of_a_pool_with_another_name_now_is_marked_there(make_duty, server, session, tmp_path):
    duty = make_duty("yield")
    advance(duty, server)
    file = change_pool(tmp_path, count=1)
    file.write_text(file.read_text().replace('"d"', '"e"'))
    server.service.problem = "CUDA error: device is lost"
    with pytest.raises(ServingProblem, match="device is lost"):
        duty.advance()
    is_lost = {pool: bool(leases.find_lost_devices(session, pool, ["A100-80/0"])) for pool in ("d", "e")}
    assert is_lost == {"d": True, "e": False}


def test_smaller_budget_in_the_file_reaches_the_server_that_serves(make_duty, server, tmp_path):
    duty = make_duty("share", model=yuan_2b(), more="serving_gib = 20.0")
    advance(duty, server)
    assert server.read_state().cache_bytes == 20 * GIB
    change_pool(tmp_path, serving="share", more="serving_gib = 4.0")
    duty.advance()
    assert server.read_state().cache_bytes == 4 * GIB and server.read_state().state == "serving"


def test_device_that_the_server_does_not_see_is_taken_out_of_use_and_another_one_serves(make_duty, server, session):
    duty = make_duty("yield", count=2)
    advance(duty, server)
    assert serving_leases.find_serving_lease(session).devices == ["A100-80/0"]
    server.service.problem = "this process must compute on 1 accelerators and sees 0"
    with pytest.raises(ServingProblem, match="sees 0"):
        duty.advance()
    server.settle()
    advance(duty, server, times=4)
    assert serving_leases.find_serving_lease(session).devices == ["A100-80/1"]
    assert "sees 0" in leases.find_lost_devices(session, "d", ["A100-80/0"])["A100-80/0"]


def test_remaining_time_that_a_rank_reports_is_bounded():
    status = {"step": 1, "max_steps": 2, "eta_s": 1e300}
    assert RunStatus.from_json(status).eta_s is None
    assert describe_lender("run", 3.0e8).retry_after_s == MAX_RETRY_AFTER_S


def test_server_with_a_grant_of_a_released_lease_returns_it_first(make_duty, server, session):
    duty = make_duty("yield")
    advance(duty, server)
    lease = serving_leases.find_serving_lease(session)
    leases.release_lease(session, lease.id, lease.generation, "taken away")
    run = request(session)
    leases.grant_leases(session, "d")
    duty.advance()
    assert server.read_state().state == "yielding" and run.devices
    advance(duty, server)
    assert server.read_state().lease_id is None


def test_no_lease_right_after_a_run_since_its_evaluation_follows(make_duty, server, session, monkeypatch):
    duty = make_duty("yield")
    duty.advance()
    server.settle()
    monkeypatch.setattr(serving_devices, "RETAKE_AFTER_S", 60.0)
    run = request(session)
    advance(duty, server)
    session.refresh(run)
    leases.release_lease(session, run.id, run.generation, "done")
    advance(duty, server)
    assert server.read_state().lease_id is None


def test_refusal_names_the_borrower_of_the_device_and_the_expected_time():
    grant = describe_lender("0123abc", 1800.0)
    until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=1800)
    assert "lent to training until about" in grant.message and f"{until:%H}:" in grant.message
    assert grant.retry_after_s == 1800 and describe_lender("0123abc", 1e6).retry_after_s == 3600
    assert "the evaluation of v3" in describe_lender("evaluation of v3", None).message
