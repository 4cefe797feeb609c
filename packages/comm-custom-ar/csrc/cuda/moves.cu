// SPDX-License-Identifier: Apache-2.0
#include "moves.h"

#include "kernel.cuh"

namespace car {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kMostThreads)
    gather(const __grid_constant__ Group g, const void* in, void* out, uint64_t bytes, bool aligned) {
    all_gather(Block{0}, g, in, out, bytes, aligned);
}

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads)
    scatter(const __grid_constant__ Group g, const void* in, void* out, uint64_t count, bool aligned) {
    reduce_scatter<T, N>(Block{0}, g, in, out, count, aligned);
}

__global__ void __launch_bounds__(kMostThreads)
    spread(const __grid_constant__ Group g, void* data, uint64_t bytes, bool aligned, uint32_t root) {
    broadcast(Block{0}, g, data, bytes, aligned, root);
}

__global__ void __launch_bounds__(kMostThreads) meet(const __grid_constant__ Group g) { barrier(Block{0}, g); }

__global__ void poke(uint32_t* at, uint64_t words, uint32_t value) {
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < words; i += uint64_t(gridDim.x) * blockDim.x) {
        store_relaxed(at + i, value + uint32_t(i));
    }
    __threadfence_system();
}

__global__ void peek(const uint32_t* at, uint64_t words, uint32_t value, unsigned long long* wrong) {
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < words; i += uint64_t(gridDim.x) * blockDim.x) {
        if (load_relaxed(at + i) != value + uint32_t(i)) atomicAdd(wrong, 1ull);
    }
}

}  // namespace

cudaError_t launch_all_gather(const Launch& how, const Group& g, const void* in, void* out, uint64_t bytes, bool aligned) {
    return start(how, gather, g, in, out, bytes, aligned);
}

cudaError_t launch_reduce_scatter(const Launch& how, const Group& g, int dtype, const void* in, void* out, uint64_t count,
                                  bool aligned) {
    return by_dtype(dtype, [&](auto t) {
        return by_ranks(g.ranks, [&](auto n) {
            return start(how, scatter<decltype(t), decltype(n)::value>, g, in, out, count, aligned);
        });
    });
}

cudaError_t launch_broadcast(const Launch& how, const Group& g, void* data, uint64_t bytes, bool aligned, uint32_t root) {
    return start(how, spread, g, data, bytes, aligned, root);
}

cudaError_t launch_barrier(const Launch& how, const Group& g) { return start(how, meet, g); }

cudaError_t launch_poke(void* at, uint64_t words, uint32_t value) {
    poke<<<8, 256>>>(static_cast<uint32_t*>(at), words, value);
    return cudaGetLastError();
}

cudaError_t launch_peek(const void* at, uint64_t words, uint32_t value, unsigned long long* wrong) {
    peek<<<8, 256>>>(static_cast<const uint32_t*>(at), words, value, wrong);
    return cudaGetLastError();
}

const char* missing_code(int* compiled_for) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, meet);
    if (error == cudaSuccess) {
        *compiled_for = attributes.ptxVersion;
        return nullptr;
    }
    cudaGetLastError();  // not the next call's
    return cudaGetErrorString(error);
}

}  // namespace gpu
}  // namespace car
