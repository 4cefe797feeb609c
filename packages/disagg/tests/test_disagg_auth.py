"""The shared token, and the hosts that a row may have."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commplane.errors import ConfigError
from commplane_disagg.registry.addresses import is_wildcard, reachable_host
from commplane_disagg.registry.auth import (
    ENVIRONMENT,
    SCHEME,
    WINDOW,
    Refused,
    Signer,
    Verifier,
    answer,
    challenge,
    metrics_token,
    read_token,
)
from commplane_disagg.registry.refusals import BadAddress

pytestmark = pytest.mark.timeout(60)

TOKEN = b"a token of the tests"
REQUEST = ("PUT", "/v1/groups/prefill/rows?x=1", "application/msgpack", b"body")


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_signed_request_is_taken_once() -> None:
    clock = Clock()
    verifier, header = Verifier(TOKEN, clock), Signer(TOKEN, clock).header(*REQUEST)
    verifier.check(header, *REQUEST)
    with pytest.raises(Refused, match="the request was sent before") as caught:
        verifier.check(header, *REQUEST)
    assert caught.value.reason == "replay"
    clock.now += WINDOW + 1
    with pytest.raises(Refused, match=r"the request's clock is 31.0 s behind the server's, at most 30 s") as caught:
        verifier.check(header, *REQUEST)
    assert caught.value.reason == "time"


@pytest.mark.parametrize("part", range(4))
def test_whatever_is_changed_on_the_way_is_noticed(part: int) -> None:
    header = Signer(TOKEN).header(*REQUEST)
    changed = list(REQUEST)
    changed[part] = changed[part] + (b"." if isinstance(changed[part], bytes) else ".")  # type: ignore[operator]
    with pytest.raises(Refused, match="signed with another token, or changed on its way"):
        Verifier(TOKEN).check(header, *changed)  # type: ignore[arg-type]


def test_nothing_can_be_moved_between_the_signed_parts() -> None:
    header = Signer(TOKEN).header("PUT", "/a", "b", b"c")
    for moved in (("PUT", "/a\nb", "", b"c"), ("PUT\n/a", "b", "", b"c"), ("PUT", "/a", "bc", b"")):
        with pytest.raises(Refused, match="another token"):
            Verifier(TOKEN).check(header, *moved)


def test_an_answer_is_taken_only_from_who_has_the_token_and_only_for_its_own_request() -> None:
    signer, verifier = Signer(TOKEN), Verifier(TOKEN)
    header, other = signer.header(*REQUEST), signer.header(*REQUEST)
    answer = (200, "application/msgpack", b"rows")
    info = verifier.answer(verifier.check(header, *REQUEST), *answer)
    assert signer.authentic(header, info, *answer)
    assert not signer.authentic(other, info, *answer)
    for changed in ((409, *answer[1:]), (200, "application/json", b"rows"), (*answer[:2], b"others")):
        assert not signer.authentic(header, info, *changed)
    for made_up in (None, "", info[:-1], Verifier(b"another token of tests").answer("nonce", *answer), "é"):
        assert not signer.authentic(header, made_up, *answer)


def test_another_token_and_another_time_are_refused() -> None:
    with pytest.raises(Refused) as caught:
        Verifier(TOKEN).check(Signer(b"another token of tests").header(*REQUEST), *REQUEST)
    assert caught.value.reason == "mac"
    moment, nonce = "nan", "0123456789abcdef"
    header = Signer(TOKEN).header(*REQUEST)
    forged = f"{SCHEME} {moment}:{nonce}:{header.rsplit(':', 1)[1]}"
    with pytest.raises(Refused):
        Verifier(TOKEN).check(forged, *REQUEST)


@pytest.mark.parametrize("moment", [float("nan"), float("inf"), -1e15])
def test_a_clock_without_a_time_is_refused_though_the_mac_is_right(moment: float) -> None:
    with pytest.raises(Refused, match="clock is"):
        Verifier(TOKEN).check(Signer(TOKEN, lambda: moment).header(*REQUEST), *REQUEST)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.none(), st.text(max_size=200), st.text(max_size=120).map(lambda text: f"{SCHEME} {text}")))
def test_no_header_but_a_signed_one_gets_in_and_none_breaks_the_check(header: str | None) -> None:
    with pytest.raises(Refused):
        Verifier(TOKEN).check(header, *REQUEST)
    assert not Verifier(TOKEN).metrics(header)


def test_nonces_are_forgotten_when_their_requests_are_too_old_to_be_taken() -> None:
    clock = Clock()
    verifier, signer = Verifier(TOKEN, clock), Signer(TOKEN, clock)
    for _ in range(100):
        clock.now += 1
        verifier.check(signer.header(*REQUEST), *REQUEST)
    assert len(verifier._seen) <= WINDOW + 2
    assert len(verifier._seen) == len(verifier._order)


def test_the_scrapers_token_opens_nothing_else() -> None:
    verifier = Verifier(TOKEN)
    assert verifier.metrics(f"Bearer {metrics_token(TOKEN)}")
    assert not verifier.metrics(f"Bearer {TOKEN.decode()}")
    with pytest.raises(Refused):
        verifier.check(f"Bearer {metrics_token(TOKEN)}", *REQUEST)


def test_peers_prove_the_token_without_saying_it_and_an_answer_cannot_be_sent_back() -> None:
    asked = challenge() + challenge()
    assert answer(TOKEN, asked, "decode") == answer(TOKEN, asked, "decode")
    assert answer(TOKEN, asked, "decode") != answer(TOKEN, asked, "prefill")
    assert answer(TOKEN, asked, "decode") != answer(b"another token of tests", asked, "decode")
    assert challenge() != challenge()


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, f" {TOKEN.decode()}\n")
    assert read_token() == TOKEN
    file = tmp_path / "token"
    file.write_bytes(b"the token of a file\n")
    file.chmod(0o600)
    assert read_token(file) == b"the token of a file"
    file.chmod(0o604)
    with pytest.raises(ConfigError, match=r"can be read by everybody \(mode 0604\): chmod 600 it"):
        read_token(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_token(tmp_path / "absent")


@pytest.mark.parametrize(
    ("value", "text"), [("", "found none: set COMMPLANE_DISAGG_TOKEN"), ("short", "at least 16 bytes, found 5")]
)
def test_a_missing_or_short_token_is_an_error_that_says_what_to_do(
    value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, value)
    with pytest.raises(ConfigError, match=text):
        read_token()


@pytest.mark.parametrize("host", ["", "*", "0.0.0.0", "::", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0"])
def test_wildcards_are_refused_or_rewritten(host: str) -> None:
    assert is_wildcard(host)
    with pytest.raises(BadAddress, match=r"that is a wildcard; give this machine's own, or ask for the address that"):
        reachable_host(host, "10.0.0.9", rewrite=False)
    assert reachable_host(host, "10.0.0.9", rewrite=True) == "10.0.0.9"
    assert reachable_host(host, "::ffff:10.0.0.9", rewrite=True) == "10.0.0.9"
    assert reachable_host(host, "2001:db8::9", rewrite=True) == "2001:db8::9"
    with pytest.raises(BadAddress):
        reachable_host(host, None, rewrite=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "LOCALHOST."])
def test_loopback_is_right_only_for_who_came_from_there(host: str) -> None:
    assert reachable_host(host, "127.0.0.1", rewrite=False) == host
    assert reachable_host(host, None, rewrite=False) == host
    with pytest.raises(BadAddress, match=r"the rank registered from 10\.0\.0\.9"):
        reachable_host(host, "10.0.0.9", rewrite=False)


def test_loopback_of_another_machine_is_rewritten_on_request() -> None:
    assert reachable_host("127.0.1.1", "10.0.0.9", rewrite=True) == "10.0.0.9"


@pytest.mark.parametrize("host", ["10.0.0.1", "2001:db8::1", "node-3", "node_3.cluster.local", "a.b."])
def test_addresses_and_names_are_kept(host: str) -> None:
    assert reachable_host(host, "10.0.0.9", rewrite=False) == host
    assert reachable_host(host, "10.0.0.9", rewrite=True) == host


def test_one_address_has_one_form() -> None:
    assert reachable_host("2001:DB8:0::1", None, rewrite=False) == "2001:db8::1"
    assert reachable_host("::ffff:10.0.0.1", None, rewrite=False) == "10.0.0.1"


@pytest.mark.parametrize(
    "host", ["224.0.0.1", "ff02::1", "255.255.255.255", "fe80::1", "169.254.1.1", "1.2.3", "a b", "-a", "a/b", "é"]
)
def test_what_peers_cannot_reach_is_refused_also_when_a_rewrite_was_asked_for(host: str) -> None:
    for rewrite in (False, True):
        with pytest.raises(BadAddress, match="a row wants an address that peers reach"):
            reachable_host(host, "10.0.0.9", rewrite=rewrite)
