"""CUDA C++ kernels: NVRTC compiles them for the current device, and the CUDA driver launches them.

Sources: https://docs.nvidia.com/cuda/nvrtc and https://docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

log = logging.getLogger(__name__)

STACK_BYTES = 512
"""Bytes of stack for each device thread: half of the driver's default."""


class CudaError(RuntimeError):
    """A call of the driver or of NVRTC failed."""


def checked(result: tuple[Any, ...]) -> Any:
    """The values that a call of the driver or of NVRTC returned behind its status: one, a tuple, or None.

    Raises:
        CudaError: the status is an error.
    """
    status, *values = result
    if status.value:
        raise CudaError(f"{status.name}: {status}")
    return values[0] if len(values) == 1 else tuple(values) or None


@cache
def compile_source(file: Path, defines: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """Compiles a source file, which may include files of its folder, to a cubin. Logs the compiler's warnings.

    Args:
        defines: names and values of macros.
        architecture: the device's, such as "sm_90a".

    Raises:
        CudaError: the source does not compile; the message is the compiler's log.
    """
    program = checked(nvrtc.nvrtcCreateProgram(file.read_bytes(), file.name.encode(), 0, [], []))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", f"--include-path={file.parent}"]
    options += [f"-D{name}={value}" for name, value in defines]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        # NVRTC writes into this object. Python shares bytes of length 1, so an empty log needs a longer one.
        text = bytes(1 + checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, text))
        said = text.decode(errors="replace").strip(" \0\n")
        if status.value:
            raise CudaError(f"{file.name}: {said}")
        if said:
            log.warning("%s: %s", file.name, said)
        cubin = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compile_for_device(file: Path, defines: Mapping[str, int]) -> bytes:
    """Compiles a source file with macros to a cubin for the current device."""
    major, minor = torch.cuda.get_device_capability()
    # The suffix "a" allows instructions of this architecture alone, such as Hopper's wgmma.
    return compile_source(file, tuple(sorted(defines.items())), f"sm_{major}{minor}a")


def prefer_shared_memory() -> None:
    """Has the driver prefer shared memory to L1 cache for every kernel of this process.

    A multiprocessor then need not change the division between one kernel and the next.
    """
    checked(driver.cuCtxSetCacheConfig(driver.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED))


def limit_stack() -> None:
    """Limits the stack of each device thread to STACK_BYTES, which the context reserves for all threads at once.

    An H100 runs up to 270,336 threads, so 512 bytes less free 132 MiB. The driver gives more to a kernel that is known
    to need more.
    """
    checked(driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_STACK_SIZE, STACK_BYTES))


class Kernel:
    """One `extern "C"` function of a CUDA source file, loaded on the current device."""

    def __init__(self, file: Path, name: str, defines: Mapping[str, int] | None = None) -> None:
        cubin = compile_for_device(file, defines or {})
        torch.cuda.current_stream().synchronize()  # makes the device's context current
        self._module = checked(driver.cuModuleLoadData(cubin))
        self._function = checked(driver.cuModuleGetFunction(self._module, name.encode()))
        self._shared = 0
        self._configs: dict[tuple[int | bool, ...], driver.CUlaunchConfig] = {}

    def __call__(
        self,
        grid: int,
        threads: int,
        *arguments: ctypes._SimpleCData[Any] | ctypes.Structure,
        shared: int = 0,
        cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        """Launches the kernel on torch's current stream.

        Args:
            grid: number of CTAs.
            threads: of a CTA.
            arguments: of the kernel, in order.
            shared: bytes of dynamic shared memory of a CTA.
            cluster: CTAs of a cluster; it divides the grid.
            dependent: whether the kernel may start while the previous one ends (programmatic dependent launch); the
                kernel itself waits before it reads the previous results.
        """
        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())  # a tenth of current_stream()'s time
        key = (grid, threads, shared, cluster, dependent, stream)
        config = self._configs.get(key)
        if config is None:
            config = self._config(grid, threads, shared, cluster, dependent)
            config.hStream = stream
            self._configs[key] = config  # stored when complete, since other threads launch too
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))

    def clusters_at_once(self, cluster: int, threads: int, shared: int) -> int:
        """Number of clusters of this kernel that the device runs at once.

        Args:
            cluster: CTAs of a cluster.
            threads: of a CTA.
            shared: bytes of dynamic shared memory of a CTA.
        """
        config = self._config(cluster, threads, shared, cluster, False)
        return int(checked(driver.cuOccupancyMaxActiveClusters(self._function, config)))

    def _config(self, grid: int, threads: int, shared: int, cluster: int, dependent: bool) -> driver.CUlaunchConfig:
        if shared > self._shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(self._function, attribute, shared))
            self._shared = shared
        # A cluster of one CTA has the attribute, too: without it the driver counts no clusters.
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
        attributes = [attribute]
        if dependent:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config
