// SPDX-License-Identifier: Apache-2.0
//
// The kernels as functions of the host. Each returns what the launch returned. dtype is the number of the C interface.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace car {
namespace gpu {

struct Group;
struct Norm;

constexpr uint32_t kMostThreads = 512;
// Of the two-shot push: fewer, so that two blocks on a multiprocessor have the registers for a vector of every rank in each phase.
constexpr uint32_t kTwoShotThreads = 256;

struct Launch {
    cudaStream_t stream;
    uint32_t blocks;
    uint32_t threads;  // that move data: a multiple of 32, at most kMostThreads
    bool early;        // programmatic dependent launch: the blocks are brought up while the kernel before is still running
};

// Where every rank's tensor lies: `table` in device memory if it is not null (filled in after a capture), else `direct`.
struct Row {
    void* const* table;
    void* direct[8];
};

cudaError_t launch_one_shot_push(const Launch&, const Group&, int dtype, const void* in, void* out, uint64_t count, bool aligned);
cudaError_t launch_two_shot_push(const Launch&, const Group&, int dtype, const void* in, void* out, uint64_t count, bool aligned);
cudaError_t launch_one_shot_pull(const Launch&, const Group&, int dtype, const Row& row, void* out, uint64_t count);
cudaError_t launch_two_shot_pull(const Launch&, const Group&, int dtype, const Row& row, uint64_t count);
cudaError_t launch_all_gather(const Launch&, const Group&, const void* in, void* out, uint64_t bytes, bool aligned);
cudaError_t launch_reduce_scatter(const Launch&, const Group&, int dtype, const void* in, void* out, uint64_t count, bool aligned);
cudaError_t launch_broadcast(const Launch&, const Group&, void* data, uint64_t bytes, bool aligned, uint32_t root);
cudaError_t launch_barrier(const Launch&, const Group&);
cudaError_t launch_all_reduce_rms_norm(const Launch&, const Group&, int dtype, const void* in, const Norm&);
cudaError_t launch_add_rms_norm(const Launch&, int dtype, const void* total, const Norm&, bool aligned);

// For the proof that GPUs reach each other: word i is value + i.
cudaError_t launch_poke(void* at, uint64_t words, uint32_t value);
cudaError_t launch_peek(const void* at, uint64_t words, uint32_t value, unsigned long long* wrong);

// An error text if this device has no code in the library; null if it has, and what that was compiled for, 90 for 9.0.
const char* missing_code(int* compiled_for);

}  // namespace gpu
}  // namespace car
