"""All that is asked of FlashInfer and of the device but to launch a kernel. Tests without a GPU replace this class alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from commplane_flashinfer import preflight, topology
from commplane_flashinfer.exchange import Exchange
from commplane_flashinfer.topology import Card

__all__ = ["Boundary"]


class Boundary:
    """The real one. Every method is local; the device is the thread's current one where a method has none.

    Attributes:
        comm: the module ``flashinfer.comm``, imported when this is made.
    """

    def __init__(self) -> None:
        from flashinfer import comm  # type: ignore[import-not-found,import-untyped,unused-ignore]

        self.comm: Any = comm

    def load(self) -> None:
        """Load the kernels. Where no prebuilt ones are installed FlashInfer compiles them, which takes minutes."""
        from flashinfer.comm.trtllm_ar import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            get_trtllm_comm_module,
        )

        get_trtllm_comm_module()

    def card(self, device: str) -> Card:
        """The GPU `device`."""
        import torch
        from flashinfer.utils import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            is_confidential_compute,
        )

        found = torch.cuda.get_device_properties(torch.device(device))
        # As NVML writes it; torch leaves the prefix out.
        uuid = f"GPU-{str(found.uuid).removeprefix('GPU-')}"
        return Card(uuid, found.name, (found.major, found.minor), bool(is_confidential_compute()))

    def linked(self, uuid: str, others: Sequence[str]) -> list[str]:
        """Those of `others` that the card `uuid` has NVLink to."""
        return topology.look(uuid, others)

    def capturing(self) -> bool:
        """Whether the current stream is being captured."""
        import torch

        return torch.cuda.is_current_stream_capturing()

    def spare(self, device: str, sizes: Sequence[int]) -> str | None:
        """Why `device` cannot give allocations of `sizes` bytes, or None."""
        import torch

        ordinal = torch.device(device).index or 0
        return preflight.spare(ordinal, sizes)

    def empty_cache(self) -> None:
        """Give back to the driver what torch keeps of freed tensors."""
        import torch

        torch.cuda.empty_cache()

    def settle(self, device: str, seconds: float) -> str | None:
        """Wait for all that runs on `device`, which may wait for a lost rank for ever. Why it is not at rest, or None."""
        import torch

        problems: list[Exception] = []

        def wait() -> None:
            try:
                torch.cuda.synchronize(torch.device(device))
            except Exception as error:  # said where it is waited for
                problems.append(error)

        thread = threading.Thread(target=wait, name="commplane-flashinfer settle", daemon=True)
        thread.start()
        thread.join(seconds)
        if problems:
            return f"wanted {device} to come to rest, found a fault of an earlier call ({' '.join(str(problems[0]).split())})"
        if thread.is_alive():
            return f"wanted its kernels to end within {seconds:g} s, found them waiting for a lost rank"
        return None

    def free(self, raw: Any) -> None:
        """Free a workspace. FlashInfer's ``destroy`` alone leaves its memory in a global of a module, and a control block."""
        control = raw.metadata.get("control_flag_ptr")
        # It is found by the identity of a list that destroy() lets go of: hence this order.
        self.comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(raw.ipc_handles)
        raw.destroy()
        raw._internal_workspace = None
        if control:
            from flashinfer.comm.cuda_ipc import cudart  # type: ignore[import-not-found,import-untyped,unused-ignore]

            cudart.cudaFree(ctypes.c_void_p(control))

    def free_partial(self, exchange: Exchange, error: BaseException) -> None:
        """Free what a creation through `exchange` has left that raised `error`: it returned nothing to destroy.

        What goes with its frames is not all: there is FlashInfer's global, and the descriptor of the buffer that it was handing
        to the peers, which nobody closes then. The driver does not free memory that a descriptor stands for.
        """
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == "exchange_fds" and frame.f_globals.get("__name__") == "flashinfer.comm.fd_exchange":
                with contextlib.suppress(OSError):  # closed after all
                    os.close(frame.f_locals["local_fd"])
        refs = self.references()
        for key in [k for k, handles in refs.items() if any(getattr(h, "comm_backend", None) is exchange for h in handles)]:
            del refs[key]

    def references(self) -> dict[int, list[Any]]:
        """FlashInfer's global of workspaces: what is in there stays allocated."""
        from flashinfer.comm import trtllm_ar  # type: ignore[import-not-found,import-untyped,unused-ignore]

        return trtllm_ar._symm_workspace_refs  # type: ignore[no-any-return,unused-ignore]
