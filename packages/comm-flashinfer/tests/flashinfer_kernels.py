"""FlashInfer's all-reduce kernels as they behave, on CPU: the ranks are threads, and the arguments mean what they mean in 0.7.2.

What its kernels do silently, read a null pointer or memory as another dtype, raises here. Its own ValueErrors are kept. Every
wait for the other ranks has a deadline.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEADLINE = 10.0
FP8 = torch.float8_e4m3fn
# pattern -> (its quantisation, whether it writes norm_out)
WRITES = {
    1: (None, True),
    2: ("fp8", False),
    3: ("fp4", False),
    4: ("fp8", True),
    5: ("fp4", True),
    8: ("group", False),
    9: ("group", True),
    10: ("dynamic", False),
    11: ("dynamic", True),
}
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


class IllegalAccess(RuntimeError):
    """What is an illegal memory access, or silent corruption, on a GPU."""


@dataclass
class Group:
    """The ranks that meet in a kernel."""

    world_size: int
    major: int = 10
    slots: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.world_size, timeout=DEADLINE)

    def swap(self, rank: int, mine: Any) -> list[Any]:
        """What each rank brought, in the order of ranks."""
        self.slots[rank] = mine
        self._barrier.wait()
        found = [self.slots[r] for r in range(self.world_size)]
        self._barrier.wait()
        return found


@dataclass(eq=False)
class FusionWorkspace:
    """Of one rank, for `most` elements."""

    group: Group
    rank: int
    most: int
    single: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.group.world_size


@dataclass
class Comm:
    """The part of `flashinfer.comm` that makes calls, for one rank. `calls` is what it was called with."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def allreduce_fusion(
        self,
        input: Tensor,  # noqa: A002  FlashInfer's name
        workspace: Any,
        pattern: int,
        launch_with_pdl: bool = False,
        trigger_completion_at_end: bool = True,
        output: Tensor | None = None,
        residual_out: Tensor | None = None,
        norm_out: Tensor | None = None,
        quant_out: Tensor | None = None,
        scale_out: Tensor | None = None,
        residual_in: Tensor | None = None,
        rms_gamma: Tensor | None = None,
        rms_eps: float = 1e-6,
        scale_factor: Tensor | float | None = None,
        layout_code: int | None = None,
        use_oneshot: bool | None = None,
        fp32_acc: bool = False,
        moe_reduction_device_num_experts: int | None = None,
        moe_reduction_scale_input: Tensor | None = None,
        moe_reduction_active_experts_token_input: Tensor | None = None,
        moe_reduction_token_input: Tensor | None = None,
        expanded_idx_to_permuted_idx: Tensor | None = None,
        expert_scale_factor: Tensor | None = None,
        shared_expert_output: Tensor | None = None,
        block_quant_group_size: int | None = None,
        weight_bias: float = 0.0,
        *,
        moe_finalize_backend: str = "trtllm",
    ) -> Tensor | None:
        """As FlashInfer's."""
        self.calls.append({k: v for k, v in locals().items() if k != "self"})
        tokens, hidden = input.shape
        if pattern in (8, 9):
            _check_group(tokens, hidden, scale_out, block_quant_group_size)
        if pattern in (10, 11):
            _check_dynamic(input, tokens, residual_in, residual_out, rms_gamma, quant_out, scale_out)
            if pattern == 11 and norm_out is None:
                raise ValueError("norm_out is required")
        if output is None and pattern not in (10, 11):
            self.calls[-1]["allocated"] = True
            output = torch.empty_like(input)
        named = {"input": input, "output": output, "residual_in": residual_in, "residual_out": residual_out}
        named |= {"norm_out": norm_out, "quant_out": quant_out}
        for name, tensor in named.items():
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        if tokens * hidden > workspace.most or workspace.single != (input.dtype == torch.float32):
            raise ValueError("Workspace validation failed")
        assert use_oneshot or tokens > workspace.world_size, "sequence length should be larger than tp_size"
        if hidden % (16 // input.itemsize):
            raise RuntimeError("params.hidden_dim % VEC_SIZE != 0")
        threads = (
            hidden * input.itemsize // 16
        )  # of a row; of 128 and more no block has fewer, which is more than any group's ranks
        if not use_oneshot and threads < workspace.world_size:
            raise RuntimeError("not oneshot, or block_size < nranks")
        for name, tensor in named.items():
            _pointer(name, tensor)
            if tensor is not None and name != "quant_out" and tensor.dtype != input.dtype:
                raise IllegalAccess(f"{name} of {tensor.dtype} is read as {input.dtype}")
        quantised, writes_norm = WRITES.get(pattern, (None, False))
        needs: dict[str, Any] = {"output": output}
        if pattern:
            needs = {"residual_in": residual_in, "residual_out": residual_out, "rms_gamma": rms_gamma}
            needs |= {"norm_out": norm_out} if writes_norm else {}
            needs |= {"quant_out": quant_out} if quantised else {}
            needs |= {"scale_factor": scale_factor} if quantised in ("fp8", "fp4") else {}
            needs |= {"scale_out": scale_out} if quantised not in ("fp8", None) else {}
        for name, value in needs.items():
            if value is None:
                raise IllegalAccess(f"{name} is a null pointer")
        self._run(locals())
        return norm_out if norm_out is not None else quant_out if quant_out is not None else output

    def _run(self, a: dict[str, Any]) -> None:
        workspace, dtype = a["workspace"], a["input"].dtype
        launch = (a["pattern"], tuple(a["input"].shape), a["use_oneshot"], a["block_quant_group_size"])
        sent = a["input"].detach().clone()
        if a["use_oneshot"]:
            sent[sent == 0] = 0.0  # -0.0 is the mark of what is not there yet
        brought = workspace.group.swap(workspace.rank, (launch, sent))
        if any(other[0] != launch for other in brought):
            raise IllegalAccess(f"ranks launch differently: {[other[0] for other in brought]}")
        total = brought[0][1].float()
        for _, more in brought[1:]:
            total = total + more.float() if a["fp32_acc"] else (total + more.float()).to(dtype).float()
        reduced = total.to(dtype)
        if not a["pattern"]:
            a["output"].copy_(reduced)
            return
        v = (reduced.float() + a["residual_in"].detach().float()).to(dtype)
        a["residual_out"].detach().copy_(v)
        wide = v.float()
        root = torch.rsqrt((wide * wide).sum(-1, keepdim=True) / wide.shape[-1] + a["rms_eps"])
        norm = (wide * root * (a["weight_bias"] + a["rms_gamma"].detach().float())).to(dtype)
        if a["writes_norm"]:
            a["norm_out"].detach().copy_(norm)
        if a["quantised"]:
            getattr(self, "_" + a["quantised"])(norm.float(), a)

    def _fp8(self, norm: Tensor, a: dict[str, Any]) -> None:
        a["quant_out"].copy_((norm * (1.0 / a["scale_factor"].reshape(()))).clamp(-448.0, 448.0).to(FP8))

    def _dynamic(self, norm: Tensor, a: dict[str, Any]) -> None:
        scale = torch.fmax(_largest(norm) / 448.0, torch.tensor(1.0 / 512.0 / 448.0))
        a["scale_out"].copy_(scale[:, None])
        a["quant_out"].copy_(_into_fp8(norm / scale[:, None]))

    def _group(self, norm: Tensor, a: dict[str, Any]) -> None:
        size, out = a["block_quant_group_size"], a["scale_out"]
        tokens, hidden = norm.shape
        groups = norm.view(tokens, hidden // size, size)
        bits = torch.fmax(_largest(groups) / 448.0, torch.tensor(1e-10)).contiguous().view(torch.int32)
        bits = torch.where(bits & 0x7FFFFF != 0, (bits + 0x800000) & 0x7F800000, bits)
        a["quant_out"].view(tokens, -1).copy_(_into_fp8(groups / bits.view(torch.float32)[..., None]).view(tokens, hidden))
        for token in range(tokens):
            for word in range(out.shape[1]):
                four = [int(b) >> 23 for b in bits[token, 4 * word : 4 * word + 4]]
                value = sum(b << 8 * i for i, b in enumerate(four))
                out[token, word] = value - (1 << 32) if value >= 1 << 31 else value

    def _fp4(self, norm: Tensor, a: dict[str, Any]) -> None:
        if a["workspace"].group.major < 10 or a["input"].dtype == torch.float32:
            a["quant_out"].zero_()  # the kernel does nothing on older GPUs, and says nothing
            return
        tokens, hidden = norm.shape
        given, out = a["scale_factor"].reshape(()), a["scale_out"]
        blocks = norm.view(tokens, hidden // 16, 16)
        stored = (given * (_largest(blocks) * torch.tensor(1.0 / 6.0))).clamp(-448.0, 448.0).to(FP8)
        scale = stored.float()
        factor = torch.where(scale != 0, given / scale, torch.zeros_like(scale))
        scaled = (blocks * factor[..., None]).view(tokens, hidden)
        far = (scaled.abs()[..., None] - torch.tensor(_E2M1)).abs()
        nearest = far.min(-1, keepdim=True).values
        codes = torch.arange(8)
        even_first = torch.where(far == nearest, codes % 2 * 8 + codes, 99).min(-1).values % 8
        code = torch.where(scaled.abs() > 6.0, 7, even_first) + 8 * torch.signbit(scaled)
        a["quant_out"].copy_((code[:, 0::2] + 16 * code[:, 1::2]).to(torch.uint8))
        columns = -(-(hidden // 16) // 4)
        assert a["layout_code"] == 0
        for m in range(tokens):
            for k in range(hidden // 16):
                at = (m // 128 * columns + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
                out[at] = stored[m, k].view(torch.uint8)


def _largest(values: Tensor) -> Tensor:
    """The largest size along the last dimension; NaNs are passed over."""
    return values.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(-1)


def _into_fp8(values: Tensor) -> Tensor:
    """C's fmin(fmax(x, -448), 448): a NaN becomes -448."""
    low = torch.fmax(values, torch.tensor(-448.0))
    return torch.fmin(low, torch.tensor(448.0)).to(FP8)


def _pointer(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.data_ptr() % 16:
        raise IllegalAccess(f"{name} is not aligned to 16 bytes")


def _check_group(tokens: int, hidden: int, scale_out: Tensor | None, group: int | None) -> None:
    if not group or scale_out is None or hidden % group:
        raise ValueError("block_quant_group_size and scale_out are required")
    if scale_out.shape != (tokens, -(-(hidden // group) // 4)) or scale_out.dtype != torch.int32:
        raise ValueError("scale_out shape or dtype")
    if scale_out.stride() != (1, -(-tokens // 4) * 4):
        raise ValueError(f"scale_out stride must be (1, {-(-tokens // 4) * 4}), got {scale_out.stride()}")


def _check_dynamic(value: Tensor, tokens: int, *needed: Tensor | None) -> None:
    if any(t is None for t in needed):
        raise ValueError("an argument is required for dynamic FP8 patterns")
    quant_out, scale_out = needed[-2:]
    assert quant_out is not None and scale_out is not None
    if quant_out.shape != value.shape or quant_out.dtype != FP8:
        raise ValueError("quant_out")
    if scale_out.shape != (tokens, 1) or scale_out.dtype != torch.float32 or not scale_out.is_contiguous():
        raise ValueError("scale_out")
