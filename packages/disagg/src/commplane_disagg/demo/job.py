"""What the demo is asked for, what a rank is told, and what it answers."""

from __future__ import annotations

import msgspec

from commplane.errors import ConfigError

__all__ = ["DECODE_NODE", "FAULTS", "PREFILL_NODES", "Arrived", "Job", "Options", "Outcome", "Sent", "node_of"]

PREFILL_NODES = 2
DECODE_NODE = 2
"""The last of three."""

FAULTS = {
    "kill-prefill": "the last prefill rank is killed",
    "stop-prefill": "the last prefill rank is stopped, and stays so",
    "kill-decode": "the first decode rank is killed",
    "registry": "the registry ends",
    "unplug": "the second prefill node is without its cable for two seconds",
    "cut": "the second prefill node loses its cable for good",
}
"""Name -> what happens."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One demo.

    Attributes:
        prompts: one room each.
        tokens: new tokens of each.
        prefill_tp: ranks, dealt over two nodes.
        decode_tp: ranks, all on the third node.
        engine: name of the transfer engine; "" takes ``shm`` where every rank can map the others' memory, else ``tcp``.
        port_sync: False registers as upstream did, each node at its own port.
        network: ``"namespaces"`` or ``"loopback"``.
        mbit: what each prefill node may send, in megabits a second; 0: not limited. Namespaces only.
        fault: what happens once the first room has arrived, of `FAULTS`; "" nothing.
        timeout: seconds for any one wait and for any one room.
    """

    prompts: tuple[str, ...]
    tokens: int = 24
    prefill_tp: int = 2
    decode_tp: int = 1
    engine: str = ""
    port_sync: bool = True
    network: str = "namespaces"
    mbit: float = 0.0
    fault: str = ""
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ConfigError("the demo wants at least one prompt, and none that is empty")
        if self.fault and self.fault not in FAULTS:
            raise ConfigError(f"no fault {self.fault!r}: wanted one of {', '.join(FAULTS)}")
        if self.fault in ("unplug", "cut") and self.network != "namespaces":
            raise ConfigError(f"fault {self.fault!r} wants network namespaces, a loopback address has no cable")
        if self.mbit and self.network != "namespaces":
            raise ConfigError("--mbit wants network namespaces, a loopback address has no link")
        if self.fault and (len(self.prompts) < 2 or self.prefill_tp < 2):
            raise ConfigError(
                f"fault {self.fault!r} wants two prompts and two prefill ranks, found {len(self.prompts)} and {self.prefill_tp}"
            )
        if self.tokens < 1 or self.timeout <= 0 or min(self.prefill_tp, self.decode_tp) < 1:
            raise ConfigError("the demo wants at least one token and one rank on each side, and a timeout above 0")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part.

    Attributes:
        side: ``"prefill"`` or ``"decode"``.
        rank: in its side; also its tp rank.
        addresses: of all nodes.
        store: host and port where the ranks of a side meet.
        token: the shared one.
        options: of the demo.
        prompts: the prompts as tokens.
    """

    side: str
    rank: int
    addresses: tuple[str, ...]
    store: tuple[str, int]
    token: bytes
    options: Options
    prompts: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Ranks of this side."""
        return self.options.prefill_tp if self.side == "prefill" else self.options.decode_tp

    @property
    def node(self) -> int:
        """On which this rank is."""
        return node_of(self.side, self.rank, self.size)

    @property
    def host(self) -> str:
        """Address of its node."""
        return self.addresses[self.node]


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A room on a prefill rank: first token, seconds of computing, and seconds from the last page to its acknowledgement."""

    token: int
    computing: float
    moving: float


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    """One room on a decode rank: the answer, and a checksum of each whole page of the prompt as it arrived."""

    tokens: tuple[int, ...]
    pages: tuple[int, ...]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a rank ended.

    Attributes:
        error: name of the class of the error that ended it, or "".
        message: its text.
        bound: port that its node had bound for a registry, 0 for none.
        used: port at which it looked for the registry.
        engine: that was agreed on.
        refused: the engines before it, and why not these.
        sent: by room, on prefill.
        arrived: by room, on decode.
    """

    error: str = ""
    message: str = ""
    bound: int = 0
    used: int = 0
    engine: str = ""
    refused: dict[str, str] = {}
    sent: dict[int, Sent] = {}
    arrived: dict[int, Arrived] = {}


def node_of(side: str, rank: int, size: int) -> int:
    """The node of a rank: prefill ranks are dealt in runs over the first two, decode ranks are on the third."""
    return rank * PREFILL_NODES // size if side == "prefill" else DECODE_NODE
