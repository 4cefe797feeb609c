from sglang.srt.distributed import parallel_state


class BaseRunner:
    def __init__(self, model_runner):
        self.model_runner = model_runner

    def warmup(self):
        self._pre_initialize_flashinfer_allreduce_workspace()

    def _pre_initialize_flashinfer_allreduce_workspace(self):
        parallel_state.calls["pre_initialize"] += 1
