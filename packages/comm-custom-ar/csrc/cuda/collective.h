// SPDX-License-Identifier: Apache-2.0
// From a checked call to a launch: which algorithm, which grid.
#pragma once

#include "comm.h"

namespace car {
namespace gpu {

struct AllReduce {
    const void* in;
    void* out;
    uint64_t count;
    int dtype;
};

// Each queues its kernels on `stream` and returns a status. The caller has entered the communicator and checked the arguments.
// `part_of`: the call that this all-reduce is the first half of, and `rest`, what else of it has to be equal on all ranks.
int all_reduce(Comm& comm, const AllReduce& call, cudaStream_t stream, const commplane_car_call* part_of = nullptr, uint64_t rest = 0);
int all_reduce_rms_norm(Comm& comm, const void* in, const Norm& norm, int dtype, cudaStream_t stream);
int all_gather(Comm& comm, const void* in, void* out, uint64_t count, int dtype, cudaStream_t stream);
int reduce_scatter(Comm& comm, const AllReduce& call, cudaStream_t stream);
int broadcast(Comm& comm, void* data, uint64_t count, int dtype, uint32_t root, cudaStream_t stream);
int barrier(Comm& comm, cudaStream_t stream);

// The largest message in bytes that one_shot_push takes with any grid that it is given here.
uint64_t capacity(const Comm& comm);

}  // namespace gpu
}  // namespace car
