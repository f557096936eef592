"""The disk tier as its caller sees it: what was put is read, after a restart too, within the budget, or is a miss."""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kvstore.disk
from kvstore import KVError
from kvstore.disk import DirectoryInUse, DirectoryUnusable, DiskTier, Reason, TierState, open_existing
from kvstore.disk.files import FileCalls

PAGE_BYTES = 256
RECORD_BYTES = 64 + PAGE_BYTES + 36  # header, payload, line of the footer
ROOT = Path(__file__).parents[2]


def key_of(number):
    """The key of test page `number`."""
    return hashlib.sha256(b"page %d" % number).digest()


def payload_of(key, length=PAGE_BYTES):
    """The only bytes that a key may ever be read as."""
    return (key * (length // len(key) + 1))[:length]


def put(tier, *numbers, length=PAGE_BYTES):
    """Store test pages; whether all are stored."""
    keys = [key_of(number) for number in numbers]
    return tier.put([(key, payload_of(key, length)) for key in keys]) == len(keys)


def read(tier, key):
    """The record's bytes, None for a miss."""
    buffer = bytearray(tier.page_bytes)
    length = tier.read(key, buffer)
    return bytes(buffer[:length]) if isinstance(length, int) else None


def right_records(tier):
    """How many records there are, after reading each and comparing it with what was put."""
    found = {key: read(tier, key) for key in tier.keys()}  # noqa: SIM118 - the tier is no mapping
    wrong = [key for key, data in found.items() if data is not None and data != payload_of(key, len(data))]
    assert wrong == []
    return sum(data is not None for data in found.values())


def open_tier(path, *, pages=64, fingerprint=b"model", page_bytes=PAGE_BYTES, calls=None):
    """A tier with a budget of so many pages, in files of a sixteenth of that."""
    budget_bytes = 4096 + pages * RECORD_BYTES + 2048
    return DiskTier(path, budget_bytes=budget_bytes, fingerprint=fingerprint, page_bytes=page_bytes, calls=calls)


def bytes_on_disk(path):
    """What the directory's files hold."""
    return sum(entry.stat().st_size for entry in os.scandir(path))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pages"


@pytest.fixture
def tier(path):
    with open_tier(path) as tier:
        yield tier


class QuickCalls(FileCalls):
    """Waits for no disk, where a test is about something else."""

    def sync(self, fd):
        pass

    def sync_directory(self, path):
        pass


class CountingCalls(FileCalls):
    """Counts what is read."""

    def __init__(self):
        self.bytes_read = 0
        self.reads = 0

    def read(self, fd, buffers, offset):
        total = super().read(fd, buffers, offset)
        self.bytes_read += total
        self.reads += 1
        return total


def test_round_trip(tier):
    """What was put is read, and nothing else is there."""
    assert tier.put([(key_of(1), payload_of(key_of(1))), (key_of(2), bytearray(payload_of(key_of(2))))]) == 2
    assert read(tier, key_of(1)) == payload_of(key_of(1))
    assert read(tier, key_of(2)) == payload_of(key_of(2))
    assert read(tier, key_of(3)) is None
    assert (tier.contains(key_of(1)), tier.contains(key_of(3)), len(tier)) == (True, False, 2)
    assert tier.keys() == [key_of(1), key_of(2)]


@pytest.mark.parametrize("length", [1, 63, 64, 65, PAGE_BYTES - 1, PAGE_BYTES])
def test_tails(path, length):
    """A record may be shorter than a page, by any number of bytes; the buffer behind it is left alone."""
    with open_tier(path) as tier:
        assert put(tier, 1, 2, length=length)
    with open_tier(path) as tier:
        buffer = bytearray(b"x" * (PAGE_BYTES + 8))
        assert tier.read(key_of(2), memoryview(buffer)) == length
        assert buffer == payload_of(key_of(2), length) + b"x" * (PAGE_BYTES + 8 - length)


def test_same_key_is_stored_once(tier):
    """A key that is known, or twice in a batch, takes no more room."""
    assert put(tier, 1, 1, 2)
    before = tier.stats()
    assert put(tier, 1, 2)
    assert tier.stats() == before
    assert before.records == 2


@pytest.mark.parametrize(
    ("key", "payload"), [(b"short", b"x"), (bytes(32), b""), (bytes(32), bytes(PAGE_BYTES + 1)), (bytes(33), b"x")]
)
def test_impossible_records(tier, key, payload):
    """A key that is no digest and a payload that is no page are refused with the whole batch."""
    with pytest.raises(ValueError, match="must be"):
        tier.put([(key_of(1), b"good"), (key, payload)])
    assert len(tier) == 0


def test_short_buffer(tier):
    """A buffer that cannot hold the record is the caller's mistake, not a miss."""
    put(tier, 1)
    with pytest.raises(ValueError, match="the record has 256"):
        tier.read(key_of(1), bytearray(PAGE_BYTES - 1))
    assert read(tier, key_of(1)) == payload_of(key_of(1))


def test_drop(tier):
    """A dropped key is a miss, and can be stored again."""
    put(tier, 1, 2)
    assert tier.drop([key_of(1), key_of(9)]) == 1
    assert (read(tier, key_of(1)), tier.stats().records) == (None, 1)
    assert put(tier, 1)
    assert read(tier, key_of(1)) == payload_of(key_of(1))


def test_drop_before_the_file_is_full(path):
    """A key that was dropped while its file was being written does not come back with the file."""
    with open_tier(path) as tier:
        put(tier, 1, 2)
        tier.drop([key_of(1)])
        put(tier, *range(10, 20))
    with open_tier(path) as tier:
        assert (tier.contains(key_of(1)), tier.contains(key_of(2))) == (False, True)


def test_drop_while_moving(path):
    """A key that is dropped while its record is copied stays dropped."""

    class Dropping(QuickCalls):
        def read(self, fd, buffers, offset):
            if len(buffers) == 2 and offset > 64:  # the second record to be copied; the first is that of key 0
                tier.drop([key_of(0)])
            return super().read(fd, buffers, offset)

    with open_tier(path, calls=Dropping()) as tier:
        put(tier, *range(20))
        tier.drop([key_of(1), key_of(2)])
        tier.compact()
        assert tier.stats().moved_bytes > 0
        assert (tier.contains(key_of(0)), right_records(tier)) == (False, 17)
        assert tier.stats().live_bytes == 17 * RECORD_BYTES


def test_restart_reads_no_payload(path):
    """Opening reads headers and footers only, and one footer instead of the headers of a full file."""
    with open_tier(path, pages=320) as tier:
        put(tier, *range(105))
        segments = tier.stats().segments
    calls = CountingCalls()
    with open_tier(path, pages=320, calls=calls) as tier:
        assert (tier.stats().records, tier.stats().segments, segments) == (105, 5, 5)
        assert calls.bytes_read <= 105 * 64 + segments * 2 * 64
        assert calls.reads < 40
        assert right_records(tier) == 105


def test_restart_goes_on_in_the_same_file(path):
    """Many short runs do not leave many small files."""
    for number in range(8):
        with open_tier(path, pages=320) as tier:
            assert put(tier, number)
            assert right_records(tier) == number + 1
    assert len(list(path.glob("*.seg"))) == 1


@pytest.mark.parametrize("change", [{"fingerprint": b"other"}, {"page_bytes": PAGE_BYTES // 2}])
def test_foreign_records_are_misses(path, change, caplog):
    """Pages of another model or page size are never served, are there again for their own, and the log says so."""
    with open_tier(path) as tier:
        put(tier, *range(20))
    with open_tier(path, **change) as tier:
        assert (len(tier), read(tier, key_of(3)), tier.contains(key_of(3))) == (0, None, False)
        assert tier.stats().rejected == {Reason.FOREIGN: tier.stats().segments}
    assert "another model or layout" in caplog.text
    with open_tier(path) as tier:
        assert right_records(tier) == 20


def test_foreign_records_go_first(path, caplog):
    """Room is made from another model's files, not from records that can be read; each removal is logged."""
    caplog.set_level(logging.INFO)
    with open_tier(path, fingerprint=b"old") as tier:
        put(tier, *range(40))
    with open_tier(path) as tier:
        put(tier, *range(100, 140))
        assert (right_records(tier), tier.stats().evicted) == (40, 0)
        assert bytes_on_disk(path) <= tier.budget_bytes
    assert "to make room: foreign" in caplog.text


def test_newer_format(path, caplog):
    """Files of a later version are misses with a reason; what is put then is kept as ever."""
    with open_tier(path) as tier:
        put(tier, *range(8))
    for file in path.glob("*.seg"):
        data = bytearray(file.read_bytes())
        data[8:12] = struct.pack("<I", 2)
        file.write_bytes(data)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DirectoryUnusable, match="format 2, this program reads format 1"):
        open_existing(path)
    with open_tier(path) as tier:
        assert (len(tier), tier.stats().rejected) == (0, {Reason.FORMAT: tier.stats().segments})
        assert put(tier, *range(8))
    assert "format 2" in caplog.text
    with open_tier(path) as tier:
        assert right_records(tier) == 8


def test_lost_manifest_loses_nothing(path):
    """Each file says itself what it is."""
    with open_tier(path) as tier:
        put(tier, *range(20))
    (path / "manifest.json").unlink()
    with pytest.raises(DirectoryUnusable, match="no manifest"):
        open_existing(path)
    with open_tier(path) as tier:
        assert right_records(tier) == 20
    with open_existing(path) as tier:
        assert right_records(tier) == 20


def test_second_opener(path):
    """A directory that is open is refused with its name, its owner and what to do; another process is refused too."""
    with open_tier(path), pytest.raises(DirectoryInUse) as caught:
        open_tier(path)
    assert isinstance(caught.value, KVError)
    assert str(path) in str(caught.value)
    assert f"id {os.getpid()}; stop that one or choose another directory" in str(caught.value)
    with open_tier(path):
        code = f"from kvstore.disk import open_existing; open_existing({str(path)!r})"
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "DirectoryInUse" in other.stderr
    with open_tier(path) as tier:
        assert tier.state is TierState.OPEN


def test_unusable_directory(tmp_path):
    """A path that cannot be a directory is an error that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryUnusable, match="file/pages"):
        open_tier(tmp_path / "file" / "pages")


def test_private(path):
    """Nobody else can read the pages, whatever the umask."""
    before = os.umask(0)
    try:
        with open_tier(path) as tier:
            put(tier, *range(10))
            modes = {entry.stat().st_mode & 0o777 for entry in os.scandir(path)}
    finally:
        os.umask(before)
    assert (path.stat().st_mode & 0o777, modes) == (0o700, {0o600})


def test_closed(path):
    """A closed tier has only misses, stores nothing, and may be closed again."""
    tier = open_tier(path)
    put(tier, 1)
    tier.close()
    tier.close()
    assert (read(tier, key_of(1)), put(tier, 2), tier.state) == (None, False, TierState.CLOSED)


@pytest.mark.parametrize("length", [PAGE_BYTES, 1])
def test_budget(path, length):
    """However much is put, the files stay within the budget, and the last pages put are there."""
    with open_tier(path) as tier:
        for number in range(0, 400, 4):
            assert put(tier, *range(number, number + 4), length=length)
            assert bytes_on_disk(path) <= tier.budget_bytes
        stats = tier.stats()
        assert stats.file_bytes + 4096 >= bytes_on_disk(path)
        assert stats.live_bytes >= tier.budget_bytes * 0.6
        assert tier.keys() == [key_of(number) for number in range(400 - stats.records, 400)]
        assert (stats.evicted, stats.moved_bytes) == (400 - stats.records, 0)  # in this order nothing is copied
        assert right_records(tier) == stats.records


def test_smallest_budget(path):
    """Four files of one page are enough, a byte less is refused with the number."""
    with pytest.raises(ValueError, match=r"budget_bytes=\d+: must be at least \d+") as caught:
        DiskTier(path, budget_bytes=1, fingerprint=b"model", page_bytes=PAGE_BYTES)
    least = int(str(caught.value).split("least ")[1].split()[0])
    with pytest.raises(ValueError, match="must be at least"):
        DiskTier(path, budget_bytes=least - 1, fingerprint=b"model", page_bytes=PAGE_BYTES)
    with DiskTier(path, budget_bytes=least, fingerprint=b"model", page_bytes=PAGE_BYTES) as tier:
        for number in range(20):
            assert put(tier, number, length=1 + number * 97 % PAGE_BYTES)
            assert bytes_on_disk(path) <= least


def test_smaller_budget(path):
    """A store that was larger fits its new budget when it is opened, the newest files kept."""
    with open_tier(path, pages=256) as tier:
        put(tier, *range(200))
    with open_tier(path, pages=32) as tier:
        assert bytes_on_disk(path) <= tier.budget_bytes
        assert put(tier, 1000)
        assert bytes_on_disk(path) <= tier.budget_bytes
        assert right_records(tier) == len(tier)
        assert tier.contains(key_of(1000))


@pytest.mark.parametrize("use", ["touch", "read", "put"])
def test_used_records_stay(path, use):
    """Pages that are used stay, copied from file to file, while hundreds of others come and go."""
    uses = {"touch": lambda tier, number: tier.touch(key_of(number)), "put": put,
            "read": lambda tier, number: read(tier, key_of(number))}  # fmt: skip
    used = range(0, 40, 3)
    with open_tier(path) as tier:
        put(tier, *range(40))
        for number in range(40, 500):
            assert put(tier, number)
            assert all(uses[use](tier, number) for number in used)
        assert [number for number in range(400) if tier.contains(key_of(number))] == list(used)
        assert tier.stats().moved_bytes > 0
        assert not (path / "00000001.seg").exists()
    with open_tier(path) as tier:
        assert all(read(tier, key_of(number)) == payload_of(key_of(number)) for number in used)


def test_batch_beyond_the_budget(path):
    """A batch larger than the budget is stored as far as it can be, and the count says how far."""
    with open_tier(path) as tier:
        keys = [key_of(number) for number in range(200)]
        stored = tier.put([(key, payload_of(key)) for key in keys])
        assert 30 < stored == len(tier) == right_records(tier) < 64
        assert bytes_on_disk(path) <= tier.budget_bytes


def test_order_of_use_survives_a_restart(path):
    """After a restart the pages written first go first."""
    with open_tier(path) as tier:
        put(tier, *range(50))
    with open_tier(path) as tier:
        assert tier.keys() == [key_of(number) for number in range(50)]
        put(tier, *range(50, 80))
        assert tier.keys() == [key_of(number) for number in range(80 - len(tier), 80)]


def test_compact(path):
    """Files of which little is wanted go, what is wanted of them stays, also for the next start."""
    with open_tier(path) as tier:
        put(tier, *range(40))
        tier.drop(key_of(number) for number in range(40) if number % 4)
        before = bytes_on_disk(path)
        freed = tier.compact()
        assert freed == before - bytes_on_disk(path) > before / 2
        assert right_records(tier) == 10
    with open_tier(path) as tier:
        assert {key_of(number) for number in range(0, 40, 4)} <= set(tier.keys())
        assert right_records(tier) == len(tier) < 16


def test_compact_nothing(path):
    """A store without waste stays as it is, an empty one too."""
    with open_tier(path) as tier:
        assert tier.compact() == 0
        put(tier, *range(10))
        before = tier.stats()
        assert (tier.compact(), tier.stats()) == (0, before)


def test_compact_removes_foreign(path):
    """Another model's files are waste."""
    with open_tier(path, fingerprint=b"old") as tier:
        put(tier, *range(20))
        held = tier.stats().file_bytes
    with open_tier(path) as tier:
        assert tier.compact() == held
        assert tier.stats().segments == 0


def test_verify(path, caplog):
    """Every bad record is found with its file and key, and is a miss from then on; the log has the first only."""
    with open_tier(path) as tier:
        put(tier, *range(12))
        assert tier.verify().bad == []
    for file in sorted(path.glob("*.seg"))[:2]:
        data = bytearray(file.read_bytes())
        data[64 + 64 + 5] ^= 1
        file.write_bytes(data)
    with open_tier(path) as tier:
        found = tier.verify()
        assert (found.records, [(bad.path.name, bad.reason, bad.offset) for bad in found.bad]) == (
            12,
            [("00000001.seg", Reason.CHECKSUM, 64), ("00000002.seg", Reason.CHECKSUM, 64)],
        )
        assert not any(tier.contains(bad.key) for bad in found.bad)
        assert tier.stats().rejected == {Reason.CHECKSUM: 2}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_concurrent_readers(path):
    """Readers get right bytes or a miss while the writer puts, drops, moves and deletes under them."""
    with open_tier(path, pages=48, calls=QuickCalls()) as tier:
        done, failures, hits = threading.Event(), [], [0] * 3

        def keep_reading(reader):
            chooser = random.Random(reader)
            while not done.is_set():
                key = key_of(max(0, newest[0] - chooser.randrange(60)))
                data = read(tier, key)
                hits[reader] += data is not None
                if data not in (None, payload_of(key)):
                    failures.append(key)

        newest = [0]
        readers = [threading.Thread(target=keep_reading, args=(reader,)) for reader in range(3)]
        for reader in readers:
            reader.start()
        try:
            for number in range(0, 600, 3):
                put(tier, number, number + 1, number + 2)  # while others are read, even a new page can be the oldest
                newest[0] = number + 2
                if number % 90 == 0:
                    tier.drop([key_of(number - 2)])
                    tier.compact()
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert failures == []
        assert min(hits) > 0
        assert tier.stats().moved_bytes > 0
        assert (tier.stats().rejected, tier.fault) == ({}, None)


def test_imports():
    """The package needs the standard library, a checksum and the store's base of errors, no torch, numpy or asyncio."""
    imported = set()
    for file in Path(kvstore.disk.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    ours = {name for name in imported if name.startswith("kvstore")}
    assert {name for name in ours if not name.startswith("kvstore.disk.")} == {"kvstore.errors"}
    assert imported - ours <= sys.stdlib_module_names | {"collections.abc", "zlib_ng"}
    assert "asyncio" not in imported
