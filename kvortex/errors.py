"""What can go wrong, as one tree.

    KVortexError
    ├── ConfigError            a setting is missing or out of range   (also ValueError)
    ├── LayoutError            tensors that cannot be a paged cache: overlapping, misaligned   (also ValueError)
    │   └── LayoutSelfTestError    the round trip at start-up did not give back what was written
    ├── InvalidBlockIdError    a block id out of range or named twice in one call   (also ValueError)
    ├── InvalidHashError       a block hash of the wrong type or length, or lists that do not match   (also ValueError)
    ├── EngineStateError       before registration, after shutdown, or on the wrong thread   (also RuntimeError)
    ├── MemoryPoolError
    │   ├── OutOfPoolMemoryError   no extent of that size is free   (also MemoryError)
    │   ├── DoubleFreeError        an extent was freed before
    │   ├── ForeignExtentError     an extent of another pool, or one that this pool never handed out
    │   └── PoolLeakError          something still holds memory when the pool is closed
    └── DeviceError            a CUDA call failed   (also RuntimeError)
        ├── DeviceUnavailableError     no CUDA device, or its packages are not installed
        └── UnsupportedKernelError     the driver does not take a compiled kernel

A block that is not in the cache is no error: it is a miss with a `MissReason`.
"""


class KVortexError(Exception):
    """Base of everything that KVortex raises on purpose."""


class ConfigError(KVortexError, ValueError):
    """A setting is missing, out of range or contradicts another."""


class LayoutError(KVortexError, ValueError):
    """The tensors cannot be served as a paged KV cache; the message names the tensor."""


class LayoutSelfTestError(LayoutError):
    """The round trip at start-up did not give back what was written; the message names the layer."""


class InvalidBlockIdError(KVortexError, ValueError):
    """A block id lies outside the cache or appears twice in one call."""


class InvalidHashError(KVortexError, ValueError):
    """A block hash is not 32 bytes, or hashes and block ids do not pair up."""


class EngineStateError(KVortexError, RuntimeError):
    """The engine cannot do this now: nothing registered yet, shut down, or the wrong thread."""


class MemoryPoolError(KVortexError):
    """Base of the memory pools' errors."""


class OutOfPoolMemoryError(MemoryPoolError, MemoryError):
    """No free extent of the requested size."""


class DoubleFreeError(MemoryPoolError):
    """The extent was freed before."""


class ForeignExtentError(MemoryPoolError):
    """The extent belongs to another pool, or this pool never handed it out."""


class PoolLeakError(MemoryPoolError):
    """Memory is still held when the pool is closed; the message lists the owners."""


class DeviceError(KVortexError, RuntimeError):
    """A CUDA call failed; the message holds the call and CUDA's own words."""


class DeviceUnavailableError(DeviceError):
    """No CUDA device is there, or the packages that reach it are not installed."""


class UnsupportedKernelError(DeviceError):
    """The driver does not take a compiled kernel: it is older than the compiler."""
