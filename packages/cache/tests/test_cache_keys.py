import hashlib

import numpy as np
import pytest

from commplane.errors import ConfigError
from commplane_cache.keys import KEY_BYTES, KeyScheme, next_key, page_keys, root

pytestmark = pytest.mark.timeout(20)
SCHEME = {
    "model": "m",
    "revision": "r1",
    "dtype": "bfloat16",
    "page_tokens": 16,
    "layout": "layer,kv,token,head,dim",
    "shard": "heads 0-3",
}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model", "m2"),
        ("revision", "r2"),
        ("dtype", "float16"),
        ("page_tokens", 32),
        ("layout", "kv,layer"),
        ("shard", "heads 4-7"),
    ],
)
def test_whatever_changes_the_bytes_of_a_page_changes_the_namespace(name, other):
    one, two = KeyScheme(**SCHEME), KeyScheme(**{**SCHEME, name: other})
    assert one.namespace != two.namespace
    assert one.digest() != two.digest()
    assert len(one.digest()) == KEY_BYTES
    assert KeyScheme(**SCHEME).namespace == one.namespace


def test_a_value_cannot_run_over_into_its_neighbour():
    one = KeyScheme(**{**SCHEME, "model": "a' revision='b", "revision": "c"})
    two = KeyScheme(**{**SCHEME, "model": "a", "revision": "b' revision='c"})
    assert one.namespace != two.namespace


def test_a_scheme_that_leaves_something_open_is_refused():
    with pytest.raises(ConfigError, match="found nothing for revision"):
        KeyScheme(**{**SCHEME, "revision": ""})
    with pytest.raises(ConfigError, match="at least one token in a page, found 0"):
        KeyScheme(**{**SCHEME, "page_tokens": 0})
    with pytest.raises(TypeError, match="'shard'"):  # no default: ranks that hold different parts would serve each other's
        KeyScheme(**{name: value for name, value in SCHEME.items() if name != "shard"})


def test_a_key_names_the_whole_prefix_and_full_pages_only():
    tokens = list(range(70))
    keys = page_keys(tokens, 16)
    assert len(keys) == 4  # 6 tokens are left over
    assert all(len(key) == KEY_BYTES for key in keys)
    assert page_keys(tokens[:40], 16) == keys[:2]
    other = page_keys([1, *tokens[1:]], 16)
    assert not set(keys) & set(other)  # one token at the start changes every key after it
    assert page_keys(tokens[32:], 16, parent=keys[1]) == keys[2:]
    assert page_keys([], 16) == []


def test_keys_are_those_that_the_page_says_whatever_holds_the_tokens():
    tokens = [5, 0, 2**31 - 1, 7]
    expected = hashlib.sha256(root() + np.array(tokens, "<i4").tobytes()).digest()
    assert next_key(root(), np.array(tokens, "<i4").tobytes()) == expected
    for holder in (tokens, tuple(tokens), np.array(tokens), np.array(tokens, np.int32), np.array(tokens, np.uint64)):
        assert page_keys(holder, 4) == [expected]


def test_another_salt_is_another_tree_of_keys():
    assert root(b"adapter 1") != root(b"adapter 2") != root()
    assert page_keys(range(16), 16, root(b"adapter 1")) != page_keys(range(16), 16)


@pytest.mark.parametrize("tokens", [np.array([1, 2**32 + 1]), np.array([0.5, 1.0])])
def test_ids_that_would_be_cut_to_fit_are_refused(tokens):
    with pytest.raises(ConfigError, match="below 2\\*\\*31"):
        page_keys(tokens, 1)
