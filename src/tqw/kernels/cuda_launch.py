"""From CUDA C++ to a launch: compiled by NVRTC, kept on disk, loaded and launched through cuda.bindings (both come with
torch), with memory from torch's allocator. Nothing here knows what a kernel computes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tqw.errors import TqwError


def checked(result: tuple[Any, ...], what: str) -> Any:
    error, *values = result
    if int(error) != 0:
        raise TqwError(f"expected {what} to succeed, got {error!r}: try another backend, and report this with the GPU")
    return values[0] if len(values) == 1 else values or None


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/tqw or ~/.cache/tqw."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqw"


def compile_source(source: str, arch: str) -> bytes:
    """CUDA C++ to a cubin. Needs no GPU. arch: for example "sm_90"."""
    return compile_with_log(source, arch)[0]


def compile_with_log(source: str, arch: str) -> tuple[bytes, str]:
    """`compile_source`, and what the compiler says about registers and spills."""
    nvrtc = import_module("cuda.bindings.nvrtc")
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"tqw.cu", 0, [], []), "nvrtcCreateProgram")
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"-default-device", b"--ptxas-options=-v"]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode().rstrip("\0")
        if int(error) != 0:
            raise TqwError(f"expected the CUDA source to compile for {arch}, got {error!r}:\n{text}")
        cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
        checked(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return cubin, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@contextmanager
def _locked(path: Path):
    """One compiling process at a time; where files cannot be locked, the atomic rename still keeps the cache whole."""
    with open(path, "a") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cubin(source: str, arch: str) -> bytes:
    """The compiled module, from the disk cache when it is there."""
    nvrtc = import_module("cuda.bindings.nvrtc")
    version = checked(nvrtc.nvrtcVersion(), "nvrtcVersion")
    key = hashlib.sha256(f"{arch} {version}\n{source}".encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.cubin"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.read_bytes()
        with _locked(path.with_suffix(".lock")):
            with suppress(FileNotFoundError):
                return path.read_bytes()
            data = compile_source(source, arch)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(data)
            temporary.replace(path)
            return data
    except OSError:  # a read-only or full disk costs only the cache
        return compile_source(source, arch)


@dataclass(frozen=True)
class Device:
    index: int
    arch: str
    multiprocessors: int
    shared_bytes: int
    clusters: bool


@lru_cache(maxsize=64)
def device_at(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    return Device(
        index,
        f"sm_{major}{minor}" + "a" * (major == 9),  # "a": wgmma
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        major >= 9,
    )


@lru_cache(maxsize=1)
def driver_module() -> Any:
    return import_module("cuda.bindings.driver")


_thread = threading.local()


def enter(index: int) -> None:
    """A thread that has not yet used CUDA has no context: give it torch's, which the driver's functions need."""
    if getattr(_thread, "entered", False):
        return
    driver = driver_module()
    if int(checked(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")) == 0:
        device = checked(driver.cuDeviceGet(index), "cuDeviceGet")
        context = checked(driver.cuDevicePrimaryCtxRetain(device), "cuDevicePrimaryCtxRetain")
        checked(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _thread.entered = True


def load(source: str, name: str, device: Device) -> Any:
    """A kernel, compiled and loaded, whose launches may ask for all of a multiprocessor's shared memory. Loading is
    allowed while another thread captures a graph."""
    driver = driver_module()
    with torch.cuda.device(device.index):
        enter(device.index)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        mode = checked(driver.cuThreadExchangeStreamCaptureMode(mode), "cuThreadExchangeStreamCaptureMode")
        try:
            module = checked(driver.cuModuleLoadData(cubin(source, device.arch)), "cuModuleLoadData")
            function = checked(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction")
            kind = driver.CUfunction_attribute
            static = checked(
                driver.cuFuncGetAttribute(kind.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function), "cuFuncGetAttribute"
            )
            most = kind.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(function, most, device.shared_bytes - static), "cuFuncSetAttribute")
        finally:
            driver.cuThreadExchangeStreamCaptureMode(mode)
    return function


def _config(grid: tuple[int, int], threads: int, shared: int, split: int, stream: int, overlap: bool) -> Any:
    """The driver's description of a launch. To make one takes longer than to launch."""
    driver = driver_module()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid[0], grid[1], 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    attributes = []
    if overlap:
        programmatic = driver.CUlaunchAttribute()
        programmatic.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        programmatic.value.programmaticStreamSerializationAllowed = 1
        attributes.append(programmatic)
    if split > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = split, 1, 1
        attributes.append(cluster)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@dataclass(frozen=True)
class Launch:
    """One kernel and its grid, ready to go."""

    function: Any
    grid: tuple[int, int]
    threads: int
    shared: int
    device: Device
    split: int = 1
    configs: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)  # by stream

    def config(self, stream: int) -> Any:
        config = self.configs.get(stream)
        if config is None:
            config = _config(self.grid, self.threads, self.shared, self.split, stream, self.device.clusters)
            self.configs[stream] = config
        return config


def launch_all(launches: tuple[Launch, ...], params: ctypes.Structure, stream: int) -> None:
    """One kernel after the other, each with the same parameters."""
    arguments = ctypes.c_void_p(ctypes.addressof(params))
    address, start = ctypes.addressof(arguments), driver_module().cuLaunchKernelEx
    for launch in launches:
        result = start(launch.configs.get(stream) or launch.config(stream), launch.function, address, 0)
        if int(result[0]) != 0:
            checked(result, "cuLaunchKernelEx")


def borrow(size: int, stream: int) -> int:
    """Address of so many bytes from torch's allocator on the current device; a tensor of them takes 3 us longer."""
    return torch._C._cuda_cudaCachingAllocator_raw_alloc(size, stream)


def give_back(address: int) -> None:
    """What was borrowed: whoever gets it next uses it on the same stream, and so later."""
    torch._C._cuda_cudaCachingAllocator_raw_delete(address)


@lru_cache(maxsize=512)
def ctas_at_once(function: Any, threads: int, shared: int, device: Device) -> int:
    """CTAs with so many bytes of dynamic shared memory that run at once on all multiprocessors."""
    occupancy = driver_module().cuOccupancyMaxActiveBlocksPerMultiprocessor
    return device.multiprocessors * checked(occupancy(function, threads, shared), "cuOccupancyMaxActiveBlocks")


@lru_cache(maxsize=512)
def resident(function: Any, threads: int, cluster: int, device: Device) -> int:
    """Clusters that run at once, a CTA on a multiprocessor: not all multiprocessors can be grouped in clusters."""
    if cluster == 1:
        return device.multiprocessors
    driver = driver_module()
    config = _config((cluster, 1), threads, device.shared_bytes, cluster, 0, False)
    clusters = checked(driver.cuOccupancyMaxActiveClusters(function, config), "cuOccupancyMaxActiveClusters")
    return clusters
