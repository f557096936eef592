"""The C++ attention of `csrc/attention.cpp`: compiled on first use, cached per user, checked, loaded.

It knows compilers, ctypes and tensors' addresses, not sessions. Threads are those of the OpenMP runtime that torch
has loaded: its entry is handed to the kernel, so no second runtime with a second set of spinning threads appears.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 120.0
# Without errno and traps for arithmetic the loops vectorise; infinities and not-a-numbers keep their meaning.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
CPU_FLAGS = ("-march=native", "-mcpu=native")  # x86 and some others, the rest
OPENMP_PATTERNS = ("torch/lib/lib*omp*", "torch.libs/lib*omp*")
TOLERANCE = 1e-5


class NativeUnavailable(Exception):
    """The native kernel cannot be used here; the text says why and what would help."""


class _Arena(ctypes.Structure):
    """`ChatserveArena` of the C++ source; strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("token_stride", "layer_stride", "side_stride", "head_stride")),
        *((name, c_int64) for name in ("num_heads", "num_kv_heads", "head_dim")),
        ("scale", c_float),
    )


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """The loaded library. `name` says how it was made; `parallel` is the OpenMP entry, None for one thread."""

    library: ctypes.CDLL
    parallel: int | None
    name: str


class NativeStep:
    """One step's attention. `spans` are (query_start, num_queries, base_token, kv_length) each, as in `Span`.

    `arena` [arena_tokens, num_layers, 2, num_kv_heads, head_dim] is float32 and contiguous in head_dim.
    """

    def __init__(self, kernel: NativeKernel, arena: Tensor, spans: Sequence[tuple[int, int, int, int]]) -> None:
        self._library = kernel.library
        self._parallel = kernel.parallel
        self._arena = arena
        self._num_spans = len(spans)
        self._spans = array("q", [number for span in spans for number in span])
        self._described: _Arena | None = None
        self._scratch = torch.empty(0)

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write `k`, `v` [n, num_kv_heads, head_dim] to the arena and attend `q` [n, num_heads, head_dim] to it.

        Returns [n, num_heads, head_dim].
        """
        q, k, v = _packed_heads(q), _packed_heads(k), _packed_heads(v)
        if self._described is None:
            self._described = self._describe(q.shape[1])
        output = torch.empty(q.shape)
        self._library.chatserve_attend(
            ctypes.addressof(self._described),
            self._spans.buffer_info()[0],
            self._num_spans,
            self._scratch.data_ptr(),
            layer,
            *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
            output.data_ptr(),
            torch.get_num_threads(),
            self._parallel,
        )
        return output

    def _describe(self, num_heads: int) -> _Arena:
        """The arena as C++ sees it, and the scratch memory that all layers of the step share."""
        _, _, _, num_kv_heads, head_dim = self._arena.shape
        scale = math.log2(math.e) / math.sqrt(head_dim)  # of scores to powers of two
        described = _Arena(self._arena.data_ptr(), *self._arena.stride()[:4], num_heads, num_kv_heads, head_dim, scale)
        reference, spans = ctypes.addressof(described), self._spans.buffer_info()[0]
        self._scratch = torch.empty(self._library.chatserve_scratch_floats(reference, spans, self._num_spans))
        return described


def kernel_for(arena: Tensor) -> NativeKernel:
    """The kernel for this arena; raises `NativeUnavailable` if it, or this machine, has none."""
    head_dim = arena.shape[-1]
    if arena.dtype != torch.float32 or arena.device.type != "cpu":
        raise NativeUnavailable(f"the C++ kernel takes float32 on the CPU, not {arena.dtype} on {arena.device.type}")
    if head_dim % 8 or head_dim > MAX_HEAD_DIM or arena.stride(-1) != 1:
        raise NativeUnavailable(f"the C++ kernel takes a head_dim in steps of 8 up to {MAX_HEAD_DIM}, not {head_dim}")
    found = load_kernel()
    if isinstance(found, NativeUnavailable):
        raise found
    return found


@functools.cache
def load_kernel() -> NativeKernel | NativeUnavailable:
    """Compile (unless cached), check and load the kernel; once per process, whatever the outcome."""
    try:
        kernel = _load_first_working()
    except NativeUnavailable as reason:
        logger.warning("attention runs on torch's kernels, several times slower for many sessions: %s", reason)
        return reason
    logger.info("attention runs on the %s", kernel.name)
    return kernel


def _load_first_working() -> NativeKernel:
    reasons: list[str] = []
    source = _source()
    directory = cache_directory()
    for compiler in _compilers():
        for cpu_flag in CPU_FLAGS:
            try:
                return _load(source, [*compiler, *FLAGS, cpu_flag], directory)
            except NativeUnavailable as reason:
                reasons.append(str(reason))
    raise NativeUnavailable("; ".join(reasons) or "no C++ compiler on PATH; install g++ or clang++, or set CXX")


def _load(source: Path, command: list[str], directory: Path) -> NativeKernel:
    """Load the library that `command` makes, compiling it if this machine has not done so before."""
    version = _run([command[0], "--version"]).partition("\n")[0]
    key = "\0".join([source.read_text(), *command, version, _cpu()])
    path = directory / f"attention-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        _compile([*command, str(source)], path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load ({error}); delete it to compile it anew") from error
    _declare(library)
    parallel = _openmp_entry()
    kernel = NativeKernel(library, parallel, f"C++ kernel ({version}{'' if parallel else ', one thread'})")
    _check(kernel)
    return kernel


def _compile(command: list[str], path: Path) -> None:
    """Two processes may do this at once: each writes a file of its own and renames it into place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        _run([*command, "-o", temporary])
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise NativeUnavailable(f"{shlex.join(command)} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def _compilers() -> Iterator[list[str]]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen, *([name] for name in COMPILERS)]:
        path = shutil.which(command[0]) if command else None
        if path:
            yield [path, *command[1:]]


def _source() -> Path:
    """Beside the package's modules in a wheel, beside the package in the repository."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package, package.parent):
        path = directory / "csrc" / "attention.cpp"
        if path.is_file():
            return path
    raise NativeUnavailable(
        f"csrc/attention.cpp is neither in {package} nor in {package.parent}; install chatserve anew"
    )


def cache_directory() -> Path:
    """A directory that nobody else can write to, since what lies there is loaded into this process."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        directory = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "chatserve" / "native"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        writable = os.access(directory, os.W_OK | os.X_OK)
    except (OSError, RuntimeError) as error:
        raise NativeUnavailable(f"no cache directory ({error}); set XDG_CACHE_HOME to a writable one") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not writable:
        raise NativeUnavailable(f"{directory} must be yours and writable by you alone; chown and chmod 700 it")
    return directory


def _cpu() -> str:
    """What `-march=native` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _openmp_entry() -> int | None:
    """Address of `GOMP_parallel` in the runtime that torch has loaded already; None if there is none."""
    packages = Path(torch.__file__).resolve().parents[1]
    found = sorted(str(path) for pattern in OPENMP_PATTERNS for path in packages.glob(pattern))
    for path in [*found, "libgomp.so.1", "libiomp5.so", "libomp.so"]:
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(runtime.GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):  # not loaded, or a runtime that does not speak GCC's interface
            continue
    return None


def _declare(library: ctypes.CDLL) -> None:
    p, n = c_void_p, c_int64
    library.chatserve_scratch_floats.argtypes = [p, p, n]
    library.chatserve_scratch_floats.restype = n
    library.chatserve_attend.argtypes = [p, p, n, p, n, p, n, p, n, p, n, p, n, p]
    library.chatserve_attend.restype = None


def _check(kernel: NativeKernel) -> None:
    """Compare with torch on one decode and one prefill; raises `NativeUnavailable` if they differ."""
    generator = torch.Generator().manual_seed(0)
    for head_dim, num_queries, past in ((64, 1, 300), (64, 9, 300), (24, 1, 5), (24, 40, 5)):
        length = past + num_queries
        arena = torch.full((length + 10, 2, 2, 2, head_dim), float("nan"))
        arena[3 : 3 + length] = torch.randn(length, 2, 2, 2, head_dim, generator=generator)
        q = torch.randn(num_queries, 4, head_dim, generator=generator)
        k, v = torch.randn(2, num_queries, 2, head_dim, generator=generator)
        output = NativeStep(kernel, arena, [(0, num_queries, 3, length)]).run(1, q, k, v)
        keys, values = arena[3 : 3 + length, 1].permute(1, 2, 0, 3).repeat_interleave(2, dim=1)
        mask = torch.ones(num_queries, length, dtype=torch.bool).tril(past)
        expected = scaled_dot_product_attention(q.transpose(0, 1), keys, values, mask).transpose(0, 1)
        difference = (output - expected).abs().max() / expected.abs().max()
        if not difference <= TOLERANCE:
            raise NativeUnavailable(f"{kernel.name} computes wrong attention: {difference:.1e} from torch's")


def _packed_heads(rows: Tensor) -> Tensor:
    """Rows [n, heads, head_dim] whose heads follow each other; the rows themselves may lie apart."""
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.contiguous()
