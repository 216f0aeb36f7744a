"""The model server's lease: it comes after every run, shares a device only with a run that shares, and is reserved."""

import dataclasses

import pytest

from feedback import leases, serving_leases
from yuan.plan.pool import DeviceGroup, Pool

GROUP = DeviceGroup(device_class="A", count=2, memory_gib=8, sustained_tflops=1)
POOL = Pool(name="p", groups=(GROUP,), serving="yield")
OWN_POOL = dataclasses.replace(POOL, serving="own", serving_devices=("A/1",))


@pytest.fixture
def pool(session):
    leases.register_pool(session, POOL)
    return session


def take(session, *, count=1, shares=False):
    return serving_leases.take_serving_lease(
        session, "p", {"A": count}, team="t", holder="host:2:2", shares_devices=shares
    )


def request(session, *, count=1, shares=False, name="run"):
    lease = leases.request_lease(
        session, "p", {"A": count}, run_id=name, team="t", holder="host:1:1", shares_devices=shares
    )
    leases.grant_leases(session, "p")
    return lease


def test_server_takes_free_devices_and_no_run_is_granted_them(pool):
    serving = take(pool)
    assert serving.devices == ["A/0"] == serving_leases.find_serving_lease(pool).devices
    assert request(pool).devices == ["A/1"]
    waiting = request(pool)
    assert waiting.devices is None and serving_leases.find_leases_blocked_by(pool, serving) == [waiting]
    leases.release_lease(pool, serving.id, serving.generation, "given back")
    assert leases.grant_leases(pool, "p") == [waiting]


def test_server_gets_nothing_while_a_run_waits_or_all_is_in_use(pool):
    request(pool, count=1)
    large = request(pool, count=2)
    assert take(pool) is None and serving_leases.find_serving_lease(pool) is None
    assert large.devices is None and list(pool.scalars(leases.select_waiting_leases("p"))) == [large]


def test_run_that_waits_for_other_devices_too_does_not_end_the_service(pool):
    serving, first = take(pool), request(pool)
    both = request(pool, count=2)
    assert first.devices == ["A/1"] and serving_leases.find_leases_blocked_by(pool, serving) == []
    leases.release_lease(pool, first.id, first.generation, "done")
    assert serving_leases.find_leases_blocked_by(pool, serving) == [both]


@pytest.mark.parametrize("serving_shares", [True, False])
@pytest.mark.parametrize("run_shares", [True, False])
def test_one_device_is_shared_only_if_both_share_and_never_by_two_runs(pool, serving_shares, run_shares):
    serving = take(pool, count=2, shares=serving_shares)
    run = request(pool, count=2, shares=run_shares)
    assert (run.devices == serving.devices) is (serving_shares and run_shares)
    if run.devices:
        assert request(pool, shares=True).devices is None
        assert leases.list_devices(pool, "p")[0].run_id == "run and serving"
        leases.release_lease(pool, serving.id, serving.generation, "restart")
        assert take(pool, count=2, shares=False) is None


def test_reserved_devices_are_the_servers_alone(session):
    leases.register_pool(session, OWN_POOL)
    assert leases.count_working_devices(session, "p") == {"A": 1}
    assert request(session).devices == ["A/0"] and take(session).devices == ["A/1"]
    with pytest.raises(leases.NoCapacity, match=r"has .*'A': 1.* working devices"):
        request(session, count=2)
    leases.set_device_lost(session, "p", "A/1", "broken")
    with pytest.raises(leases.NoCapacity, match="A/1 is lost: broken"):
        take(session)


def test_devices_are_no_longer_reserved_when_the_pool_file_says_so(session):
    leases.register_pool(session, OWN_POOL)
    leases.register_pool(session, POOL)
    assert leases.count_working_devices(session, "p") == {"A": 2}


def test_last_release_and_holder_are_those_of_runs(pool):
    assert serving_leases.find_last_release(pool, "p") is serving_leases.find_newest_holder(pool, "p") is None
    serving = take(pool)
    leases.release_lease(pool, serving.id, serving.generation, "given back")
    assert serving_leases.find_last_release(pool, "p") is None
    run = request(pool, name="abc")
    assert serving_leases.find_newest_holder(pool, "p") == "abc"
    leases.release_lease(pool, run.id, run.generation, "done")
    assert serving_leases.find_last_release(pool, "p") is not None


def test_service_does_not_end_for_a_lease_that_another_one_keeps_from_its_device(pool):
    serving, first = take(pool), request(pool)
    request(pool, count=2, name="large")
    small = request(pool, count=1, name="small")
    assert first.devices and small.devices is None
    assert serving_leases.find_leases_blocked_by(pool, serving) == []


def test_run_that_could_share_takes_free_devices_first(session):
    leases.register_pool(session, dataclasses.replace(POOL, groups=(dataclasses.replace(GROUP, count=4),)))
    assert take(session, shares=True).devices == ["A/0"]
    assert request(session, count=2, shares=True).devices == ["A/1", "A/2"]
