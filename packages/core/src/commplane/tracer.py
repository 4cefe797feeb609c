"""What core tells torch's tracer, Dynamo, of its functions, and how it knows the tensors of a trace.

The marks on functions and code objects are read by the tracer alone, so an eager call pays nothing: to ask
`torch.compiler.is_compiling()` in each call would cost it 60 ns. They are not torch's public interface, which has no mark for a
Python function; all use of them is here. Tested with torch 2.4, 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["keep_out", "trace_instead", "without_data"]


def trace_instead(function: Callable[..., Any], traced: Callable[..., Any]) -> None:
    """In a compiled function, a call of `function` is a call of `traced`.

    Torch marks its own compiled functions so, to reach what they were made from.
    """
    function._torchdynamo_inline = traced  # type: ignore[attr-defined]


def keep_out(*codes: CodeType) -> None:
    """Run functions with this code, and what they call, untouched also where `torch.compile` fell back to eager code.

    There the tracer looks at each Python function that is called. It would take apart the insides of a communicator, and find
    in the kernel of an operator the call of that operator. Results are the same without this, after seconds of compiling.
    """
    import torch

    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    for code in codes:
        if hasattr(frames, "set_code_exec_strategy"):
            skip = frames._FrameAction.SKIP
            frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
        elif hasattr(frames, "skip_code"):  # before torch 2.7: the function itself, not what it calls
            frames.skip_code(code)


def without_data(tensor: torch.Tensor) -> bool:
    """Whether `tensor` only stands for one while a graph is traced: its address is null, and nothing may read from there."""
    import torch

    if type(tensor) is torch.Tensor:
        return False
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor))
