"""Which groups may use custom_ar on CUDA: what the GPUs are, how they are connected, and whether their memory can be shared.

Nothing here imports torch or makes a CUDA context in the calling process.

devices.py    the GPU behind a device ordinal
              (driver.py asks libcuda, nvml.py libnvidia-ml, visible.py reads CUDA_VISIBLE_DEVICES)
links.py      NVLink and P2P of every pair
proof.py      every rank writes to every other's memory, in child processes with a deadline
              (proof_child.py; memory.py is what such a process calls, cache.py remembers the outcome)
gate.py       from all of that to one answer for the group
"""
