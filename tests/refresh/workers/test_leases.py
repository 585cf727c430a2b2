"""Leases: one holder, taken over when dead by one's own clock, whatever other clocks say."""

import concurrent.futures
import os
import subprocess
import sys
import threading
import time

import pytest

from ragjax.refresh.workers import leases
from ragjax.refresh.workers.leases import Beacon, Holder, Leases, read_holder


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def other(tmp_path, clock):
    """Another process's view of the same leases."""
    return Leases(tmp_path, lease_seconds=10, clock=clock)


def hold(tmp_path, shard=0):
    lease = Leases(tmp_path, lease_seconds=10).take(shard)
    assert lease is not None
    return lease


def test_a_lease_is_held_until_it_is_given_back(tmp_path, other):
    lease = hold(tmp_path)
    assert other.take(0) is None
    assert other.take(1) is not None
    assert lease.renew()
    lease.release()
    assert not lease.renew()
    assert other.take(0) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-000000.lease",
        "shard-000001.lease",
    ]


def test_a_renewed_lease_is_never_taken_and_a_silent_one_is(tmp_path, other, clock):
    lease = hold(tmp_path)
    for _ in range(5):
        assert other.take(0) is None
        clock.now += 9.9
        assert lease.renew()
    assert other.take(0) is None
    clock.now += 9.9
    assert other.take(0) is None
    clock.now += 0.2
    taken = other.take(0)
    assert taken is not None
    # The old holder wakes up: it has lost the lease and cannot disturb the new one.
    content = taken.path.read_bytes()
    assert not lease.renew()
    lease.release()
    assert taken.path.read_bytes() == content
    assert taken.renew()


def test_the_time_that_counts_starts_at_the_first_look(tmp_path, other, clock):
    hold(tmp_path)
    clock.now += 1e6  # the observer was away, not the holder
    assert other.take(0) is None


@pytest.mark.parametrize("seconds", [-1e9, 1e9])
def test_wall_clocks_and_file_times_decide_nothing(tmp_path, other, clock, monkeypatch, seconds):
    lease = hold(tmp_path)
    assert other.take(0) is None
    wall = time.time() + seconds
    monkeypatch.setattr(time, "time", lambda: wall)
    monkeypatch.setattr(time, "time_ns", lambda: int(wall * 1e9))
    os.utime(lease.path, (2e9, 2e9) if seconds > 0 else (0, 0))
    assert other.take(0) is None
    clock.now += 9
    os.utime(lease.path)
    assert other.take(0) is None
    clock.now += 2  # a newer file time does not count as a sign of life either
    assert other.take(0) is not None


def test_the_lease_of_an_ended_process_of_this_machine_is_taken_at_once(tmp_path, other):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    lease = hold(tmp_path)
    gone = Holder("here", process.pid, leases.machine())
    lease.path.write_bytes(lease.path.read_bytes().replace(*_pids(os.getpid(), process.pid)))
    assert read_holder(lease.path.read_bytes()).is_gone() and gone.is_gone()
    assert not gone._replace(machine="another").is_gone()
    assert not gone._replace(pid=os.getpid()).is_gone()
    assert other.take(0) is not None


def _pids(old, new):
    return f'"pid": {old}'.encode(), f'"pid": {new}'.encode()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\x00", b'{"pid": "x"}'])
def test_a_lease_that_cannot_be_read_expires_like_any_other(tmp_path, other, clock, content):
    (tmp_path / "shard-000000.lease").write_bytes(content)
    assert other.take(0) is None
    clock.now += 10.1
    assert other.take(0) is not None


def test_one_of_many_takers_wins(tmp_path):
    """Threads with views of their own: each dead lease gets one new holder, each time."""
    clock = Clock()
    views = [Leases(tmp_path, lease_seconds=10, clock=clock) for _ in range(8)]
    for shard in range(40):
        dead = hold(tmp_path, shard)
        for view in views:
            assert view.take(shard) is None
        clock.now += 10.1
        start = threading.Barrier(len(views))

        def take(view, shard=shard, start=start):
            start.wait()
            return view.take(shard)

        with concurrent.futures.ThreadPoolExecutor(len(views)) as pool:
            won = [lease for lease in pool.map(take, views) if lease]
        assert sum(lease.renew() for lease in won) == 1
        assert not dead.renew()
    assert len(list(tmp_path.iterdir())) == 40


def test_a_beacon_keeps_its_length_and_needs_no_room(tmp_path):
    beacon = Beacon(tmp_path / "b.json")
    size = beacon.path.stat().st_size
    seen = set()
    for _ in range(12):
        assert beacon.renew()
        seen.add(beacon.path.read_bytes())
        assert beacon.path.stat().st_size == size
    assert len(seen) == 12
    assert read_holder(seen.pop()) == leases.this_process()
    with pytest.raises(FileExistsError):
        Beacon(beacon.path)
