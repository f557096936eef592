"""The CUDA kernels of `csrc/*.cu`: compiled by NVRTC for the GPU found, cached per user, launched on torch's stream.

It knows compilers, cubins and launches, not tensors' meaning. Only this module imports cuda. A launch costs a few
microseconds of the host, may be captured in a CUDA graph, and is a *dependent* launch where the GPU knows that: the
kernel starts while the one before it ends, and waits (`wait_for_previous` in the source) before it touches its data.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

from chatserve.errors import StartupError
from chatserve.model.native import NativeUnavailable, cache_directory

DEPENDENT_LAUNCH_MAJOR = 9  # compute capability from which a kernel can start before the one before it has ended
OPTIONS = ("--std=c++17", "--extra-device-vectorization")


class CudaError(RuntimeError):
    """A call of the driver failed; the text names it and what the driver said."""


class Kernel:
    """One kernel on the current device, for one thread of the host.

    `signature` names its parameters' types as `struct` does: P a pointer, q an int64, i an int32, f a float.
    """

    def __init__(self, function: Any, signature: str, *, threads: int, max_shared_bytes: int, dependent: bool) -> None:
        self._function = function
        self._device = torch.cuda.current_device()
        self._parameters = struct.Struct(f"@{signature}")
        self._values = ctypes.create_string_buffer(self._parameters.size)
        self._pointers = _field_pointers(signature, ctypes.addressof(self._values))
        self._config = _launch_config(threads, dependent=dependent)
        if max_shared_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call(driver.cuFuncSetAttribute, function, attribute, max_shared_bytes)

    def launch(self, grid: tuple[int, int], *arguments: float, shared_bytes: int = 0) -> None:
        """Queue `grid` blocks on torch's current stream of the device; pointers among `arguments` are addresses."""
        self._parameters.pack_into(self._values, 0, *arguments)
        config = self._config
        config.gridDimX, config.gridDimY = grid
        config.sharedMemBytes = shared_bytes
        config.hStream = torch._C._cuda_getCurrentRawStream(self._device)  # a tenth of current_stream()'s time
        _call(driver.cuLaunchKernelEx, config, self._function, ctypes.addressof(self._pointers), 0)


def load_kernel(
    source: str, name: str, signature: str, *, threads: int, defines: tuple[str, ...] = (), max_shared_bytes: int = 0
) -> Kernel:
    """The kernel `name` of `csrc/<source>` for the current device, compiled unless cached.

    `threads` make a block; `max_shared_bytes` is the most dynamic shared memory that a launch will ask for.
    Raises `StartupError` with the compiler's words, or where NVRTC or the cache is missing.
    """
    major, minor = torch.cuda.get_device_capability()
    module = _load_module(source, defines, f"sm_{major}{minor}", torch.cuda.current_device())
    function = _call(driver.cuModuleGetFunction, module, name.encode())
    dependent = major >= DEPENDENT_LAUNCH_MAJOR
    return Kernel(function, signature, threads=threads, max_shared_bytes=max_shared_bytes, dependent=dependent)


def cached_cubin(source: str, defines: tuple[str, ...], arch: str, directory: Path) -> bytes:
    """Machine code of `csrc/<source>` for `arch` (such as sm_90), from `directory` or else put there."""
    path = _source_directory() / source
    texts = [path.read_text(), *(header.read_text() for header in sorted(path.parent.glob("*.cuh")))]
    options = [*OPTIONS, f"--gpu-architecture={arch}", *(f"--define-macro={define}" for define in defines)]
    key = "\0".join([*texts, *options, str(_nvrtc_version())])
    cached = directory / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    if not cached.exists():
        _write_whole(cached, compile_cubin(path, options))
    return cached.read_bytes()


def compile_cubin(path: Path, options: Sequence[str]) -> bytes:
    """Machine code of one source file, whose headers lie beside it. Raises `StartupError` with the compiler's log."""
    program = _compiler(nvrtc.nvrtcCreateProgram, path.read_bytes(), path.name.encode(), 0, [], [])
    try:
        everything = [option.encode() for option in (*options, f"--include-path={path.parent}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(everything), everything)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise StartupError(f"{path} does not compile for this GPU ({' '.join(options)}):\n{_log(program)}")
        cubin = bytes(_compiler(nvrtc.nvrtcGetCUBINSize, program))
        _compiler(nvrtc.nvrtcGetCUBIN, program, cubin)
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def shared_memory_bytes() -> int:
    """How much of the current device's shared memory one block may have."""
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_call(driver.cuDeviceGetAttribute, attribute, torch.cuda.current_device()))


@functools.cache
def _load_module(source: str, defines: tuple[str, ...], arch: str, device: int) -> Any:
    """Once per process and device. torch's context, the device's primary one, becomes this thread's."""
    torch.cuda.current_stream()  # has torch make its context
    context = _call(driver.cuDevicePrimaryCtxRetain, device)
    _call(driver.cuCtxSetCurrent, context)
    return _call(driver.cuModuleLoadData, cached_cubin(source, defines, arch, _directory()))


def _field_pointers(signature: str, start: int) -> ctypes.Array[ctypes.c_void_p]:
    """The address of every parameter, as the driver wants them: natural alignment, as `struct` packs."""
    ends = [struct.calcsize(f"@{signature[: index + 1]}") for index in range(len(signature))]
    places = [start + end - struct.calcsize(code) for end, code in zip(ends, signature, strict=True)]
    return (ctypes.c_void_p * len(places))(*places)


def _launch_config(threads: int, *, dependent: bool) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.blockDimX = threads
    if dependent:
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = value
        config.attrs, config.numAttrs = [attribute], 1
    return config


def _call(function: Any, *arguments: Any) -> Any:
    """Call the driver and return what it returns beside its status."""
    status, *results = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{function.__name__}: {status.name}")
    return results[0] if results else None


def _compiler(function: Any, *arguments: Any) -> Any:
    """Call NVRTC likewise."""
    status, *results = function(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise StartupError(
            f"{function.__name__}: {status.name}; install nvidia-cuda-nvrtc of the driver's CUDA version"
        )
    return results[0] if results else None


def _nvrtc_version() -> tuple[int, int]:
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is not there
        raise StartupError(f"the CUDA kernels need NVRTC ({error}); pip install nvidia-cuda-nvrtc") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise StartupError(f"nvrtcVersion: {status.name}; install nvidia-cuda-nvrtc anew")
    return major, minor


def _log(program: Any) -> str:
    text = bytes(_compiler(nvrtc.nvrtcGetProgramLogSize, program))
    _compiler(nvrtc.nvrtcGetProgramLog, program, text)
    return text.rstrip(b"\0").decode(errors="replace").strip()


def _write_whole(path: Path, content: bytes) -> None:
    """Two processes may do this at once: each writes a file of its own and renames it into place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _directory() -> Path:
    try:
        return cache_directory()
    except NativeUnavailable as reason:
        raise StartupError(f"the CUDA kernels need a cache: {reason}") from reason


def _source_directory() -> Path:
    """Beside the package's modules in a wheel, beside the package in the repository."""
    package = Path(__file__).resolve().parents[1]
    for parent in (package, package.parent):
        if (parent / "csrc" / "common.cuh").is_file():
            return parent / "csrc"
    raise StartupError(f"csrc/*.cu are neither in {package} nor in {package.parent}; install chatserve anew")
