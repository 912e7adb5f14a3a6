"""What is lost is named in time, without a store: processes, hosts, links. Two ranks in one process; hosts by name."""

import socket
import time

import pytest

from skyrl.distributed import env, failure, peers, phases
from skyrl.distributed.peers import Peers


@pytest.fixture
def make(monkeypatch):
    """Peers of a rank each, on hosts of these names, whose verdict is kept and nothing ended."""
    made = []
    monkeypatch.setattr(env, "watchdog", None)
    monkeypatch.setattr(failure, "ended_ranks", list)
    monkeypatch.setattr(peers, "KNOCK_SECONDS", 0.2)
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(peers, "TURN_SECONDS", 0.05)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def build(hosts, **limits):
        doors = [socket.create_server(("", 0), backlog=peers.BACKLOG) for _ in hosts]
        for door in doors:
            door.setblocking(False)
        places = [("127.0.0.1", door.getsockname()[1]) for door in doors]
        said = [[] for _ in hosts]
        for rank, door in enumerate(doors):
            one = Peers(rank, door, hosts, list(places), **{"hang_seconds": 1.0, "collective_seconds": 60.0, **limits})
            one._end_alone = lambda ranks, what, rank=rank: (said[rank].append((ranks, what)), made[rank].stop())
            one.stop = lambda one=one: setattr(one, "_closing", True)
            made.append(one)
        assert soon(lambda: all(one._answered >= set(one._others) for one in made if one._first))
        return made, said

    yield build
    for one in made:
        one.stop()
        one._thread.join()
        one._door.close()


def soon(condition, seconds=6.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


THREE = ["a", "a", "b", "c"]


@pytest.fixture(scope="module")
def nowhere():
    """An address where no knock is answered, as at a node that is gone: a full queue."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        fill = [socket.socket() for _ in range(3)]
        for one in fill:
            one.setblocking(False)
            one.connect_ex(address)
        yield address
        for one in fill:
            one.close()


def test_a_process_that_is_gone(make):
    made, said = make(THREE)
    made[2].stop()
    made[2]._thread.join()
    made[2]._door.close()
    assert soon(lambda: said[0] and said[3])
    for rank in (0, 3):
        ((ranks, what),) = said[rank]
        assert ranks == [2] and "cannot be reached from" in what and "its process is gone" in what


def test_a_process_that_was_never_seen_is_no_loss(make, monkeypatch):
    """Containers with one host name and process numbers of their own: number 7 of the other is nobody here."""
    monkeypatch.setattr(failure, "ended_ranks", lambda: [1])
    made, said = make(["a", "a"], hang_seconds=0.4)
    time.sleep(1.0)
    assert not said[0] and not said[1]


def test_hosts_that_never_answered_are_not_blamed_for_an_error(make):
    made, _ = make(["a", "b"])
    made[1].stop()
    made[1]._thread.join()
    made[1]._door.close()
    made[0].stop()
    made[0]._thread.join()
    made[0]._answered.clear()
    assert made[0].find_lost() == {}
    made[0]._answered.add(1)
    assert list(made[0].find_lost()) == [1]


def test_the_last_that_watches_goes_on_after_an_error(make, monkeypatch):
    made, said = make(["a", "b"])
    real, failed = Peers._open, []

    def without_descriptors(self, rank):
        if len(failed) < 3:
            failed.append(rank)
            raise OSError(24, "Too many open files")
        return real(self, rank)

    monkeypatch.setattr(Peers, "_open", without_descriptors)
    assert soon(lambda: len(failed) == 3)
    made[1].stop()
    made[1]._thread.join()
    made[1]._door.close()
    assert soon(lambda: said[0]) and said[0][0][0] == [1]


def test_a_host_that_is_gone_takes_all_its_ranks(make, nowhere):
    made, said = make(["a", "b", "b", "c"])
    for one in made:
        one.doors[1] = nowhere
    assert soon(lambda: said[0] and said[3])
    ((ranks, what),) = said[0]
    assert ranks == [1, 2] and "cannot be reached from a (for " in what and "b does not answer" in what


def test_who_is_cut_off_says_so(make, nowhere):
    made, said = make(THREE)
    made[3].doors[:3] = [nowhere] * 3
    assert soon(lambda: said[3])
    ((ranks, what),) = said[3]
    assert ranks == [0, 1, 2] and what.endswith("c is cut off from all other hosts") and not said[0]


def test_a_door_that_comes_back_or_never_answered_accuses_nobody(make, nowhere):
    made, said = make(["a", "b"])
    door = made[0].doors[1]
    made[0].doors[1] = made[1].doors[0] = nowhere
    time.sleep(0.3)
    made[1]._answered, made[1]._failing = set(), {}  # a firewall
    time.sleep(0.3)
    made[0].doors[1] = door
    time.sleep(1.3)
    assert said == [[], []]


def test_a_process_that_stands_still_is_there(make):
    """Stopped, or busy without letting another thread run: the system answers at its door."""
    made, said = make(["a", "b"])
    made[1].stop()  # nobody takes the knocks any more
    time.sleep(1.5)
    assert said == [[], []]


def test_a_local_process_that_is_gone(make, monkeypatch):
    made, said = make(["a", "a"])
    assert soon(lambda: 1 in made[0]._answered)
    monkeypatch.setattr(failure, "ended_ranks", lambda: [1])
    assert soon(lambda: said[0])
    assert said[0][0][0] == [1] and "its process is gone" in said[0][0][1]


class Watch:
    store, turned_at, claimed = None, 0.0, False


@pytest.mark.parametrize("store", [None, "stands still"])
def test_a_waiting_rank_whose_store_is_lost(make, monkeypatch, store):
    made, said = make(["a", "b"])
    watch = Watch()
    watch.store = store
    monkeypatch.setattr(env, "watchdog", watch)
    monkeypatch.setattr(phases, "progress", lambda now: (0.9, "all_reduce_sum"))
    time.sleep(0.5)
    assert said == [[], []]
    monkeypatch.setattr(phases, "progress", lambda now: (1.1, "all_reduce_sum"))
    assert soon(lambda: said[0] and said[1])
    assert said[1][0][0] == [0] and ("that is gone" if store is None else "stands still") in said[1][0][1]


def test_the_deadline_of_collectives_is_ours(make, monkeypatch):
    """The libraries' own could not be moved when the process stands still for a while."""
    made, said = make(["a"], hang_seconds=0.0, collective_seconds=5.0)
    monkeypatch.setattr(phases, "progress", lambda now: (5.1, "all_reduce_sum"))
    assert soon(lambda: said[0])
    assert "waits in all_reduce_sum for longer than run.collective_timeout_seconds=5" in said[0][0][1]


def test_who_is_gone_is_found_at_once_when_a_connection_breaks(make, nowhere):
    made, _ = make(THREE)
    made[2].stop()
    made[2]._thread.join()
    made[2]._door.close()
    made[1].doors[3] = nowhere
    assert made[1].find_lost() == {2: "its process is gone", 3: "c does not answer"}
    assert made[0].find_lost() == {2: "its process is gone"}
