"""Compiling and caching CUDA kernels; NVRTC needs no GPU for that."""

from __future__ import annotations

import ctypes
import stat

import pytest

from chatserve.errors import StartupError

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from chatserve.model import nvrtc

ELF = b"\x7fELF"


@pytest.fixture(autouse=True)
def needs_compiler():
    """Skip where the NVRTC library is not installed."""
    try:
        nvrtc._nvrtc_version()
    except StartupError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    ("source", "defines"),
    [
        ("rotary.cu", ("HEAD_DIM=128",)),
        ("rotary.cu", ("HEAD_DIM=80", "CHATSERVE_FP16")),
        ("tokens.cu", ()),
        ("small_linear.cu", ()),
        ("small_linear.cu", ("CHATSERVE_FP16",)),
    ],
)
def test_sources_compile(source, defines, tmp_path):
    """Every source compiles for Hopper in the variants that are used."""
    assert nvrtc.cached_cubin(source, defines, "sm_90", tmp_path).startswith(ELF)


def test_second_process_reads_the_cache(tmp_path, monkeypatch):
    """What one process compiled is not compiled again, and nobody else may write it."""
    first = nvrtc.cached_cubin("tokens.cu", (), "sm_90", tmp_path)
    monkeypatch.setattr(nvrtc, "compile_cubin", None)
    assert nvrtc.cached_cubin("tokens.cu", (), "sm_90", tmp_path) == first
    (cached,) = tmp_path.iterdir()
    assert stat.S_IMODE(cached.stat().st_mode) == 0o600


def test_variants_have_files_of_their_own(tmp_path):
    """Another macro or another GPU is another key."""
    for define, arch in (("HEAD_DIM=64", "sm_90"), ("HEAD_DIM=128", "sm_90"), ("HEAD_DIM=64", "sm_80")):
        nvrtc.cached_cubin("rotary.cu", (define,), arch, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_failed_compilation_names_source_and_reason(tmp_path):
    """The operator sees the compiler's words, and no broken file is left in the cache."""
    with pytest.raises(StartupError, match=r"rotary\.cu(.|\n)*HEAD_DIM"):
        nvrtc.cached_cubin("rotary.cu", (), "sm_90", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_gpu_is_a_startup_error(tmp_path):
    """A GPU that this NVRTC does not know is refused with a remedy in the text, not with a crash."""
    with pytest.raises(StartupError, match="sm_1"):
        nvrtc.cached_cubin("tokens.cu", (), "sm_1", tmp_path)


def test_parameters_lie_where_cuda_expects_them():
    """Each parameter's address is its naturally aligned place in the packed values."""
    pointers = nvrtc._field_pointers("Piqfi", 4096)
    assert [ctypes.cast(pointer, ctypes.c_void_p).value - 4096 for pointer in pointers] == [0, 8, 16, 24, 28]
