"""A disk that fails, fills up or loses power, at each single call of a run that puts, drops, moves and deletes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess

import pytest

from kvstore.disk import DirectoryUnusable, DiskTier, Reason, TierState
from kvstore.disk.files import FileCalls
from tests.kvstore.test_disk import QuickCalls, bytes_on_disk, key_of, open_tier, payload_of, put, read, right_records

DROPPED = [number for number in range(24) if number % 3]
KEPT = [number for number in range(32) if number not in DROPPED]


class Countdown:
    """Raises what it is given at the nth tick, never without a number."""

    def __init__(self, number, fault):
        self.remaining, self.fault = number, fault

    def tick(self):
        self.remaining -= 1
        if self.remaining == 0:
            raise self.fault


class FaultyCalls(QuickCalls):
    """The nth call fails, or all of those from the nth on do; a write that fails has written half."""

    def __init__(self, number=0, fault=None, *, lasting=False):
        self.countdown = Countdown(number, fault)
        self.lasting = lasting

    def _tick(self):
        if self.lasting and self.countdown.remaining == 1:
            self.countdown.remaining = 2
            raise self.countdown.fault
        self.countdown.tick()

    def create(self, path):
        self._tick()
        return super().create(path)

    def open_to_write(self, path):
        self._tick()
        return super().open_to_write(path)

    def open_to_read(self, path):
        self._tick()
        return super().open_to_read(path)

    def write(self, fd, buffers, offset):
        try:
            self._tick()
        except BaseException:
            data = b"".join(bytes(buffer) for buffer in buffers)
            os.pwrite(fd, data[: len(data) // 2], offset)
            raise
        super().write(fd, buffers, offset)

    def read(self, fd, buffers, offset):
        self._tick()
        return super().read(fd, buffers, offset)

    def sync(self, fd):
        self._tick()
        super().sync(fd)

    def sync_directory(self, path):
        self._tick()
        super().sync_directory(path)

    def truncate(self, fd, num_bytes):
        self._tick()
        super().truncate(fd, num_bytes)

    def replace(self, source, target):
        self._tick()
        super().replace(source, target)

    def remove(self, path):
        self._tick()
        super().remove(path)


class PowerCut(BaseException):
    """The machine is off: nothing after this runs."""


class UnsyncedCalls(FaultyCalls):
    """Knows what the disk has for certain; `lose_power` leaves that, and of the rest whatever chance wants."""

    def __init__(self, number):
        super().__init__(number, PowerCut())
        self.paths, self.certain, self.named, self.removed = {}, {}, set(), set()

    def create(self, path):
        return self._open(super().create(path), path)

    def open_to_write(self, path):
        self.named.add(path)
        self.certain.setdefault(path, path.read_bytes())
        return self._open(super().open_to_write(path), path)

    def sync(self, fd):
        super().sync(fd)
        self.certain[self.paths[fd]] = os.pread(fd, 1 << 20, 0)

    def sync_directory(self, path):
        super().sync_directory(path)
        self.named |= {entry for entry in path.iterdir() if entry in self.certain}
        self.removed.clear()

    def replace(self, source, target):
        self.certain[target] = self.certain.pop(source)
        super().replace(source, target)

    def remove(self, path):
        super().remove(path)
        if path in self.named:
            self.removed.add(path)

    def lose_power(self, chance):
        """What the next start finds."""
        for path in self.removed:
            if chance.random() < 0.5:  # the removal did not reach the disk
                path.write_bytes(self.certain[path])
        for path in set(self.paths.values()) - self.removed:
            if path.exists() and path.suffix == ".seg":
                self._lose_some(path, chance)

    def _lose_some(self, path, chance):
        certain, written = self.certain.get(path, b""), path.read_bytes()
        if path not in self.named and chance.random() < 0.5:
            path.unlink()
            return
        length = chance.randrange(len(certain), max(len(certain), len(written)) + 1)
        kept = chance.randrange(len(certain), length + 1)
        path.write_bytes((certain + written[len(certain) : kept]).ljust(length, b"\0"))

    def _open(self, fd, path):
        self.paths[fd] = path
        return fd


def live(path, calls, acknowledged):
    """A run in which nothing is evicted: put, restart, drop, compact, put. Notes what was acknowledged."""
    with open_tier(path, pages=120, calls=calls) as tier:
        for first in range(0, 20, 2):
            if put(tier, first, first + 1):
                acknowledged |= {first, first + 1}
    with open_tier(path, pages=120, calls=calls) as tier:
        if put(tier, *range(20, 24)):
            acknowledged |= set(range(20, 24))
        tier.drop(map(key_of, DROPPED))
        tier.compact()
        if put(tier, *range(24, 32)):
            acknowledged |= set(range(24, 32))
        return tier.stats()


def num_calls(path):
    """How many calls a run makes without faults."""
    calls = FaultyCalls()
    live(path, calls, set())
    shutil.rmtree(path)
    return -calls.countdown.remaining


def let_go(path):
    """End the hold of a tier that a power cut left behind, as the end of its process would."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith(f"{path}/"):
            os.close(int(fd))


def check_survivors(path, acknowledged):
    """After any end: what was acknowledged and not dropped is there, nothing is wrong, and the store goes on."""
    with open_tier(path, pages=120, calls=QuickCalls()) as tier:
        missing = [n for n in acknowledged - set(DROPPED) if read(tier, key_of(n)) != payload_of(key_of(n))]
        assert missing == []
        right_records(tier)
        assert put(tier, *range(200, 240))
        assert bytes_on_disk(path) <= tier.budget_bytes
    with open_tier(path, pages=120, calls=QuickCalls()) as tier:
        assert all(read(tier, key_of(n)) is not None for n in range(200, 240))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pages"


def test_the_run_moves_and_deletes(path):
    """Without faults the run does everything that a fault could interrupt."""
    acknowledged = set()
    stats = live(path, FaultyCalls(), acknowledged)
    assert (len(acknowledged), stats.evicted, stats.rejected) == (32, 0, {})
    assert stats.moved_bytes > 0
    check_survivors(path, acknowledged)


def test_killed_at_every_call(path):
    """A process that ends at any of its calls, half a write done, leaves everything it acknowledged."""
    for number in range(1, num_calls(path) + 1):
        acknowledged = set()
        with pytest.raises(PowerCut):
            live(path, FaultyCalls(number, PowerCut()), acknowledged)
        let_go(path)
        check_survivors(path, acknowledged)
        shutil.rmtree(path)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 40))])
def test_power_lost_at_every_call(path, seed):
    """What was acknowledged was made durable first: whatever else the disk lost, it is there."""
    chance = random.Random(seed)
    for number in range(1, num_calls(path) + 1):
        acknowledged, calls = set(), UnsyncedCalls(number)
        with pytest.raises(PowerCut):
            live(path, calls, acknowledged)
        let_go(path)
        calls.lose_power(chance)
        check_survivors(path, acknowledged)
        shutil.rmtree(path)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_error_at_every_call(path, number, lasting, caplog):
    """An error of the disk never reaches the caller of a tier that is open; what was acknowledged can be read later."""
    for at in range(1, num_calls(path) + 1):
        acknowledged, calls = set(), FaultyCalls(at, OSError(number, os.strerror(number)), lasting=lasting)
        caplog.clear()
        try:
            stats = live(path, calls, acknowledged)
        except DirectoryUnusable as error:  # while opening
            reason = error.reason
        else:
            reason = stats.fault or caplog.text  # of the second tier, or of the first
        assert os.strerror(number) in reason
        assert caplog.text.count("nothing more is written") <= 2  # once for each tier of the run
        check_survivors(path, acknowledged - {n for n in range(32) if Reason.READ_ERROR in caplog.text})
        shutil.rmtree(path)


def test_write_error(path, caplog):
    """A failed write ends writing with a reason and one warning; good records are still read."""
    calls = FaultyCalls()
    with open_tier(path, calls=calls) as tier:
        assert put(tier, *range(10))
        calls.countdown = Countdown(1, OSError(errno.EIO, "Input/output error"))
        assert tier.put([(key_of(n), payload_of(key_of(n))) for n in (3, 10, 11)]) == 1
        assert (tier.state, tier.fault) == (TierState.READ_ONLY, "[Errno 5] Input/output error")
        assert not put(tier, 12)
        assert tier.compact() == 0
        assert right_records(tier) == 10
    assert [record.message.count("nothing more is written") for record in caplog.records] == [1]
    with open_tier(path) as tier:
        assert right_records(tier) == 10
        assert put(tier, 10, 11, 12)


def test_failed_sync_stores_nothing(path):
    """Where the system does not say that a batch is durable, none of it is named."""

    class Unsure(FileCalls):
        def sync(self, fd):
            raise OSError(errno.EIO, "Input/output error")

    with open_tier(path) as tier:
        put(tier, 1)
    calls = FileCalls()
    with open_tier(path, calls=calls) as tier:
        calls.sync = Unsure().sync
        assert not put(tier, 2, 3)
        assert tier.keys() == [key_of(1)]
    with open_tier(path) as tier:
        assert tier.keys() == [key_of(1)]


def test_read_error(path, caplog):
    """A record that cannot be read is a miss with a reason, is dropped, and can be stored again."""
    calls = FaultyCalls()
    with open_tier(path, calls=calls) as tier:
        put(tier, 1, 2)
        calls.countdown = Countdown(2, OSError(errno.EIO, "Input/output error"))
        assert read(tier, key_of(1)) is None
        assert (tier.contains(key_of(1)), tier.stats().rejected) == (False, {Reason.READ_ERROR: 1})
        assert "Input/output error" in caplog.text
        assert read(tier, key_of(2)) == payload_of(key_of(2))
        assert tier.state is TierState.OPEN
        assert put(tier, 1)
        assert read(tier, key_of(1)) == payload_of(key_of(1))


def test_error_while_making_room(path):
    """A record that cannot be read when its file must go is lost alone; the others are moved."""

    class Unreadable(FileCalls):
        def read(self, fd, buffers, offset):
            if len(buffers) == 2 and offset == 64:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(fd, buffers, offset)

    with open_tier(path, calls=Unreadable()) as tier:
        put(tier, *range(20))
        tier.drop([key_of(1), key_of(2)])
        tier.compact()
        assert not tier.contains(key_of(0))
        assert tier.stats().rejected == {Reason.READ_ERROR: 1}
        assert tier.state is TierState.OPEN


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_full_disk(small_disk):
    """A disk that is full before the budget is: what fitted is kept and read, also after a restart, nothing raises."""
    path, page_bytes = small_disk / "pages", 16384
    options = {"budget_bytes": 4 << 20, "fingerprint": b"model", "page_bytes": page_bytes}
    with DiskTier(path, **options) as tier:
        stored = [n for n in range(100) if put(tier, n, length=page_bytes)]
        assert 50 < len(stored) < 64
        assert (tier.state, "No space left" in tier.fault) == (TierState.READ_ONLY, True)
        assert right_records(tier) == len(stored)
    with DiskTier(path, **options) as tier:
        assert right_records(tier) == len(stored)
