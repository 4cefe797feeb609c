"""What a workspace takes and holds: the formulas against FlashInfer's own arithmetic, and their bounds."""

from __future__ import annotations

from typing import Any

import pytest

from commplane.errors import ConfigError
from commplane_flashinfer import capacity
from commplane_flashinfer.settings import DEFAULTS, Settings

hypothesis = pytest.importorskip("hypothesis", reason="wants hypothesis: pip install hypothesis")
given, st = hypothesis.given, hypothesis.strategies

pytestmark = pytest.mark.timeout(30)
MIB = 1 << 20
sizes = st.sampled_from(capacity.WORLD_SIZES)


@pytest.mark.parametrize(
    ("world_size", "tokens", "hidden", "mib"), [(2, 8192, 4096, 512), (4, 2048, 4096, 256), (8, 2048, 7168, 896)]
)
def test_memory_is_four_times_ranks_times_message_and_a_little(world_size: int, tokens: int, hidden: int, mib: int) -> None:
    assert capacity.physical(world_size, tokens * hidden, 2) == mib * MIB + 3 * 2 * MIB


def test_the_smallest_takes_three_units() -> None:
    assert capacity.allocations(2, 1, 2) == (2 * MIB, 2 * MIB, 2 * MIB)


@given(sizes, st.integers(1, 1 << 28), st.sampled_from([2, 4]))
def test_physical_memory_covers_what_the_kernels_use_and_not_three_units_more(n: int, elements: int, itemsize: int) -> None:
    wanted = 4 * n * elements * itemsize + n * 1024
    got = capacity.physical(n, elements, itemsize)
    assert wanted <= got <= wanted + 3 * (capacity.GRANULARITY + 2048 + 16)
    assert all(part % capacity.GRANULARITY == 0 for part in capacity.allocations(n, elements, itemsize))


@given(sizes, st.sampled_from([2, 4]))
def test_the_largest_workspace_is_the_last_of_whole_rows_whose_offsets_fit(n: int, itemsize: int) -> None:
    most = capacity.largest(n, itemsize)
    assert most == capacity.rounded(most)
    assert 2 * n * most * itemsize < 1 << 31 <= 2 * n * (most + 4096) * itemsize


@given(st.integers(1, 1 << 28))
def test_tokens_times_hidden_holds_the_message_with_less_than_a_row_too_many(elements: int) -> None:
    tokens, hidden = capacity.shape(elements)
    assert elements <= tokens * hidden < elements + hidden


@given(sizes, st.integers(4096, 60 * MIB), st.integers(4096, 4 * MIB), st.integers(4096, 64 * MIB))
def test_settings_hold_at_open_no_more_than_at_most_and_all_that_they_declare(
    n: int, most: int, single: int, opened: int
) -> None:
    options = {**DEFAULTS, "max_bytes": most, "float32_max_bytes": single, "open_bytes": opened, "max_workspace_bytes": 1 << 40}
    found = Settings.of(options, n, "[tp rank 0/2 flashinfer]")
    assert found.most[0] * 2 >= most // 2 * 2
    assert found.at_open[0] <= found.most[0]
    assert found.at_open[0] * 2 >= min(opened, most // 2 * 2), found
    assert found.at_open[1] <= found.most[1]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"multicast": True},
            "multicast: wanted false, found True: this release calls only kernels that need no NVLink multicast",
        ),
        ({"algorithm": "ring"}, "algorithm: wanted auto, one_shot or two_shot, found 'ring'"),
        ({"max_tokens": 8}, "hidden: wanted more than 0, found 0: max_tokens is set, and they are a product"),
        ({"hidden": 8}, "max_tokens: wanted more than 0, found 0: hidden is set, and they are a product"),
        ({"max_tokens": -1}, "max_tokens: wanted 0 or more, found -1"),
        ({"max_bytes": 5}, "max_bytes: wanted 4096 or more, found 5"),
        ({"float32_max_bytes": 5}, "float32_max_bytes: wanted 4096 or more, found 5"),
        ({"open_bytes": 5}, "open_bytes: wanted 0 for all, or 4096 and more: the backend is tried before it is used, found 5"),
        (
            {"max_tokens": 65536, "hidden": 8192},
            "max_tokens: wanted messages of at most 536862720 bytes among 2 ranks, found 65536 (1073741824 bytes): the kernels",
        ),
        (
            {"max_bytes": 256 * MIB},
            "max_workspace_bytes: wanted at least 2168455168 bytes for messages of 268435456 bytes, and 1048576 bytes of "
            "float32, found 1073741824: raise it",
        ),
    ],
)
def test_a_setting_out_of_its_range_is_an_error_that_says_what_to_do(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.of({**DEFAULTS, **changed}, 2, "[tp rank 0/2 flashinfer]")
    assert f"[tp rank 0/2 flashinfer] setting {text}" in str(caught.value)
