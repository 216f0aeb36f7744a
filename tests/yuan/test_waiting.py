"""Fair queue: the assignment of the engine's slots to callers, and the limits on waiting sequences."""

from collections import Counter
from types import SimpleNamespace

import pytest

from yuan.serve.request import QueueFull
from yuan.serve.waiting import WaitingQueue


def make_queue(*requests):
    """Queue requests (caller, sequences) in this order; return the callers in the order in which they get slots."""
    waiting, owner = WaitingQueue(max_slots=32, max_waiting=256), {}
    for caller, count in requests:
        request = SimpleNamespace(caller=caller, sequences=[object() for _ in range(count)], is_over=False)
        owner |= {id(sequence): caller for sequence in request.sequences}
        waiting.add(request)
    return waiting, owner


def count_taken_slots(waiting, owner, free, slots, has_room=lambda request, leaves_reserve: True):
    taken = Counter()

    def admit(request, sequence, leaves_reserve):
        if is_admitted := has_room(request, leaves_reserve):
            taken[owner[id(sequence)]] += 1
        return is_admitted

    waiting.take(free, slots, admit)
    return taken


def test_slots_are_shared_evenly_and_a_quarter_is_kept_for_newcomers():
    waiting, owner = make_queue(("a", 100), ("b", 100), ("c", 2))
    assert count_taken_slots(waiting, owner, 32, slots := Counter()) == {"a": 11, "b": 11, "c": 2}
    assert count_taken_slots(waiting, owner, 8, slots) == {}
    late = SimpleNamespace(caller="late", sequences=[object(), object()], is_over=False)
    waiting.add(late)
    owner |= dict.fromkeys(map(id, late.sequences), "late")
    assert count_taken_slots(waiting, owner, 8, slots) == {"late": 1}
    assert count_taken_slots(waiting, owner, 10, slots) == {"late": 1, "a": 1}


def test_one_caller_has_three_quarters_of_the_slots_and_the_platform_all():
    assert count_taken_slots(*make_queue(("a", 100)), 32, Counter()) == {"a": 24}
    assert count_taken_slots(*make_queue(("", 100)), 32, Counter()) == {"": 32}


def test_new_caller_is_queued_and_the_limit_per_caller_shrinks_with_more_callers():
    waiting, _ = make_queue(("a", 128), ("b", 85), ("c", 64))
    with pytest.raises(QueueFull, match="85 prompts of yours wait already, at most 64"):
        waiting.add(SimpleNamespace(caller="b", sequences=[object()], is_over=False))
    waiting.add(SimpleNamespace(caller="late", sequences=[object()] * 100, is_over=False))
    assert len(waiting) == 377


def test_finished_requests_are_removed_from_the_queue():
    waiting, owner = make_queue(("a", 3), ("b", 1))
    finished_request = SimpleNamespace(caller="a", sequences=[object()] * 50, is_over=False)
    waiting.add(finished_request)
    finished_request.is_over = True
    waiting.add(SimpleNamespace(caller="a", sequences=[object()] * 50, is_over=True))
    assert len(waiting) == 54
    assert count_taken_slots(waiting, owner, 32, Counter()) == {"a": 3, "b": 1} and not len(waiting)


def test_sequence_without_room_stays_the_next_one():
    waiting, owner = make_queue(("a", 1), ("b", 3))
    rooms = iter([True, False])
    assert count_taken_slots(waiting, owner, 32, slots := Counter(), lambda *_: next(rooms)) == {"a": 1}
    assert count_taken_slots(waiting, owner, 31, slots) == {"b": 3} and not len(waiting)


def test_callers_that_have_a_slot_leave_room_for_newcomers():
    waiting, owner = make_queue(("a", 2), ("", 2))
    calls = []
    count_taken_slots(
        waiting, owner, 32, Counter(), lambda request, reserve: not calls.append((request.caller, reserve))
    )
    assert calls == [("a", False), ("", False), ("a", True), ("", False)]
