// SPDX-License-Identifier: Apache-2.0
//
// What the link between two GPUs carries, in both directions at once, by the instruction that moves the data. One process, no library.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a gpu_link.cu -o gpu_link && ./gpu_link
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <vector>

#define CHECK(call)                                                                                   \
    do {                                                                                              \
        const cudaError_t error = (call);                                                             \
        if (error != cudaSuccess) {                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
            exit(1);                                                                                  \
        }                                                                                             \
    } while (0)

enum Way { kPushPlain, kPushRelaxed, kPushStreaming, kPullPlain, kPullNc, kPullRelaxed, kBulkPush, kBulkPull, kWays };
static const char* const kNames[] = {"push st", "push st.relaxed.sys", "push st.cs", "pull ld", "pull ld.nc", "pull ld.relaxed.sys", "bulk push", "bulk pull"};

template <int W>
__device__ uint4 get(const uint4* p) {
    uint4 v;
    if (W == kPullNc) asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    else if (W == kPullRelaxed) asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    else asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
template <int W>
__device__ void put(uint4* p, uint4 v) {
    if (W == kPushRelaxed) asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
    else if (W == kPushStreaming) asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
    else asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
}

template <int W, int U>
__global__ void move(const uint4* from, uint4* to, uint64_t vecs) {
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < vecs; i += U * stride) {
        uint4 v[U];
#pragma unroll
        for (int u = 0; u < U; ++u) if (i + u * stride < vecs) v[u] = get<W>(from + i + u * stride);
#pragma unroll
        for (int u = 0; u < U; ++u) if (i + u * stride < vecs) put<W>(to + i + u * stride, v[u]);
    }
}

// The first `pulls` of 8 parts are read from the peer, the rest is written to it: from[0] and to[0] are own, from[1] and to[1] the peer's.
__global__ void mixed(const uint4* from0, uint4* to0, const uint4* from1, uint4* to1, uint64_t vecs, int pulls) {
    const bool pull = int(blockIdx.x % 8) < pulls;
    const uint64_t cut = vecs / 8 * pulls;
    const uint32_t group = blockIdx.x / 8, in_group = pull ? blockIdx.x % 8 : blockIdx.x % 8 - pulls, size = pull ? pulls : 8 - pulls;
    const uint64_t stride = uint64_t(gridDim.x / 8) * size * blockDim.x;
    const uint64_t end = pull ? cut : vecs;
    const uint4* from = pull ? from1 : from0;
    uint4* to = pull ? to0 : to1;
    for (uint64_t i = (pull ? 0 : cut) + (uint64_t(group) * size + in_group) * blockDim.x + threadIdx.x; i < end; i += 4 * stride) {
        uint4 v[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) if (i + u * stride < end) v[u] = get<kPullPlain>(from + i + u * stride);
#pragma unroll
        for (int u = 0; u < 4; ++u) if (i + u * stride < end) put<kPushPlain>(to + i + u * stride, v[u]);
    }
}

// One thread of each block moves chunks through shared memory, four in flight.
__global__ void bulk(const char* from, char* to, uint64_t bytes, uint32_t chunk) {
    extern __shared__ __align__(128) char shared[];
    __shared__ __align__(8) uint64_t full[4];
    if (threadIdx.x != 0) return;
    for (int i = 0; i < 4; ++i) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"((uint32_t)__cvta_generic_to_shared(&full[i])));
    asm volatile("fence.proxy.async.shared::cta;");
    const uint64_t chunks = bytes / chunk;
    uint64_t issued = 0, mine = chunks > blockIdx.x ? (chunks - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
    auto fetch = [&](uint64_t k) {
        const uint32_t bar = (uint32_t)__cvta_generic_to_shared(&full[k % 4]);
        const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared + (k % 4) * chunk);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(chunk));
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at), "l"(from + (blockIdx.x + k * gridDim.x) * chunk), "r"(chunk), "r"(bar) : "memory");
    };
    for (; issued < 3 && issued < mine; ++issued) fetch(issued);
    for (uint64_t k = 0; k < mine; ++k) {
        const uint32_t bar = (uint32_t)__cvta_generic_to_shared(&full[k % 4]);
        const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared + (k % 4) * chunk);
        uint32_t done = 0;
        while (!done) asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"((uint32_t)((k / 4) & 1)) : "memory");
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to + (blockIdx.x + k * gridDim.x) * chunk), "r"(at), "r"(chunk) : "memory");
        asm volatile("cp.async.bulk.commit_group;");
        if (issued < mine) {
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            // The slot of issued % 4 was read by group issued - 4, which is done.
            fetch(issued++);
        }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

int main() {
    const uint64_t most = 64ull << 20;
    uint4 *in[2], *out[2];
    cudaStream_t stream[2];
    cudaEvent_t from[2], to[2];
    for (int d = 0; d < 2; ++d) {
        CHECK(cudaSetDevice(d));
        CHECK(cudaDeviceEnablePeerAccess(1 - d, 0));
        CHECK(cudaMalloc(&in[d], most));
        CHECK(cudaMalloc(&out[d], most));
        CHECK(cudaMemset(in[d], d, most));
        CHECK(cudaStreamCreateWithFlags(&stream[d], cudaStreamNonBlocking));
        CHECK(cudaEventCreate(&from[d]));
        CHECK(cudaEventCreate(&to[d]));
        CHECK(cudaFuncSetAttribute(bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, 4 * 32768));
        CHECK(cudaDeviceSynchronize());
    }
    for (uint64_t bytes : {4ull << 20, 64ull << 20}) {
        for (int way = 0; way < kWays; ++way) {
            for (int blocks : {32, 132}) {
                for (int threads : {512}) {
                    if (way >= kBulkPush && threads > 512) continue;
                    const uint32_t chunk = threads == 256 ? 8192 : 32768;
                    std::vector<float> us;
                    for (int i = 0; i < 7; ++i) {
                        for (int d = 0; d < 2; ++d) {
                            CHECK(cudaSetDevice(d));
                            const bool pull = (way >= kPullPlain && way <= kPullRelaxed) || way == kBulkPull;
                            const uint4* a = pull ? in[1 - d] : in[d];
                            uint4* b = pull ? out[d] : out[1 - d];
                            CHECK(cudaEventRecord(from[d], stream[d]));
                            for (int k = 0; k < 20; ++k) {
                                const uint64_t vecs = bytes / 16;
                                if (way == kPushPlain) move<kPushPlain, 4><<<blocks, threads, 0, stream[d]>>>(a, b, vecs);
                                if (way == kPushRelaxed) move<kPushRelaxed, 4><<<blocks, threads, 0, stream[d]>>>(a, b, vecs);
                                if (way == kPushStreaming) move<kPushStreaming, 4><<<blocks, threads, 0, stream[d]>>>(a, b, vecs);
                                if (way == kPullPlain) move<kPullPlain, 4><<<blocks, threads, 0, stream[d]>>>(a, b, vecs);
                                if (way == kPullNc) move<kPullNc, 4><<<blocks, threads, 0, stream[d]>>>(a, b, vecs);
                                if (way == kPullRelaxed) move<kPullRelaxed, 4><<<blocks, threads, 0, stream[d]>>>(a, b, vecs);
                                if (way >= kBulkPush) bulk<<<blocks, 32, 4 * chunk, stream[d]>>>((const char*)a, (char*)b, bytes, chunk);
                            }
                            CHECK(cudaEventRecord(to[d], stream[d]));
                        }
                        float worst = 0;
                        for (int d = 0; d < 2; ++d) {
                            float ms;
                            CHECK(cudaStreamSynchronize(stream[d]));
                            CHECK(cudaEventElapsedTime(&ms, from[d], to[d]));
                            worst = std::max(worst, ms * 1000 / 20);
                        }
                        us.push_back(worst);
                    }
                    std::sort(us.begin(), us.end());
                    printf("%9llu %-20s %4d %5d%s %8.2f us %7.1f GB/s a direction\n", (unsigned long long)bytes, kNames[way], blocks, way >= kBulkPush ? (int)chunk : threads, way >= kBulkPush ? "B" : " ", us[3], bytes / us[3] / 1000);
                }
            }
        }
        for (int pulls = 1; pulls < 8; ++pulls) {
            std::vector<float> us;
            for (int i = 0; i < 7; ++i) {
                for (int d = 0; d < 2; ++d) {
                    CHECK(cudaSetDevice(d));
                    CHECK(cudaEventRecord(from[d], stream[d]));
                    for (int k = 0; k < 20; ++k) mixed<<<264, 512, 0, stream[d]>>>(in[d], out[d], in[1 - d], out[1 - d], bytes / 16, pulls);
                    CHECK(cudaEventRecord(to[d], stream[d]));
                }
                float worst = 0;
                for (int d = 0; d < 2; ++d) {
                    float ms;
                    CHECK(cudaStreamSynchronize(stream[d]));
                    CHECK(cudaEventElapsedTime(&ms, from[d], to[d]));
                    worst = std::max(worst, ms * 1000 / 20);
                }
                us.push_back(worst);
            }
            std::sort(us.begin(), us.end());
            printf("%9llu %d/8 pulled, rest pushed  264 512 %8.2f us %7.1f GB/s a direction\n", (unsigned long long)bytes, pulls, us[3], bytes / us[3] / 1000);
        }
        std::vector<float> us;
        for (int i = 0; i < 7; ++i) {
            for (int d = 0; d < 2; ++d) {
                CHECK(cudaSetDevice(d));
                CHECK(cudaEventRecord(from[d], stream[d]));
                for (int k = 0; k < 20; ++k) CHECK(cudaMemcpyAsync(out[1 - d], in[d], bytes, cudaMemcpyDefault, stream[d]));
                CHECK(cudaEventRecord(to[d], stream[d]));
            }
            float worst = 0;
            for (int d = 0; d < 2; ++d) {
                float ms;
                CHECK(cudaStreamSynchronize(stream[d]));
                CHECK(cudaEventElapsedTime(&ms, from[d], to[d]));
                worst = std::max(worst, ms * 1000 / 20);
            }
            us.push_back(worst);
        }
        std::sort(us.begin(), us.end());
        printf("%9llu copy engine %8.2f us %7.1f GB/s a direction\n", (unsigned long long)bytes, us[3], bytes / us[3] / 1000);
    }
}
