"""Groups over Gloo, or NCCL. `calls` counts what the engine's own code did, so that a test can tell who summed."""

import collections
import contextlib
import types

import torch
import torch.distributed as dist

calls = collections.Counter()
_names = collections.Counter()
_groups = {}


def inplace_all_reduce(tensor, group_name):
    _groups[group_name]._all_reduce_in_place(tensor)


def outplace_all_reduce(tensor, group_name, outplace_all_reduce_method):
    return _groups[group_name]._all_reduce_out_place(tensor, outplace_all_reduce_method)


class GroupCoordinator:
    def __init__(
        self,
        group_ranks,
        local_rank,
        torch_distributed_backend,
        use_pynccl,
        use_mscclpp,
        use_custom_allreduce,
        use_torch_symm_mem_all_reduce,
        use_hpu_communicator,
        use_xpu_communicator,
        use_message_queue_broadcaster=False,
        group_name=None,
        recovered_rank=False,
        rank_offset=0,
    ):
        name = group_name or "anonymous"
        self.unique_name = f"{name}:{_names[name]}"
        _names[name] += 1
        _groups[self.unique_name] = self
        self.rank = dist.get_rank()
        self.device = torch.device(f"cuda:{local_rank}" if torch_distributed_backend == "nccl" else "cpu")
        self.device_group = None
        for ranks in group_ranks:
            group = dist.new_group(ranks, backend=torch_distributed_backend)
            if self.rank in ranks:
                self.ranks = ranks
                self.world_size = len(ranks)
                self.rank_in_group = ranks.index(self.rank)
                self.device_group = group

    @contextlib.contextmanager
    def graph_capture(self, graph_capture_context=None, stream=None):
        calls["graph_capture"] += 1
        if self.device.type == "cpu":
            yield graph_capture_context or "context"
            return
        context = graph_capture_context or types.SimpleNamespace(stream=stream or torch.cuda.Stream())
        context.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(context.stream):
            yield context

    def all_reduce(self, input_):
        if self.world_size == 1:
            return input_
        calls["all_reduce"] += 1
        if torch.compiler.is_compiling():
            return outplace_all_reduce(input_, self.unique_name, "auto")
        inplace_all_reduce(input_, self.unique_name)
        return input_

    def _all_reduce_out_place(self, input_, outplace_all_reduce_method):
        out = input_.clone()
        self._all_reduce_in_place(out)
        return out

    def _all_reduce_in_place(self, input_):
        calls["own"] += 1
        dist.all_reduce(input_, group=self.device_group)

    def destroy(self):
        calls["destroy"] += 1
        if self.device_group is not None:
            dist.destroy_process_group(self.device_group)
            self.device_group = None
