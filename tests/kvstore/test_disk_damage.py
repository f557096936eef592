"""Files that are not what was written: whatever byte changed and wherever a file ends, no wrong page is ever read."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.disk import DirectoryUnusable, DiskTier, Reason, open_existing
from tests.kvstore.test_disk import QuickCalls, key_of, payload_of, put, read, right_records

PAGE_BYTES = 64
NUM_RECORDS = 7  # five fill a file, two are in the next, which is open
SEALED, OPEN = "00000001.seg", "00000002.seg"
FOOTER_START = 64 + 5 * 128  # of the sealed file


def open_small(path):
    return DiskTier(path, budget_bytes=15_000, fingerprint=b"model", page_bytes=PAGE_BYTES, calls=QuickCalls())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of a small store, as bytes by name."""
    path = tmp_path_factory.mktemp("damage") / "written"
    with open_small(path) as tier:
        for number in range(NUM_RECORDS):
            assert put(tier, number, length=PAGE_BYTES)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pages"


def restore(path, files):
    """Lay the files down, in place of what is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    for name, data in files.items():
        (path / name).write_bytes(data)


def records_left(path):
    """How many records can still be read, all of them rightly; and that the store can be used and filled."""
    with open_small(path) as tier:
        left = right_records(tier)
        assert len(tier) == left
        assert put(tier, *range(NUM_RECORDS), length=PAGE_BYTES)
        assert right_records(tier) == NUM_RECORDS
    with open_small(path) as tier:
        assert (
            right_records(tier) >= left
        )  # a file that is not full yet does not supersede an older one, even a bad one
    return left


def damaged_at(data, offset):
    """The bytes with one bit changed, each bit's turn by offset."""
    return data[:offset] + bytes([data[offset] ^ (1 << offset % 8)]) + data[offset + 1 :]


def least_left(name, offset):
    """How many records must survive a change of this byte."""
    if name == SEALED:  # its footer names the others; without the file's header there are only those of the next
        return 2 if offset < 64 else NUM_RECORDS - (offset < FOOTER_START)
    if name == OPEN:  # a header lost is everything behind it lost
        return 5 if offset < 64 + 128 else 6
    return NUM_RECORDS


def test_files_are_as_the_tests_assume(written):
    """Five records and a footer, two records and none."""
    assert {name: len(data) for name, data in written.items() if name.endswith("seg")} == {
        SEALED: FOOTER_START + 24 + 5 * 36,
        OPEN: 64 + 2 * 128,
    }


@pytest.mark.parametrize("name", [SEALED, OPEN, "manifest.json", "lock"])
def test_one_changed_byte(written, path, name, caplog):
    """Each single byte: what is read is right, no more is lost than must be, and the store can be used and filled."""
    for offset in range(len(written[name])):
        restore(path, {**written, name: damaged_at(written[name], offset)})
        assert records_left(path) >= least_left(name, offset), f"byte {offset} of {name}"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_changed_bytes(written, path, data):
    """Any bytes, anywhere, in place of others: still nothing wrong is read."""
    files = dict(written)
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(files)))
        offset = data.draw(st.integers(0, len(files[name])))
        rubbish = data.draw(st.binary(min_size=1, max_size=200))
        files[name] = files[name][:offset] + rubbish + files[name][offset + len(rubbish) :]
    restore(path, files)
    records_left(path)


@pytest.mark.parametrize("name", [SEALED, OPEN, "manifest.json"])
def test_cut_anywhere(written, path, name):
    """A file of any length: the records that are whole are read, and the store can be used and filled."""
    for length in range(len(written[name])):
        restore(path, {**written, name: written[name][:length]})
        whole = min(5, max(0, length - 64) // 128)
        expected = {SEALED: whole + 2, OPEN: 5 + whole}.get(name, NUM_RECORDS)
        assert records_left(path) == expected, f"{name} cut to {length} bytes"


@pytest.mark.parametrize("name", [SEALED, OPEN])
def test_zeros_at_the_end(written, path, name):
    """A power cut that left the length and not the bytes: zeros are no records."""
    for length in range(0, len(written[name]), 16):
        restore(path, {**written, name: written[name][:length].ljust(len(written[name]), b"\0")})
        records_left(path)


def test_files_exchanged(written, path):
    """A file under another's name is not taken for that one."""
    restore(path, {**written, SEALED: written[OPEN], OPEN: written[SEALED]})
    with open_small(path) as tier:
        assert (len(tier), tier.stats().rejected) == (0, {Reason.SEGMENT_HEADER: 2})


def test_records_exchanged(written, path):
    """A record in another's place is a miss there: the key is checked, not only the checksum."""
    data = written[SEALED]
    restore(path, {**written, SEALED: data[:64] + data[192:320] + data[64:192] + data[320:]})
    with open_small(path) as tier:
        assert right_records(tier) == NUM_RECORDS - 2
        assert tier.stats().rejected == {Reason.RECORD_HEADER: 2}


@pytest.mark.parametrize(
    ("name", "offset", "reasons", "missing"),
    [
        (SEALED, 8, {Reason.FORMAT: 1}, 5),
        (SEALED, 20, {Reason.SEGMENT_HEADER: 1}, 5),
        (SEALED, 64 + 9, {Reason.RECORD_HEADER: 1}, 1),
        (SEALED, 64 + 64, {Reason.CHECKSUM: 1}, 1),
        (SEALED, FOOTER_START + 9, {Reason.FOOTER: 1}, 0),
        (OPEN, 64 + 128 + 9, {Reason.RECORD_HEADER: 1}, 1),
    ],
)
def test_reasons(written, path, name, offset, reasons, missing):
    """A miss says why."""
    restore(path, {**written, name: damaged_at(written[name], offset)})
    with open_small(path) as tier:
        assert right_records(tier) == NUM_RECORDS - missing
        assert tier.stats().rejected == reasons


@pytest.mark.parametrize("num_bytes", [1, 60, 70, 127])
def test_verify_tells_damage_from_a_kill(written, path, num_bytes):
    """What a killed process left behind the last record is normal; the same elsewhere is not."""
    restore(path, {**written, OPEN: written[OPEN][:-num_bytes]})
    with open_small(path) as tier:
        assert (tier.stats().rejected, tier.verify().bad) == ({Reason.TORN: 1}, [])
    restore(path, {**written, SEALED: written[SEALED][:-num_bytes]})
    with open_small(path) as tier:
        assert [(bad.path.name, bad.reason) for bad in tier.verify().bad] == [(SEALED, Reason.FOOTER)]


def test_torn_tail_is_cut(written, path):
    """What a killed process left is gone once the file is written again, and is no part of it when it is full."""
    restore(path, {**written, OPEN: written[OPEN] + b"rubbish " * 60})
    with open_small(path) as tier:
        assert put(tier, 100, length=PAGE_BYTES)
        assert (path / OPEN).stat().st_size == tier.stats().file_bytes - len(written[SEALED]) == 64 + 3 * 128
        assert put(tier, *range(101, 110), length=PAGE_BYTES)
    with open_small(path) as tier:
        assert (right_records(tier), tier.stats().rejected) == (NUM_RECORDS + 10, {})


@pytest.mark.parametrize("num_records", [NUM_RECORDS, 10], ids=["with_room", "full"])
def test_what_a_kill_left_behind_is_not_damage_later(path, num_records):
    """Also when the file is full, then or soon after, and the next one is written, here and at the next start."""
    with open_small(path) as tier:
        assert put(tier, *range(num_records), length=PAGE_BYTES)
        tier._store.abandon()  # the file's end is not written, as after a kill
    newest = max(path.glob("*.seg"))
    newest.write_bytes(newest.read_bytes() + bytes(30))
    with open_small(path) as tier:
        assert put(tier, *range(100, 110), length=PAGE_BYTES)
        assert tier.verify().bad == []
    with open_small(path) as tier:
        assert (tier.verify().bad, tier.stats().rejected) == ([], {})
        assert right_records(tier) == num_records + 10


def test_half_made_copy(written, path):
    """A copy that the power cut left half made never takes the place of the record, also when its file is full."""
    first = written[SEALED][64 : 64 + 64] + bytes(64)  # the header reached the disk, the payload did not
    restore(path, {**written, OPEN: written[OPEN][:64] + first})
    for numbers in ([], range(100, 110)):
        with open_small(path) as tier:
            put(tier, *numbers, length=PAGE_BYTES)
            assert read(tier, key_of(0)) == payload_of(key_of(0), PAGE_BYTES)
            assert right_records(tier) == len(tier)
    with open_small(path) as tier:
        assert (right_records(tier), tier.stats().rejected) == (15, {})


def test_damaged_manifest_is_not_guessed(written, path):
    """Who does not know the model cannot open a directory whose manifest is damaged."""
    restore(path, {**written, "manifest.json": written["manifest.json"].replace(b"64", b"65")})
    with pytest.raises(DirectoryUnusable, match="manifest is damaged"):
        open_existing(path)
