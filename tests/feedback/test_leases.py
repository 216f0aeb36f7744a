"""Leases: gang scheduling without starvation, and fencing of holders whose heartbeats have stopped."""

import dataclasses
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from feedback import leases
from feedback.accounts import NotFound
from feedback.tables import Lease
from yuan.plan.pool import DeviceGroup, Pool

POOL = Pool(
    name="p",
    groups=(
        DeviceGroup(device_class="A", count=6, memory_gib=8, sustained_tflops=1, devices_per_node=4),
        DeviceGroup(device_class="B", count=2, memory_gib=8, sustained_tflops=1),
    ),
)


@pytest.fixture
def queue(session):
    leases.register_pool(session, POOL)
    return session


def request_lease(session, name="run", priority=0, waited_s=0.0, **devices):
    lease = leases.request_lease(session, "p", devices, run_id=name, team="t", holder="host:1:1", priority=priority)
    lease.requested_at -= timedelta(seconds=waited_s)
    session.flush()
    return lease


def stop_heartbeat(session, lease, seconds):
    session.execute(
        update(Lease)
        .where(Lease.id == lease.id)
        .values(heartbeat_at=func.now() - timedelta(seconds=seconds), ttl_s=0.0)
    )


def test_a_gang_gets_all_or_nothing(queue):
    first, second = request_lease(queue, A=4), request_lease(queue, A=4)
    assert leases.grant_leases(queue, "p") == [first]
    assert len(first.devices) == 4 and second.devices is None
    leases.release_lease(queue, first.id, first.generation, "done")
    assert leases.grant_leases(queue, "p") == [second]


def test_gang_is_placed_on_one_node_if_it_fits(queue):
    lone = request_lease(queue, A=1)
    leases.grant_leases(queue, "p")
    assert lone.devices == ["A/4"]  # from the node with two devices, so that the other node can still serve four
    four = request_lease(queue, A=4)
    leases.grant_leases(queue, "p")
    assert four.devices == ["A/0", "A/1", "A/2", "A/3"]


def test_queue_order_depends_on_priority_and_waiting_time(queue):
    holder = request_lease(queue, A=6)
    leases.grant_leases(queue, "p")
    low, high = request_lease(queue, A=6), request_lease(queue, A=6, priority=2)
    assert list(queue.scalars(leases.select_waiting_leases("p"))) == [high, low]
    patient = request_lease(queue, A=6, priority=-1, waited_s=4 * leases.WAIT_S_PER_PRIORITY_POINT)
    assert list(queue.scalars(leases.select_waiting_leases("p"))) == [patient, high, low]
    leases.release_lease(queue, holder.id, holder.generation, "done")
    assert leases.grant_leases(queue, "p") == [patient]


def test_small_requests_cannot_starve_a_large_one(queue):
    small = request_lease(queue, A=1)
    leases.grant_leases(queue, "p")
    large, later, other_class = request_lease(queue, A=6), request_lease(queue, A=1), request_lease(queue, B=2)
    assert leases.grant_leases(queue, "p") == [other_class]
    leases.release_lease(queue, small.id, small.generation, "done")
    assert leases.grant_leases(queue, "p") == [large] and later.devices is None


def test_request_beyond_the_working_devices_is_refused_with_their_number(queue):
    leases.set_device_lost(queue, "p", "A/2", "Xid 79")
    with pytest.raises(leases.NoCapacity, match=r"'A': 5.*A/2 is lost: Xid 79"):
        request_lease(queue, A=6)
    leases.set_device_lost(queue, "p", "A/2", None)
    assert request_lease(queue, A=6)


@pytest.mark.parametrize(
    ("pool", "devices", "priority", "error"),
    [
        ("q", {"A": 1}, 0, NotFound),
        ("p", {"C": 1}, 0, leases.NoCapacity),
        ("p", {}, 0, ValueError),
        ("p", {"A": 0}, 0, ValueError),
        ("p", {"A": 1}, 101, ValueError),
    ],
)
def test_invalid_requests_are_refused(queue, pool, devices, priority, error):
    with pytest.raises(error):
        leases.request_lease(queue, pool, devices, run_id="r", team="t", holder="h:1:1", priority=priority)


def test_unknown_pools_and_devices_are_refused_with_the_known_ones(queue):
    with pytest.raises(NotFound, match=r"there is no pool 'q'; use one of the registered pools: .*\bp\b"):
        leases.list_devices(queue, "q")
    with pytest.raises(NotFound, match="pool 'p' has no device 'A/9'; use one that `cotrain pool show` lists"):
        leases.set_device_lost(queue, "p", "A/9", "Xid 79")


def test_lease_without_heartbeats_is_fenced_and_its_devices_wait_for_process_exit(queue):
    silent, active = request_lease(queue, A=4), request_lease(queue, A=2)
    leases.grant_leases(queue, "p")
    stop_heartbeat(queue, silent, 1000)
    assert leases.fence_silent_leases(queue) == [silent]
    with pytest.raises(leases.LeaseLost, match="end the processes that run under it"):
        leases.record_lease_heartbeat(queue, silent.id, 1)
    leases.record_lease_heartbeat(queue, active.id, 1)
    waiting = request_lease(queue, A=1)
    assert leases.grant_leases(queue, "p") == []  # not before the processes have exited
    leases.release_lease(queue, silent.id, 1, "too late")
    assert leases.grant_leases(queue, "p") == []
    assert leases.fence_silent_leases(queue) == [silent] and silent.generation == 2
    leases.free_fenced_lease(queue, silent)
    assert leases.grant_leases(queue, "p") == [waiting]
    assert leases.fence_silent_leases(queue) == []


def test_fenced_lease_is_removed_from_the_queue(queue):
    silent, active = request_lease(queue, A=6), request_lease(queue, A=1)
    stop_heartbeat(queue, silent, 1000)
    assert leases.fence_silent_leases(queue) == [silent]
    assert leases.grant_leases(queue, "p") == [active]


def test_lease_without_heartbeats_is_not_fenced_if_its_process_is_running(queue):
    lease = request_lease(queue, A=1)
    stop_heartbeat(queue, lease, 1000)
    assert leases.fence_silent_leases(queue, running_lease_ids=[lease.id]) == []
    assert leases.fence_silent_leases(queue, exited_lease_ids=[lease.id]) == [lease]
    # Its devices are being reclaimed already.
    assert leases.fence_silent_leases(queue, running_lease_ids=[lease.id]) == [lease]


def test_database_downtime_does_not_count_toward_the_lease_ttl(queue):
    lease = request_lease(queue, A=1)
    leases.grant_leases(queue, "p")
    queue.execute(update(Lease).values(heartbeat_at=func.now() - timedelta(days=2), ttl_s=86_400.0))
    up_s = queue.scalar(select(func.extract("epoch", func.now() - func.pg_postmaster_start_time())))
    assert up_s < 86_400 and leases.fence_silent_leases(queue) == []
    leases.record_lease_heartbeat(queue, lease.id, 1)


def test_devices_of_a_batch_system_node_are_lost_and_restored_together(queue):
    leases.set_device_lost(queue, "p", "A/3", "hot")
    assert leases.set_device_lost(queue, "p", "A/1", "Xid 79", host="gpu-7") == ["A/0", "A/1", "A/2"]
    assert leases.count_working_devices(queue, "p")["A"] == 2 and leases.find_lost_hosts(queue, "p") == ["gpu-7"]
    assert (
        leases.set_device_lost(queue, "p", "A/5", "Xid 79", host="gpu-7") == []
    )  # reported by a job that was queued before
    leases.set_device_lost(queue, "p", "A/1", "burned")
    assert leases.find_lost_hosts(queue, "p") == ["gpu-7"]
    assert leases.set_device_lost(queue, "p", "A/0", None) == ["A/0", "A/1", "A/2"]
    assert leases.count_working_devices(queue, "p")["A"] == 5 and leases.find_lost_hosts(queue, "p") == []


def test_host_is_not_excluded_after_its_devices_are_removed_from_the_pool_file(queue):
    leases.set_device_lost(queue, "p", "B/1", "Xid 79", host="gpu-9")
    leases.register_pool(queue, dataclasses.replace(POOL, groups=POOL.groups[:1]))
    assert leases.find_lost_hosts(queue, "p") == []


def test_lost_host_must_have_a_valid_host_name(queue):
    with pytest.raises(ValueError, match="a host name has letters"):
        leases.set_device_lost(queue, "p", "A/1", "hot", host="gpu-7,gpu-8")


def test_device_removed_from_the_pool_file_is_reported_as_lost(queue):
    lease = request_lease(queue, B=2)
    leases.grant_leases(queue, "p")
    smaller = Pool(
        name="p", groups=(POOL.groups[0], DeviceGroup(device_class="B", count=1, memory_gib=8, sustained_tflops=1))
    )
    leases.register_pool(queue, smaller)
    assert leases.find_lost_devices(queue, "p", lease.devices) == {"B/1": "no longer in the pool's file"}
    leases.register_pool(queue, POOL)
    assert leases.find_lost_devices(queue, "p", lease.devices) == {}
    leases.set_device_lost(queue, "p", "B/0", "hot")
    leases.register_pool(queue, POOL)
    assert leases.find_lost_devices(queue, "p", lease.devices) == {
        "B/0": "hot"
    }  # only an operator returns it to the pool


def test_hours_add_up_by_run_and_team(queue):
    for name, count, hours in (("a", 4, 1.0), ("a", 2, 0.5), ("b", 1, 2.0)):
        lease = request_lease(queue, name, A=count)
        leases.grant_leases(queue, "p")
        leases.release_lease(queue, lease.id, 1, "done")
        queue.flush()
        queue.execute(
            update(Lease).where(Lease.id == lease.id).values(granted_at=Lease.released_at - timedelta(hours=hours))
        )
    assert leases.compute_device_hours(queue) == pytest.approx({"a": 5.0, "b": 2.0})
    assert leases.compute_device_hours(queue, by="team") == pytest.approx({"t": 7.0})
