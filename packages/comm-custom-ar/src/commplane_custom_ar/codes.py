# SPDX-License-Identifier: Apache-2.0
"""The numbers of the C ABI (``csrc/include/commplane_car.h``) by name. Pure."""

from __future__ import annotations

from typing import Final

ABI_MAJOR: Final = 2
MAX_WORLD: Final = 64
FLIGHT_RECORDS: Final = 512
RING_SLOTS: Final = 4  # chunks of one rank that may be under way at once; kRing of comm.h

DTYPES: Final[dict[str, int]] = {
    "float32": 1,
    "float16": 2,
    "bfloat16": 3,
    "float64": 4,
    "int32": 5,
    "int64": 6,
    "int8": 7,
    "uint8": 8,
}
DTYPE_BYTES: Final[dict[str, int]] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int32": 4,
    "int64": 8,
    "int8": 1,
    "uint8": 1,
}
OPS: Final[dict[str, int]] = {"sum": 1, "min": 2, "max": 3, "avg": 4}
KINDS: Final[dict[str, int]] = {
    "all_reduce": 1,
    "barrier": 2,
    "all_gather": 3,
    "reduce_scatter": 4,
    "broadcast": 5,
    "all_reduce_rms_norm": 6,
}
STATUS: Final[dict[int, str]] = {
    0: "OK",
    -1: "EINVAL",
    -2: "ENOMEM",
    -3: "ESYS",
    -4: "ENOSPC",
    -5: "EEXIST",
    -6: "ENOENT",
    -7: "ESIZE",
    -8: "EPERM",
    -9: "ETIMEDOUT",
    -10: "EABORTED",
    -11: "EMISMATCH",
    -12: "EPOISONED",
    -13: "ECLOSED",
    -14: "EBUSY",
    -15: "EUNSUPPORTED",
    -16: "ELIMIT",
    -17: "EPEERDEAD",
    -18: "EINTERRUPTED",
}
OK: Final = 0
EINVAL: Final = -1
ENOSPC: Final = -4
ETIMEDOUT: Final = -9
EABORTED: Final = -10
EMISMATCH: Final = -11
EPOISONED: Final = -12
ECLOSED: Final = -13
EBUSY: Final = -14
EUNSUPPORTED: Final = -15
EPEERDEAD: Final = -17
EINTERRUPTED: Final = -18

DTYPE_NAMES: Final = {code: name for name, code in DTYPES.items()}
OP_NAMES: Final = {code: name for name, code in OPS.items()}
KIND_NAMES: Final = {code: name for name, code in KINDS.items()}
