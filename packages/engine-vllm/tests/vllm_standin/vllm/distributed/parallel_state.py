"""Groups over Gloo, or NCCL, and the operator that a compiled model calls. `calls` counts what the engine's own code did."""

import collections
import contextlib
import types

import torch
import torch.distributed as dist

calls = collections.Counter()
_names = collections.Counter()
_groups = {}


def all_reduce(tensor: torch.Tensor, group_name: str) -> torch.Tensor:
    return _groups[group_name]._all_reduce_out_place(tensor)


class DeviceCommunicator:
    def __init__(self, device_group):
        self.device_group = device_group

    def all_reduce(self, input_):
        calls["own"] += 1
        out = input_.clone()
        dist.all_reduce(out, group=self.device_group)
        return out

    def destroy(self):
        calls["destroy"] += 1


class GroupCoordinator:
    def __init__(
        self,
        group_ranks,
        local_rank,
        torch_distributed_backend,
        use_device_communicator,
        use_message_queue_broadcaster=False,
        group_name=None,
        use_all2all=False,
    ):
        name = group_name or "anonymous"
        self.unique_name = f"{name}:{_names[name]}"
        _names[name] += 1
        _groups[self.unique_name] = self
        self.rank = dist.get_rank()
        self.device = torch.device(f"cuda:{local_rank}" if torch_distributed_backend == "nccl" else "cpu")
        self.device_communicator = None
        for ranks in group_ranks:
            group = dist.new_group(ranks, backend=torch_distributed_backend)
            if self.rank in ranks:
                self.ranks = ranks
                self.world_size = len(ranks)
                self.rank_in_group = ranks.index(self.rank)
                self.device_group = group
        if use_device_communicator and self.world_size > 1:
            self.device_communicator = DeviceCommunicator(self.device_group)

    @contextlib.contextmanager
    def graph_capture(self, graph_capture_context=None):
        calls["graph_capture"] += 1
        if self.device.type == "cpu":
            yield graph_capture_context or "context"
            return
        context = graph_capture_context or types.SimpleNamespace(stream=torch.cuda.Stream())
        context.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(context.stream):
            yield context

    def all_reduce(self, input_):
        if self.world_size == 1:
            return input_
        calls["all_reduce"] += 1
        return all_reduce(input_, self.unique_name)

    def _all_reduce_out_place(self, input_):
        if self.device_communicator is None:
            raise ValueError("No device communicator found")
        return self.device_communicator.all_reduce(input_)

    def destroy(self):
        if self.device_communicator is not None:
            self.device_communicator.destroy()
        dist.destroy_process_group(self.device_group)
