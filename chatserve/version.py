"""The version of the installed package, written once, in `pyproject.toml`."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("chatserve")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"
