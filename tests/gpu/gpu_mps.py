"""An MPS daemon, under which the ranks of a test or of a bench share one GPU. No setting of a GPU is touched.

python tests/gpu/gpu_mps.py RANKS COMMAND ...    runs COMMAND where RANKS processes share the first GPU; ends with its exit code
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

__all__ = ["MPS_CONTROL", "Mps"]

MPS_CONTROL = shutil.which("nvidia-cuda-mps-control")


class Mps:
    """An MPS daemon with folders of its own. A daemon that runs already is not used and not touched."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="mps-", dir="/tmp")  # short: there is a socket in it
        self._env = {"CUDA_MPS_PIPE_DIRECTORY": f"{self._folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{self._folder}/log"}
        for folder in self._env.values():
            Path(folder).mkdir()
        try:
            self._run(["-d"], None)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def env(self, ranks: int) -> dict[str, str]:
        """Variables for each of `ranks` processes: its share of the GPU is such that the kernels of all fit at once."""
        return {**self._env, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // ranks)}

    def _run(self, arguments: list[str], text: str | None) -> None:
        assert MPS_CONTROL is not None, "wants nvidia-cuda-mps-control, found no such command: take one GPU a rank"
        # Not captured: the daemon would keep the pipe open, and this would wait for its end.
        subprocess.run(
            [MPS_CONTROL, *arguments],
            env={**os.environ, **self._env},
            input=text,
            stdin=None if text is not None else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=60,
            check=True,
        )

    def stop(self) -> None:
        """End the daemon and its server."""
        try:
            self._run([], "quit\n")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def main(ranks: int, command: list[str]) -> int:
    """The command under a daemon that goes when it has ended, or when this process is asked to end."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    mps = Mps()
    try:
        with subprocess.Popen(command, env={**os.environ, **mps.env(ranks), "CUDA_VISIBLE_DEVICES": first}) as process:
            try:
                return process.wait()
            except BaseException:
                process.terminate()  # torchrun, which ends its ranks
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
    finally:
        mps.stop()


if __name__ == "__main__":
    if MPS_CONTROL is None:
        sys.exit("wants nvidia-cuda-mps-control, found no such command: take one GPU a rank")
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
