"""The channel between ends: who may connect, what happens to who breaks the rules, and that nobody else notices."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commplane.errors import CommplaneError, ConfigError
from commplane_disagg.channel import Channel, Down, Event, Said, Up, bind, has_ended
from commplane_disagg.channel import messages as m
from commplane_disagg.channel.frames import FrameReader, frame
from commplane_disagg.channel.link import STRANGER_LIMIT
from commplane_disagg.channel.process import identity
from commplane_disagg.channel.proof import nonce, prove, proves

pytestmark = pytest.mark.timeout(60)

TOKEN = b"shared"


class Ends:
    """Channels of one test, polled together."""

    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.events: dict[str, list[Event]] = {}

    def make(
        self, name: str, *, listens: bool = False, token: bytes | None = TOKEN, host: str = "127.0.0.1", **how: Any
    ) -> Channel:
        channel = Channel(name, token=token, listener=bind(host) if listens else None, card=name.encode(), **how)
        self.channels.append(channel)
        self.events.setdefault(name, [])
        return channel

    def poll(self) -> None:
        for channel in self.channels:
            if channel not in self.asleep:
                self.events[channel.identity.name] += channel.poll()

    asleep: tuple[Channel, ...] = ()

    def until(self, done: Callable[[], Any], deadline: float = 10.0) -> None:
        end = time.monotonic() + deadline
        while not done():
            assert time.monotonic() < end, (self.events, [c.refused for c in self.channels])
            self.poll()
            time.sleep(0.001)

    def heard(self, name: str) -> list[m.Message]:
        return [e.message for e in self.events[name] if isinstance(e, Said)]

    def downs(self, name: str) -> list[Down]:
        return [e for e in self.events[name] if isinstance(e, Down)]


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    for channel in made.channels:
        channel.close()


def connected(ends: Ends, **how: Any) -> tuple[Channel, Channel]:
    p, d = ends.make("p", listens=True, **how), ends.make("d", **how)
    assert p.address is not None
    d.dial("p", *p.address)
    ends.until(lambda: p.is_up("d") and d.is_up("p"))
    return p, d


def stranger(channel: Channel) -> socket.socket:
    assert channel.address is not None
    return socket.create_connection(channel.address, timeout=5)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_messages_arrive_in_order_in_both_directions(ends: Ends, host: str) -> None:
    p, d = ends.make("p", listens=True, host=host), ends.make("d")
    assert p.address is not None
    d.dial("p", *p.address)
    ends.until(lambda: p.is_up("d") and d.is_up("p"))
    assert isinstance(ends.events["p"][0], Up) and ends.events["p"][0].card == b"d"
    there = [m.Want(i, 0, 3, [1, 2, i]) for i in range(200)]
    back = [m.Written(i, 0, i) for i in range(200)]
    for a, b in zip(there, back, strict=True):
        assert d.send("p", a) and p.send("d", b)
    ends.until(lambda: len(ends.heard("p")) == 200 == len(ends.heard("d")))
    assert ends.heard("p") == there and ends.heard("d") == back


def test_a_million_pages_fit_into_one_message(ends: Ends) -> None:
    _, d = connected(ends)
    want = m.Want(1, 0, 1 << 20, list(range(1 << 20)))
    assert d.send("p", want)
    ends.until(lambda: ends.heard("p") == [want])


@pytest.mark.parametrize("token", [b"another", None], ids=["wrong", "none"])
def test_who_does_not_know_the_token_does_not_get_in(ends: Ends, token: bytes | None) -> None:
    p, _ = connected(ends)
    x = ends.make("x", token=token)
    assert p.address is not None
    x.dial("p", *p.address)
    ends.until(lambda: "does not know" in x.trouble("p"))
    assert not p.is_up("x") and p.is_up("d") and ends.events["x"] == []


def test_an_end_does_not_introduce_itself_to_who_does_not_know_the_token(ends: Ends) -> None:
    p, d = ends.make("p", listens=True, token=None), ends.make("d")
    assert p.address is not None
    d.dial("p", *p.address)
    ends.until(lambda: "the end that answers does not know" in d.trouble("p"))
    assert ends.events["d"] == []


def test_an_address_that_belongs_to_another_end_is_refused(ends: Ends) -> None:
    p, d = ends.make("p", listens=True), ends.make("d")
    assert p.address is not None
    d.dial("q", *p.address)
    ends.until(lambda: "belongs to 'p', wanted 'q'" in d.trouble("q"))


def test_another_version_is_told_apart_by_both(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    p, _ = connected(ends)
    with stranger(p) as sock:
        sock.sendall(frame(m.encode(m.Hello(m.VERSION + 1, nonce(), b""))))
        ends.until(lambda: any("speaks version 1, the peer 2" in why for why in p.refused))


def test_a_connection_that_breaks_is_made_again(ends: Ends) -> None:
    p, d = connected(ends)
    next(iter(p._up.values())).sock.shutdown(socket.SHUT_RDWR)
    ends.until(lambda: ends.downs("p") and ends.downs("d"))
    ends.until(lambda: p.is_up("d") and d.is_up("p"))
    assert d.send("p", m.Ack(1, 0))
    ends.until(lambda: ends.heard("p") == [m.Ack(1, 0)])


def test_a_silent_peer_is_given_up_and_taken_again_when_it_speaks(ends: Ends) -> None:
    p, d = connected(ends, beat=0.05, silence=0.4)
    for _ in range(40):  # longer than the silence that is allowed: beats keep it up
        ends.poll()
        time.sleep(0.015)
    assert p.is_up("d") and d.is_up("p") and not ends.downs("d")
    ends.asleep = (p,)
    ends.until(lambda: ends.downs("d"))
    assert "nothing was heard" in ends.downs("d")[0].why
    ends.asleep = ()
    ends.until(lambda: p.is_up("d") and d.is_up("p"))


def test_a_new_instance_takes_the_place_of_the_old_one(ends: Ends) -> None:
    p, d = connected(ends)
    again = ends.make("d", instance="the second")
    assert p.address is not None
    again.dial("p", *p.address)
    ends.until(lambda: any(isinstance(e, Up) and e.peer.instance == "the second" for e in ends.events["p"]))
    assert [e.peer.instance for e in ends.downs("p")] == [d.identity.instance]


def test_who_closes_for_good_says_so(ends: Ends) -> None:
    _, d = connected(ends)
    ends.asleep = (d,)
    d.close()
    ends.until(lambda: ends.downs("p"))
    assert ends.downs("p")[0].ended


def test_a_peer_that_does_not_read_is_cut_off_before_it_fills_the_memory(ends: Ends) -> None:
    p, d = connected(ends)
    ends.asleep = (d,)
    pages = list(range(1 << 20))
    ends.until(lambda: not p.send("d", m.Want(1, 0, 1 << 20, pages)), deadline=30)
    ends.until(lambda: ends.downs("p"))
    assert "bytes wait for it" in ends.downs("p")[0].why


def test_a_port_that_is_taken_and_an_address_that_is_not_ours_are_named() -> None:
    with bind("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port} cannot be bound"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1")


def test_who_does_not_introduce_himself_is_closed_and_stops_nobody(ends: Ends) -> None:
    p, d = connected(ends, handshake=0.3, strangers=4)
    silent = [stranger(p) for _ in range(12)]
    ends.until(lambda: len(p.refused) >= 12)
    assert any("too many connections" in why for why in p.refused) and any(
        "introduction was not over" in why for why in p.refused
    )
    assert d.send("p", m.Ack(1, 0))
    ends.until(lambda: ends.heard("p") == [m.Ack(1, 0)])
    for sock in silent:
        sock.close()


def introduced(ends: Ends, p: Channel) -> socket.socket:
    """A raw connection that has gone through the handshake."""
    sock = stranger(p)
    sock.settimeout(0.002)
    reader, bodies = FrameReader(1 << 20), []

    def take() -> m.Message | None:
        p_events = p.poll()
        ends.events["p"] += p_events
        with contextlib.suppress(TimeoutError):
            bodies.extend(reader.feed(sock.recv(1 << 16)))
        return m.decode(bodies.pop(0)) if bodies else None

    def next_one() -> m.Message:
        end = time.monotonic() + 5
        while (found := take()) is None:
            assert time.monotonic() < end
        return found

    challenge = next_one()
    assert isinstance(challenge, m.Challenge)
    mine, number = m.encode_identity(identity("raw")), nonce()
    sock.sendall(frame(m.encode(m.Hello(m.VERSION, number, mine, prove(TOKEN, "hello", challenge.nonce, number, mine)))))
    welcome = next_one()
    assert isinstance(welcome, m.Welcome)
    assert proves(welcome.proof, TOKEN, "welcome", challenge.nonce, number, welcome.identity)
    assert isinstance(next_one(), m.Card)
    sock.sendall(frame(m.encode(m.Card(b""))))
    ends.until(lambda: p.is_up("raw"))
    return sock


BAD = {
    "garbage": b"\x00\x00\x00\x04\xff\xff\xff\xff",
    "too long": struct.pack(">I", 1 << 31),
    "hello again": frame(m.encode(m.Hello(m.VERSION, nonce(), b""))),
    "unknown tag": frame(b"\x81\xa4type\xa5shout"),
    "negative room": frame(b"\x84\xa4type\xa3ack\xa4room\xff\xaageneration\x00"),
    "nested": frame(b"\x91" * 5000 + b"\xc0"),
}


@pytest.mark.parametrize("what", BAD, ids=lambda w: w.replace(" ", "-"))
def test_a_peer_that_breaks_the_rules_is_cut_off_and_nobody_else(ends: Ends, what: str) -> None:
    p, d = connected(ends)
    with introduced(ends, p) as sock:
        sock.sendall(BAD[what])
        ends.until(lambda: ends.downs("p"))
    assert [e.peer.name for e in ends.downs("p")] == ["raw"]
    assert d.send("p", m.Ack(1, 0))
    ends.until(lambda: ends.heard("p") == [m.Ack(1, 0)])


def test_a_stranger_cannot_make_an_end_hold_a_long_frame(ends: Ends) -> None:
    p, _ = connected(ends)
    with stranger(p) as sock:
        sock.sendall(struct.pack(">I", STRANGER_LIMIT + 1))
        ends.until(lambda: any(f"longer than the limit of {STRANGER_LIMIT}" in why for why in p.refused))


@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_of_a_stranger_get_him_in_or_disturb_others(fuzzed: tuple[Ends, Channel, Channel], data: bytes) -> None:
    ends, p, d = fuzzed
    with stranger(p) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        n = len(ends.heard("p"))
        assert d.send("p", m.Ack(1, 0))
        ends.until(lambda: len(ends.heard("p")) == n + 1)
    assert list(p._up) == ["d"] and not ends.downs("p")


@given(
    st.lists(st.one_of(st.binary(max_size=60).map(frame), st.sampled_from([frame(m.encode(m.Beat())), b"", b"\0"])), max_size=5)
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_of_a_peer_disturb_others(fuzzed: tuple[Ends, Channel, Channel], data: list[bytes]) -> None:
    ends, p, d = fuzzed
    with introduced(ends, p) as sock:
        sock.sendall(b"".join(data))
        sock.shutdown(socket.SHUT_WR)
        n = len(ends.heard("p"))
        assert d.send("p", m.Ack(1, 0))
        ends.until(lambda: len(ends.heard("p")) > n)
    ends.until(lambda: not p.is_up("raw"))
    assert p.is_up("d")


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[Ends, Channel, Channel]]:
    made = Ends()
    p, d = connected(made)
    yield made, p, d
    p.close()
    d.close()


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(1, 7)))
@settings(deadline=None)
def test_frames_are_cut_out_of_a_stream_however_it_comes_in(bodies: list[bytes], cuts: list[int]) -> None:
    stream, reader, out = b"".join(map(frame, bodies)), FrameReader(50), []
    while stream:
        n = cuts.pop() if cuts else len(stream)
        out += reader.feed(stream[:n])
        stream = stream[n:]
    assert out == bodies


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_bytes_are_a_message_or_a_commplane_error(data: bytes) -> None:
    try:
        message = m.decode(data)
    except CommplaneError:
        return
    assert isinstance(message, m.Message.__args__)  # type: ignore[attr-defined]


def test_a_proof_fits_one_connection_one_direction_and_one_identity() -> None:
    good = prove(TOKEN, "hello", b"a", b"d", b"me")
    assert proves(good, TOKEN, "hello", b"a", b"d", b"me")
    for wrong in [
        ("welcome", b"a", b"d", b"me"),
        ("hello", b"b", b"d", b"me"),
        ("hello", b"a", b"d", b"you"),
        ("hello", b"ad", b"", b"me"),
    ]:
        assert not proves(good, TOKEN, *wrong)
    assert not proves(b"", TOKEN, "hello", b"a", b"d", b"me")


def test_a_process_has_ended_only_when_that_is_proved() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        text = Path(f"/proc/{child.pid}/stat").read_text()
        started = int(text[text.rindex(")") + 2 :].split()[19])
        base = identity("x")
        him = m.Identity(name="x", instance="1", machine=base.machine, pid=child.pid, started=started)
        assert not has_ended(him) and not has_ended(base)
        assert has_ended(m.Identity(name="x", instance="1", machine=base.machine, pid=child.pid, started=started + 1))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(him)  # a corpse
        child.wait()
        assert has_ended(him)
        assert not has_ended(m.Identity(name="x", instance="1", machine="another", pid=child.pid, started=started))
        assert not has_ended(m.Identity(name="x", instance="1"))
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("pid", [1 << 31, 1 << 40, 1 << 53])
def test_of_a_pid_that_no_process_has_nothing_is_proved(pid: int) -> None:
    assert not has_ended(msgspec.structs.replace(identity("x"), pid=pid))


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example", "\ud800"])
def test_a_host_that_is_no_name_is_the_trouble_of_that_peer_alone(ends: Ends, host: str) -> None:
    d = ends.make("d")
    d.dial("nobody", host, 5000)
    p = ends.make("p", listens=True)
    assert p.address is not None
    d.dial("p", *p.address)
    ends.until(lambda: d.is_up("p"))
    assert "port 5000: " in d.trouble("nobody") and not d.is_up("nobody")
    with pytest.raises(ConfigError, match="cannot be used as an address"):
        bind(host)
