"""What FlashInfer does not look at and its kernels then get wrong: pure functions of numbers, no torch.

Each answers with the reason or None. Not repeated is what the communicator has looked at before a backend is called: shapes,
dtypes, devices and layouts of residual and weight against the tensor, eps and weight_bias, the group or block size of a format
against hidden, and a scale's shape, dtype and device. Outputs cannot be missing, they are made here.
"""

from __future__ import annotations

from commplane.api import QuantFormat

__all__ = ["MOST_BYTES", "WORLD_SIZES", "capacity", "device", "dtype", "format_served", "launchable", "two_shot", "world_size"]

WORLD_SIZES = (2, 4, 8, 16)
"""That the kernels are compiled for."""
DTYPES = ("bfloat16", "float16", "float32")
MOST_BYTES = (1 << 30) - 1
"""Of world size x message: twice of more is no positive number in 32 bits, which the kernels' third buffer begins at. With it
T x hidden stays below 2^31 too."""

_ACCESS = 16  # bytes that a thread reads at once
_MOST_CLUSTER = 8
_MOST_THREADS = 1024


def world_size(found: int) -> str | None:
    """Of a number of ranks."""
    if found in WORLD_SIZES:
        return None
    return f"wanted a group of {', '.join(map(str, WORLD_SIZES))} ranks, found {found}: use another backend for this group"


def dtype(found: str) -> str | None:
    """Of torch's name of a dtype."""
    if found in DTYPES:
        return None
    return f"wanted one of {', '.join(DTYPES)}, found {found}: convert the tensor"


def device(name: str, wanted: object, found: object) -> str | None:
    """Of a tensor's device."""
    return None if wanted == found else f"wanted a {name} on {wanted}, found one on {found}: move it"


def format_served(how: QuantFormat, major: int, minor: int) -> str | None:
    """Of a format on a GPU of that compute capability. Below 10.0 the NVFP4 kernels write zeros and no scales."""
    if how is not QuantFormat.NVFP4 or major >= 10:
        return None
    return f"wanted a GPU of compute capability 10.0 or more for nvfp4, found {major}.{minor}: choose an fp8 format"


def capacity(tokens: int, hidden: int, itemsize: int, world_size: int, most: int) -> tuple[bool, str] | None:
    """Of a message of tokens x hidden, where the workspace holds `most` elements.

    Returns:
        Whether a larger workspace would help, and the reason.
    """
    elements = tokens * hidden
    whole = world_size * elements * itemsize
    if whole > MOST_BYTES:
        each = MOST_BYTES // world_size // 8 * 8
        return False, f"wanted at most {each} bytes with {world_size} ranks, found {elements * itemsize}: send it in parts"
    if elements > most:
        return True, (
            f"wanted room for {elements} elements ({tokens} x {hidden}), the workspace has room for {most}: "
            f"call prepare() with max_bytes of {elements * itemsize} or more before"
        )
    return None


def two_shot(tokens: int, hidden: int, itemsize: int, world_size: int) -> str | None:
    """Of a two-shot, where each rank sums its share of the tokens and a block of threads has one for each rank."""
    if tokens <= world_size:
        return f"wanted more than {world_size} tokens for a two-shot of {world_size} ranks, found {tokens}: use a one-shot"
    least = world_size * _ACCESS // itemsize
    if hidden < least:  # longer rows have blocks of 128 threads or more, or one block for the row
        return f"wanted a hidden size of {least} or more for a two-shot of {world_size} ranks, found {hidden}: use a one-shot"
    return None


def launchable(hidden: int, itemsize: int, group: int = 0) -> str | None:
    """Of a row: a thread takes 16 bytes of it, a block up to 1024 threads, a cluster up to 8 blocks.

    Args:
        hidden: elements of a row.
        itemsize: bytes of one.
        group: of fp8_group, else 0. No group may lie across two blocks.
    """
    vector = _ACCESS // itemsize
    if hidden < 1 or hidden % vector:
        return f"wanted a hidden size that {vector} divides, found {hidden}: pad it"
    threads, cluster = hidden // vector, _MOST_CLUSTER
    while threads % cluster:
        cluster //= 2
    block = threads // cluster
    if group:
        if hidden % group:
            return f"wanted a group that divides a hidden size of {hidden}, found {group}: take another group"
        while cluster > 1 and block * vector % group:
            block, cluster = block * 2, cluster // 2
    if block > _MOST_THREADS:
        groups = f" that hold whole groups of {group}" if group else ""
        return (
            f"wanted a hidden size that goes into {_MOST_CLUSTER} or fewer blocks of at most {_MOST_THREADS * vector} "
            f"elements{groups}, found {hidden}: pad it to a multiple of {_MOST_CLUSTER * vector}"
        )
    return None
