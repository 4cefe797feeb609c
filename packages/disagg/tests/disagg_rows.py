"""Rows and topologies as the registry's tests want them."""

from __future__ import annotations

from typing import Any

from commplane_disagg.registry import new_instance
from commplane_disagg.wire import Coordinate, Row, Topology

TOKEN = b"a token of the tests"


def topology(**changed: Any) -> Topology:
    return Topology(**{"tp": 2, "page_size": 16, "kv_dtype": "bfloat16", "layers": 4, "kv_heads": 2, "head_dim": 8, **changed})


def row(tp: int = 0, **changed: Any) -> Row:
    known = {"key": Coordinate(tp=tp), "host": "127.0.0.1", "port": 7000 + tp, "instance": new_instance()}
    return Row(**{**known, **changed})
