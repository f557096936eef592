"""CUDA's driver calls for virtual memory, each checked: the only place of this package that imports CUDA.

A call that the driver refuses raises MemoryRefused; one that fails because the context is gone raises CudaFault. It
knows addresses, handles, streams and events, not pages. Every call lets other threads of the interpreter run.
"""

from __future__ import annotations

from typing import Any

import torch
from cuda.bindings import driver as cu

from kvstore.errors import CudaFault, MemoryRefused

# What the driver says when it does not do a thing; after any other error the context cannot be used any more.
REFUSALS = frozenset(
    {
        cu.CUresult.CUDA_ERROR_INVALID_VALUE,
        cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY,
        cu.CUresult.CUDA_ERROR_NO_DEVICE,
        cu.CUresult.CUDA_ERROR_INVALID_DEVICE,
        cu.CUresult.CUDA_ERROR_MAP_FAILED,
        cu.CUresult.CUDA_ERROR_UNMAP_FAILED,
        cu.CUresult.CUDA_ERROR_ALREADY_MAPPED,
        cu.CUresult.CUDA_ERROR_NOT_MAPPED,
        cu.CUresult.CUDA_ERROR_OPERATING_SYSTEM,
        cu.CUresult.CUDA_ERROR_INVALID_HANDLE,
        cu.CUresult.CUDA_ERROR_NOT_PERMITTED,
        cu.CUresult.CUDA_ERROR_NOT_SUPPORTED,
    }
)


class CudaDriver:
    """The calls for one device, in its primary context, which torch uses too. Tests override methods.

    Raises MemoryRefused when there is no such device.
    """

    def __init__(self, device: int = 0) -> None:
        _check("cuInit", cu.cuInit(0))
        self._device = _check("cuDeviceGet", cu.cuDeviceGet(device))
        self._context = _check("cuDevicePrimaryCtxRetain", cu.cuDevicePrimaryCtxRetain(self._device))
        self._torch_device = torch.device("cuda", device)
        self._memory = _memory_properties(device)
        self._read_write = _access(device, cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        self._read_only = _access(device, cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ)

    def attach(self) -> None:
        """Make the context the calling thread's."""
        _check("cuCtxSetCurrent", cu.cuCtxSetCurrent(self._context))

    def close(self) -> None:
        """Let go of the context; it goes when torch lets go too."""
        _check("cuDevicePrimaryCtxRelease", cu.cuDevicePrimaryCtxRelease(self._device))

    def version(self) -> str:
        """The newest CUDA version that the driver supports, such as 13.0."""
        number = int(_check("cuDriverGetVersion", cu.cuDriverGetVersion()))
        return f"CUDA {number // 1000}.{number % 1000 // 10}"

    def granularity(self) -> int:
        """Bytes of which every size and address must be a multiple."""
        option = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        result = cu.cuMemGetAllocationGranularity(self._memory, option)
        return int(_check("cuMemGetAllocationGranularity", result))

    def reserve(self, num_bytes: int) -> int:
        """Address of `num_bytes` of address space without memory."""
        return int(_check("cuMemAddressReserve", cu.cuMemAddressReserve(num_bytes, 0, 0, 0)))

    def address_free(self, address: int, num_bytes: int) -> None:
        """Return address space in which nothing is mapped."""
        _check("cuMemAddressFree", cu.cuMemAddressFree(address, num_bytes))

    def create(self, num_bytes: int) -> int:
        """A handle on new memory; what it holds is not defined."""
        return int(_check("cuMemCreate", cu.cuMemCreate(num_bytes, self._memory, 0)))

    def release(self, handle: int) -> None:
        """Let go of a handle; its memory goes with the last mapping."""
        _check("cuMemRelease", cu.cuMemRelease(handle))

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """Put a handle's memory at an address where nothing is; it cannot be accessed yet."""
        _check("cuMemMap", cu.cuMemMap(address, num_bytes, 0, handle, 0))

    def set_access(self, address: int, num_bytes: int, *, writable: bool) -> None:
        """Let the device access a range of mapped addresses."""
        access = self._read_write if writable else self._read_only
        _check("cuMemSetAccess", cu.cuMemSetAccess(address, num_bytes, access, 1))

    def unmap(self, address: int, num_bytes: int) -> None:
        """Take away all mappings of a range, which must be whole ones without a hole."""
        _check("cuMemUnmap", cu.cuMemUnmap(address, num_bytes))

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        """Fill with zeros, in the stream's order."""
        _check("cuMemsetD8Async", cu.cuMemsetD8Async(address, 0, num_bytes, stream))

    def copy(self, source: int, target: int, num_bytes: int, stream: int) -> None:
        """Copy on the device, in the stream's order."""
        _check("cuMemcpyDtoDAsync", cu.cuMemcpyDtoDAsync(target, source, num_bytes, stream))

    def create_stream(self) -> int:
        """A stream beside all others, which waits for none of them by itself."""
        return int(_check("cuStreamCreate", cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        _check("cuStreamDestroy", cu.cuStreamDestroy(stream))

    def finish_stream(self, stream: int) -> None:
        """Wait until all that was queued on the stream has run."""
        _check("cuStreamSynchronize", cu.cuStreamSynchronize(stream))

    def copy_down(self, address: int, host: int, num_bytes: int, stream: int) -> None:
        """Copy from the device to pinned host memory, in the stream's order."""
        _check("cuMemcpyDtoHAsync", cu.cuMemcpyDtoHAsync(host, address, num_bytes, stream))

    def copy_up(self, address: int, host: int, num_bytes: int, stream: int) -> None:
        """Copy from pinned host memory to the device, in the stream's order."""
        _check("cuMemcpyHtoDAsync", cu.cuMemcpyHtoDAsync(address, host, num_bytes, stream))

    def pin(self, address: int, num_bytes: int) -> None:
        """Let the device copy from and to a range of host memory by itself."""
        _check("cuMemHostRegister", cu.cuMemHostRegister(address, num_bytes, 0))

    def unpin(self, address: int) -> None:
        """End what `pin` began at this address."""
        _check("cuMemHostUnregister", cu.cuMemHostUnregister(address))

    def create_event(self, *, timed: bool = False) -> Any:
        """An event on which a thread can sleep; `elapsed_s` takes `timed` ones."""
        flags = cu.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        if not timed:
            flags |= cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return _check("cuEventCreate", cu.cuEventCreate(flags))

    def elapsed_s(self, began: Any, ended: Any) -> float:
        """Seconds between two timed events that have completed."""
        return float(_check("cuEventElapsedTime", cu.cuEventElapsedTime(began, ended))) / 1000

    def destroy_event(self, event: Any) -> None:
        """Give an event back."""
        _check("cuEventDestroy", cu.cuEventDestroy(event))

    def record_event(self, event: Any, stream: int) -> None:
        """The event completes with what was queued on the stream up to now."""
        _check("cuEventRecord", cu.cuEventRecord(event, stream))

    def query_event(self, event: Any) -> bool:
        """Whether the event has completed."""
        result = cu.cuEventQuery(event)
        if result[0] == cu.CUresult.CUDA_ERROR_NOT_READY:
            return False
        _check("cuEventQuery", result)
        return True

    def wait_event(self, event: Any) -> None:
        """Sleep until the event completes."""
        _check("cuEventSynchronize", cu.cuEventSynchronize(event))

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """Addresses as uint8 [num_bytes] on the device; the first ones must be accessible at this moment."""
        return torch.as_tensor(_Bytes(address, num_bytes), device=self._torch_device)


class _Bytes:
    """Device memory, told in the way that torch understands."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _memory_properties(device: int) -> Any:
    properties = cu.CUmemAllocationProp()
    properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location = _location(device)
    return properties


def _access(device: int, flags: Any) -> list[Any]:
    access = cu.CUmemAccessDesc()
    access.location = _location(device)
    access.flags = flags
    return [access]


def _location(device: int) -> Any:
    location = cu.CUmemLocation()
    location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = device
    return location


def _check(call: str, result: tuple[Any, ...]) -> Any:
    """What the call returned; None where it returns nothing."""
    error, *values = result
    if error == cu.CUresult.CUDA_SUCCESS:
        return values[0] if values else None
    name = error.name if isinstance(error, cu.CUresult) else f"error {error}"
    raise MemoryRefused(call, name) if error in REFUSALS else CudaFault(call, name)
