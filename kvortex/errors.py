"""All exceptions of the package, as one tree.

    KVortexError
    ├── ConfigError            a setting is missing or out of range   (also ValueError)
    ├── LayoutError            the tensors are no paged cache: overlapping, misaligned, ...   (also ValueError)
    │   └── LayoutSelfTestError    the self-test at start-up loaded other bytes than it had saved
    ├── InvalidBlockIdError    a block id is out of range, or occurs twice in one call   (also ValueError)
    ├── InvalidHashError       a block hash has the wrong type or length, or lists do not match   (also ValueError)
    ├── EngineStateError       a call before registration, after shutdown, or on the wrong thread   (also RuntimeError)
    ├── OwnerError             the owner of a shared pool refuses this client, or something that it asks for
    ├── MemoryPoolError
    │   ├── OutOfPoolMemoryError   no extent of that size is free   (also MemoryError)
    │   ├── DoubleFreeError        an extent was freed before
    │   ├── ForeignExtentError     an extent belongs to another pool, or was never allocated
    │   └── PoolLeakError          memory is still allocated when the pool is closed
    └── DeviceError            a CUDA call failed   (also RuntimeError)
        ├── DeviceUnavailableError     no CUDA device, or its packages are not installed
        └── UnsupportedKernelError     the driver does not accept a compiled kernel

A block that is not in the cache is not an error, but a miss with a `MissReason`.
"""


class KVortexError(Exception):
    """Base of all exceptions that KVortex defines."""


class ConfigError(KVortexError, ValueError):
    """A setting is missing, out of range or contradicts another."""


class LayoutError(KVortexError, ValueError):
    """The tensors cannot be served as a paged KV cache; the message names the tensor."""


class LayoutSelfTestError(LayoutError):
    """The self-test at start-up loaded other bytes than it had saved; the message names the layer."""


class InvalidBlockIdError(KVortexError, ValueError):
    """A block id is outside of the cache, or occurs twice in one call."""


class InvalidHashError(KVortexError, ValueError):
    """A block hash is not 32 bytes, or the numbers of hashes and block ids differ."""


class EngineStateError(KVortexError, RuntimeError):
    """The engine cannot do this now: no caches are registered yet, it is shut down, or the thread is the wrong one."""


class OwnerError(KVortexError):
    """The owner of a shared pool refuses this client, or something that it asks for."""


class MemoryPoolError(KVortexError):
    """Base of the memory pools' errors."""


class OutOfPoolMemoryError(MemoryPoolError, MemoryError):
    """No extent of the requested size is free."""


class DoubleFreeError(MemoryPoolError):
    """The extent was freed before."""


class ForeignExtentError(MemoryPoolError):
    """The extent belongs to another pool, or this pool has never allocated it."""


class PoolLeakError(MemoryPoolError):
    """Memory is still allocated when the pool is closed; the message lists the owners."""


class DeviceError(KVortexError, RuntimeError):
    """A CUDA call failed; the message contains the call and CUDA's own message."""


class DeviceUnavailableError(DeviceError):
    """There is no CUDA device, or the packages for it are not installed."""


class UnsupportedKernelError(DeviceError):
    """The driver does not accept a compiled kernel, because it is older than the compiler."""
