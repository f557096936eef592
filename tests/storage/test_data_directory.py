"""The data directory: private, held by one, and of a format that this version knows."""

from __future__ import annotations

import stat

import pytest

from chatserve.errors import StartupError
from chatserve.storage.data_directory import FORMAT, DataDirectory


def test_it_is_private_and_says_its_format(tmp_path):
    """A new directory, or one that others could read, is its owner's alone, with the format beside the data."""
    path = tmp_path / "data"
    path.mkdir(mode=0o755)
    directory = DataDirectory(path)
    directory.open()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert (path / "format").read_text() == f"{FORMAT}\n"
    directory.close()


def test_a_directory_without_a_format_is_taken(tmp_path):
    """What was written before formats were noted is the first format."""
    (tmp_path / "redis").mkdir()
    directory = DataDirectory(tmp_path)
    directory.open()
    assert (tmp_path / "format").read_text() == f"{FORMAT}\n"
    directory.close()


@pytest.mark.parametrize("noted", [str(FORMAT + 1), "999", "", "two", "1.5", "²"])
def test_another_format_is_refused(tmp_path, noted):
    """A newer format, or none that can be read, is refused with the remedy; the directory is free again after."""
    (tmp_path / "format").write_text(noted)
    for _ in range(2):  # the second would be refused as in use if the first had kept the lock
        with pytest.raises(StartupError, match=r"newer chatserve.*choose another data directory"):
            DataDirectory(tmp_path).open()
    assert (tmp_path / "format").read_text() == noted


def test_it_is_held_by_one(tmp_path):
    """A second holder is refused until the first gives it up."""
    first, second = DataDirectory(tmp_path), DataDirectory(tmp_path)
    first.open()
    with pytest.raises(StartupError, match="in use"):
        second.open()
    first.close()
    second.open()
    second.close()
