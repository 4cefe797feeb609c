"""custom_ar on CUDA tensors: how Python calls the CUDA half of the native library.

abi.py         structs, functions and numbers of commplane_car_cuda.h
comm.py        a communicator and memory of a GPU, as Python objects
calls.py       the data plane: tensors in, native calls on the current stream out
faults.py      what a status means
tuned.py       which algorithm serves which sizes, as measured
symmetric.py   tensors that all ranks map
captured.py    inputs of graphs that all ranks read
backend.py     the backend

Importing this package loads neither torch nor the native library. Whether a group may use it is decided in `gpu`.
"""
