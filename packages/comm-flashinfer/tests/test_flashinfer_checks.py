"""What FlashInfer does not look at: each check and its text."""

import inspect

import pytest

from commplane.api import QuantFormat
from commplane_flashinfer import checks, patterns

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (checks.world_size(2), None),
        (checks.world_size(16), None),
        (checks.world_size(6), "wanted a group of 2, 4, 8, 16 ranks, found 6: use another backend for this group"),
        (checks.world_size(1), "wanted a group of 2, 4, 8, 16 ranks, found 1: use another backend for this group"),
        (checks.dtype("bfloat16"), None),
        (checks.dtype("float64"), "wanted one of bfloat16, float16, float32, found float64: convert the tensor"),
        (checks.device("residual", "cuda:0", "cuda:0"), None),
        (checks.device("residual", "cuda:0", "cpu"), "wanted a residual on cuda:0, found one on cpu: move it"),
        (checks.format_served(QuantFormat.FP8_GROUP, 9, 0), None),
        (checks.format_served(QuantFormat.NVFP4, 10, 3), None),
        (checks.format_served(QuantFormat.NVFP4, 12, 0), None),
        (
            checks.format_served(QuantFormat.NVFP4, 9, 0),
            "wanted a GPU of compute capability 10.0 or more for nvfp4, found 9.0: choose an fp8 format",
        ),
        (checks.two_shot(5, 32, 2, 4), None),
        (checks.two_shot(5, 16, 4, 4), None),
        (checks.two_shot(4, 32, 2, 4), "wanted more than 4 tokens for a two-shot of 4 ranks, found 4: use a one-shot"),
        (
            checks.two_shot(5, 24, 2, 4),
            "wanted a hidden size of 32 or more for a two-shot of 4 ranks, found 24: use a one-shot",
        ),
        (checks.launchable(4096, 2), None),
        (checks.launchable(65536, 2), None),
        (checks.launchable(32768, 4), None),
        (checks.launchable(8, 2), None),
        (checks.launchable(4, 2), "wanted a hidden size that 8 divides, found 4: pad it"),
        (checks.launchable(4, 4), None),
        (checks.launchable(0, 2), "wanted a hidden size that 8 divides, found 0: pad it"),
        (checks.launchable(2880, 2, 128), "wanted a group that divides a hidden size of 2880, found 128: take another group"),
        (checks.launchable(7168, 2, 128), None),
        (
            checks.launchable(8 * 1031, 2),
            "wanted a hidden size that goes into 8 or fewer blocks of at most 8192 elements, found 8248: "
            "pad it to a multiple of 64",
        ),
        (checks.launchable(65600, 2), "found 65600: pad it to a multiple of 64"),
        (checks.launchable(16384, 2, 16384), "that hold whole groups of 16384, found 16384"),
        (checks.capacity(4, 1024, 2, 8, 4096), None),
    ],
)
def test_a_check_gives_the_reason_or_nothing(found: str | None, wanted: str | None) -> None:
    if wanted is None or found is None:
        assert found is wanted
    elif wanted.startswith("wanted"):
        assert found == wanted
    else:
        assert wanted in found


def test_what_a_workspace_cannot_hold_says_whether_a_larger_one_helps() -> None:
    assert checks.capacity(5, 1024, 2, 8, 4096) == (
        True,
        "wanted room for 5120 elements (5 x 1024), the workspace has room for 4096: "
        "call prepare() with max_bytes of 10240 or more before",
    )
    assert checks.capacity(1 << 17, 8192, 2, 2, 1 << 40) == (
        False,
        "wanted at most 536870904 bytes with 2 ranks, found 2147483648: send it in parts",
    )


@pytest.mark.parametrize("world_size", checks.WORLD_SIZES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_no_offset_of_a_kernel_goes_round_at_the_largest_message(world_size: int, itemsize: int) -> None:
    elements = checks.MOST_BYTES // world_size // itemsize
    assert checks.capacity(1, elements, itemsize, world_size, elements) is None
    assert checks.capacity(1, elements + 1, itemsize, world_size, 1 << 40) is not None
    assert elements < 1 << 31
    assert 2 * world_size * elements * itemsize < 1 << 31  # the third buffer starts at twice this, counted in 32 bits with a sign


def launch(hidden: int, itemsize: int) -> list[tuple[int, int]]:
    """(threads of a block, blocks of a cluster) as FlashInfer widens them, for as few to as many tokens as there may be."""
    vector = 16 // itemsize
    threads, cluster = hidden // vector, 8
    while threads % cluster and cluster > 1:
        cluster //= 2
    block = threads // cluster
    while block < 128 and cluster >= 2:
        block, cluster = block * 2, cluster // 2
    out = [(block, cluster)]
    while cluster > 1 and block <= 512:
        block, cluster = block * 2, cluster // 2
        out.append((block, cluster))
    return out


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_row_that_passes_has_a_launch_and_one_that_does_not_has_none(itemsize: int) -> None:
    vector = 16 // itemsize
    for hidden in range(vector, 70000, vector * 3):
        shapes = launch(hidden, itemsize)
        fits = [block <= 1024 and block * cluster * vector == hidden for block, cluster in shapes]
        assert all(fits) if checks.launchable(hidden, itemsize) is None else not any(fits), hidden


@pytest.mark.parametrize("group", [16, 32, 96, 128, 512])
def test_no_group_lies_across_two_blocks_of_a_row_that_passes(group: int) -> None:
    for hidden in range(group, 40000, group):
        if hidden % 8 or checks.launchable(hidden, 2, group) is not None:
            continue
        for block, cluster in launch(hidden, 2):
            while cluster > 1 and block * 8 % group:
                block, cluster = block * 2, cluster // 2
            assert block * 8 % group == 0 and block <= 1024, (hidden, block, cluster)


@pytest.mark.parametrize("world_size", checks.WORLD_SIZES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_sum_is_cut_into_rows_that_have_a_launch(world_size: int, itemsize: int) -> None:
    for count in [*range(1, 8300, 7), 255, 256, 257, 4096, 4097, 8184, 8192, 12345, 1 << 20, (1 << 20) + 256]:
        for one_shot in (True, False):
            tokens, hidden, as_one = patterns.plan_shape(count, itemsize, world_size, one_shot)
            assert 0 <= tokens * hidden - count < 256
            assert checks.launchable(hidden, itemsize) is None
            assert as_one or checks.two_shot(tokens, hidden, itemsize, world_size) is None
            assert as_one or not one_shot


def test_a_short_sum_of_whole_vectors_is_not_padded() -> None:
    for count, itemsize in ((1000, 4), (264, 2), (260, 4), (8184, 2), (4092, 4)):
        assert patterns.plan_shape(count, itemsize, 2, True) == (1, count, True)
    assert patterns.plan_shape(8200, 2, 2, True) == (33, 256, True)
    assert patterns.plan_shape(8, 2, 2, True) == (1, 256, True)


@pytest.mark.parametrize("world_size", checks.WORLD_SIZES)
@pytest.mark.parametrize("major", [9, 10, 12, 13])
def test_every_group_has_a_size_up_to_which_one_shot_runs(world_size: int, major: int) -> None:
    assert 0 < patterns.one_shot_limit("auto", 1 << 40, world_size, major) <= 1 << 25
    assert patterns.one_shot_limit("auto", 100, world_size, major) == 100
    assert patterns.one_shot_limit("one_shot", 1 << 30, world_size, major) == 1 << 30
    assert patterns.one_shot_limit("two_shot", 1 << 30, world_size, major) == 0


def test_patterns_and_arguments_are_those_of_the_installed_flashinfer() -> None:
    comm = pytest.importorskip(
        "flashinfer.comm", reason="wants flashinfer-python: pip install 'commplane-flashinfer[flashinfer]'", exc_type=ImportError
    )
    real = comm.AllReduceFusionPattern
    assert real.kAllReduce == patterns.ALL_REDUCE
    assert real.kARResidualRMSNorm == patterns.NORM
    for form, name in {
        QuantFormat.FP8_STATIC: "FP8Quant",
        QuantFormat.NVFP4: "FP4Quant",
        QuantFormat.FP8_GROUP: "PerTokenGroupFP8PackedQuant",
        QuantFormat.FP8_TOKEN: "DynamicFP8Quant",
    }.items():
        assert getattr(real, f"kARResidualRMSNorm{name}") == patterns.QUANTISED[form].alone
        assert getattr(real, f"kARResidualRMSNormOut{name}") == patterns.QUANTISED[form].with_norm
    assert comm.QuantizationSFLayout.SWIZZLED_128x4 == patterns.SWIZZLED_128X4
    given = ["input", "output", "residual_in", "residual_out", "norm_out", "quant_out", "scale_out", "rms_gamma", "rms_eps"]
    given += ["scale_factor", "layout_code", "use_oneshot", "fp32_acc", "block_quant_group_size", "weight_bias", "pattern"]
    given += ["workspace", "launch_with_pdl", "trigger_completion_at_end"]
    inspect.signature(comm.allreduce_fusion).bind(**dict.fromkeys(given))
    made = ["backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype", "comm_backend"]
    inspect.signature(comm.create_allreduce_fusion_workspace).bind(**dict.fromkeys(made))


def test_the_imitation_takes_what_the_installed_flashinfer_takes() -> None:
    comm = pytest.importorskip(
        "flashinfer.comm", reason="wants flashinfer-python: pip install 'commplane-flashinfer[flashinfer]'", exc_type=ImportError
    )
    from flashinfer_kernels import Comm

    real, ours = (inspect.signature(f).parameters.values() for f in (comm.allreduce_fusion, Comm().allreduce_fusion))
    defaults = [(p.name, p.kind, p.default) for p in real]
    assert [(p.name, p.kind, p.default) for p in ours][: len(defaults)] == defaults
