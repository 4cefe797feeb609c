// SPDX-License-Identifier: Apache-2.0
//
// The kernels alone, every algorithm with several grids, in graph replay: which variant is the fastest at which size. One process
// drives all GPUs through peer access, so nothing of the library's own set-up is needed or measured.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I ../cuda gpu_variants.cu ../cuda/*.cu -o gpu_variants
//   ./gpu_variants [ranks] [vectors of a tile] [small | large | norm]
//
// With fewer GPUs than ranks several ranks share one, each with its part of the multiprocessors, so that the kernels of all fit; none
// is brought up early then, because it could take the place of a kernel that others wait for.
//
// A line: bytes, algorithm, blocks, threads, microseconds a call (median of the replays, the slowest rank), whether the sums were right.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "../cuda/launch.h"
#include "../cuda/rms_norm.h"
#include "../cuda/session.h"

using namespace car::gpu;

#define CHECK(call)                                                                                   \
    do {                                                                                              \
        const cudaError_t error = (call);                                                             \
        if (error != cudaSuccess) {                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
            exit(1);                                                                                  \
        }                                                                                             \
    } while (0)

namespace {

constexpr int kCalls = 50, kReplays = 15;
constexpr uint64_t kMost = uint64_t(64) << 20;

__global__ void fill(__nv_bfloat16* at, uint64_t count, int rank) {
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x) {
        at[i] = __float2bfloat16(float((i * 7 + i / 1000 + rank * 3) % 16));
    }
}
__global__ void verify(const __nv_bfloat16* at, uint64_t count, int ranks, int times, unsigned long long* wrong) {
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x) {
        float total = 0;
        for (int r = 0; r < ranks; ++r) total += float((i * 7 + i / 1000 + r * 3) % 16);
        if (__bfloat162float(at[i]) != total * times) atomicAdd(wrong, 1ull);
    }
}

struct Device {
    int id;
    cudaStream_t stream;
    void *in, *out, *residual, *weight, *residual_out;
    unsigned long long* wrong;
    Group group;
};

std::vector<Device> devices;
Control* control;

void together(const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (size_t r = 0; r < devices.size(); ++r) {
        threads.emplace_back([&, r] {
            CHECK(cudaSetDevice(devices[r].id));
            body(int(r));
        });
    }
    for (auto& t : threads) t.join();
}

typedef std::function<cudaError_t(Device&, const Launch&)> Body;

void time_one(const char* name, uint64_t bytes, uint32_t blocks, uint32_t threads, bool early, bool checked, bool in_place, const Body& body) {
    const int n = int(devices.size());
    std::vector<double> us(n);
    std::vector<unsigned long long> wrong(n);
    std::atomic<int> gate{0};
    bool failed = false;
    together([&](int r) {
        Device& d = devices[r];
        const Launch how = {d.stream, blocks, threads, early};
        const uint64_t count = bytes / 2;
        fill<<<264, 256, 0, d.stream>>>(static_cast<__nv_bfloat16*>(d.in), count, r);
        CHECK(cudaMemsetAsync(d.out, 0xff, bytes, d.stream));
        CHECK(cudaStreamSynchronize(d.stream));
        gate.fetch_add(1);
        while (gate.load() < n) {
        }
        CHECK(body(d, how));
        CHECK(cudaStreamSynchronize(d.stream));
        wrong[r] = 0;
        if (checked) {
            CHECK(cudaMemsetAsync(d.wrong, 0, 8, d.stream));
            verify<<<264, 256, 0, d.stream>>>(static_cast<__nv_bfloat16*>(in_place ? d.in : d.out), count, n, 1, d.wrong);
            CHECK(cudaMemcpyAsync(&wrong[r], d.wrong, 8, cudaMemcpyDeviceToHost, d.stream));
            CHECK(cudaStreamSynchronize(d.stream));
        }
        CHECK(cudaMemsetAsync(d.in, 0, bytes, d.stream));
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < kCalls; ++i) CHECK(body(d, how));
        CHECK(cudaStreamEndCapture(d.stream, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        CHECK(cudaGraphUpload(exec, d.stream));
        cudaEvent_t from, to;
        CHECK(cudaEventCreate(&from));
        CHECK(cudaEventCreate(&to));
        std::vector<float> times;
        for (int i = 0; i < kReplays + 3; ++i) {
            CHECK(cudaStreamSynchronize(d.stream));
            gate.fetch_add(1);
            while (gate.load() < n * (i + 2)) {
            }
            // Nobody's clock starts before all have begun.
            CHECK(body(d, how));
            CHECK(cudaEventRecord(from, d.stream));
            CHECK(cudaGraphLaunch(exec, d.stream));
            CHECK(cudaEventRecord(to, d.stream));
            CHECK(cudaStreamSynchronize(d.stream));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, from, to));
            if (i >= 3) times.push_back(ms * 1000 / kCalls);
        }
        std::sort(times.begin(), times.end());
        us[r] = times[times.size() / 2];
        CHECK(cudaGraphExecDestroy(exec));
        CHECK(cudaGraphDestroy(graph));
        if (control->stop) failed = true;
    });
    unsigned long long bad = 0;
    for (auto w : wrong) bad += w;
    printf("%9llu %-16s %4u %4u%s %9.2f %s%s\n", (unsigned long long)bytes, name, blocks, threads, early ? " e" : "  ",
           *std::max_element(us.begin(), us.end()), bad ? "WRONG" : checked ? "right" : "-", failed ? " FAULT" : "");
    fflush(stdout);
    if (failed) {
        for (int r = 0; r < n; ++r) printf("rank %d timed out %u other call %u number %u\n", r, control->rank[r].causes[kTimedOut], control->rank[r].causes[kOtherCall], control->rank[r].number);
        exit(2);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 2;
    const uint32_t tile = argc > 2 ? atoi(argv[2]) : n <= 2 ? 1024 : n <= 4 ? 512 : 256;
    const char* what = argc > 3 ? argv[3] : "all";
    int present = 0;
    CHECK(cudaGetDeviceCount(&present));
    const int share = (n + present - 1) / present;
    const bool alone = share == 1;
    int multiprocessors = 0;
    CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    const uint32_t one_each = multiprocessors / share, two_each = n <= 4 ? 2 * one_each : one_each;
    CHECK(cudaHostAlloc(&control, sizeof *control, cudaHostAllocPortable | cudaHostAllocMapped));
    memset(control, 0, sizeof *control);
    Layout layout = {};
    layout.blocks = two_each;
    layout.lamport_vecs = n <= 2 ? 4096 : n <= 4 ? 2048 : 1024;  // as in comm.cc
    layout.tile_vecs = tile;
    layout.ranks = n;
    uint64_t at = 0;
    auto place = [&](uint64_t bytes) {
        const uint64_t here = at;
        at += (bytes + 4095) / 4096 * 4096;
        return here;
    };
    layout.mailbox = place(uint64_t(layout.blocks) * 2 * n * 16);
    layout.lamport = place(uint64_t(layout.blocks) * 2 * (n - 1) * layout.lamport_vecs * 16);
    layout.flags = place(uint64_t(layout.blocks) * 128);
    layout.tiles = place(uint64_t(layout.blocks) * kRing * n * layout.tile_vecs * 16);
    layout.total = at;
    devices.resize(n);
    std::vector<unsigned char*> memory(n);
    for (int r = 0; r < n; ++r) {
        Device& d = devices[r];
        d.id = r % present;
        CHECK(cudaSetDevice(d.id));
        for (int p = 0; p < present; ++p) {
            if (p != d.id) {
                const cudaError_t error = cudaDeviceEnablePeerAccess(p, 0);
                if (error != cudaErrorPeerAccessAlreadyEnabled && error != cudaSuccess) CHECK(cudaDeviceEnablePeerAccess(p, 0));
                cudaGetLastError();
            }
        }
        CHECK(cudaStreamCreateWithFlags(&d.stream, cudaStreamNonBlocking));
        CHECK(cudaMalloc(&memory[r], layout.total));
        CHECK(cudaMemset(memory[r], 0xff, layout.total));
        CHECK(cudaMemset(memory[r] + layout.flags, 0, uint64_t(layout.blocks) * 128));
        CHECK(cudaMalloc(&d.group.state, layout.blocks * sizeof(BlockState)));
        CHECK(cudaMemset(d.group.state, 0, layout.blocks * sizeof(BlockState)));
        for (void** p : {&d.in, &d.out, &d.residual, &d.residual_out}) {
            CHECK(cudaMalloc(p, kMost));
            CHECK(cudaMemset(*p, 0, kMost));
        }
        CHECK(cudaMalloc(&d.weight, 65536));
        CHECK(cudaMemset(d.weight, 0, 65536));
        CHECK(cudaMalloc(&d.wrong, 8));
        CHECK(cudaDeviceSynchronize());
    }
    for (int r = 0; r < n; ++r) {
        Group& g = devices[r].group;
        for (int p = 0; p < n; ++p) g.memory[p] = memory[p];
        CHECK(cudaHostGetDevicePointer((void**)&g.control, control, 0));
        g.layout = layout;
        g.rank = r;
        g.ranks = n;
        g.timeout_ns = 2000000000ull;
        g.call[0] = 7;
        g.call[1] = 9;
    }
    Row row = {};
    for (int p = 0; p < n; ++p) row.direct[p] = devices[p].in;
    const bool all = !strcmp(what, "all");
    const uint64_t capacity = uint64_t(two_each) * layout.lamport_vecs * 16;
    for (uint64_t bytes : {1ull << 10, 8ull << 10, 32ull << 10, 64ull << 10, 128ull << 10, 256ull << 10, 512ull << 10, 1ull << 20, 2ull << 20, 4ull << 20, 8ull << 20, 16ull << 20, 64ull << 20}) {
        const uint64_t count = bytes / 2, vecs = bytes / 16;
        if (bytes <= capacity && (all || !strcmp(what, "small"))) {
            for (bool early : {true, false}) {
                for (uint32_t threads : {128u, 256u, 512u}) {
                    if (early ? !alone : alone && threads != 256) continue;
                    for (uint32_t most : {one_each, two_each}) {
                        uint64_t blocks = (vecs + threads - 1) / threads;
                        if (most == two_each && blocks <= one_each) continue;
                        if (blocks > most) blocks = most;
                        if ((vecs + blocks * threads - 1) / (blocks * threads) * threads > layout.lamport_vecs) continue;
                        time_one("one_shot_push", bytes, blocks, threads, early, true, false, [&](Device& d, const Launch& how) {
                            return launch_one_shot_push(how, d.group, 3, d.in, d.out, count, true);
                        });
                    }
                }
            }
        }
        if (bytes >= 64 << 10 && (all || !strcmp(what, "large"))) {
            for (uint32_t blocks : {one_each / 2, one_each, two_each}) {
                for (uint32_t threads : {128u, kTwoShotThreads}) {
                    const uint64_t rounds = layout.lamport_vecs / 2 / threads, piece = n * blocks * rounds * threads * 8;
                    time_one("two_shot_push", bytes, blocks, threads, alone, true, false, [&](Device& d, const Launch& how) {
                        cudaError_t error = cudaSuccess;
                        for (uint64_t at = 0; at < count && error == cudaSuccess; at += piece) {
                            const char* const in = static_cast<const char*>(d.in) + at * 2;
                            char* const out = static_cast<char*>(d.out) + at * 2;
                            error = launch_two_shot_push(how, d.group, 3, in, out, count - at < piece ? count - at : piece, true);
                        }
                        return error;
                    });
                }
                for (uint32_t threads : {256u, 512u}) {
                    if (!alone) continue;  // two blocks of theirs do not fit on a multiprocessor
                    time_one("one_shot_pull", bytes, blocks, threads, alone, true, false, [&](Device& d, const Launch& how) {
                        return launch_one_shot_pull(how, d.group, 3, row, d.out, count);
                    });
                    time_one("two_shot_pull", bytes, blocks, threads, alone, true, true, [&](Device& d, const Launch& how) {
                        return launch_two_shot_pull(how, d.group, 3, row, count);
                    });
                }
            }
        }
        if (bytes >= 8 << 10 && bytes <= capacity && (all || !strcmp(what, "norm"))) {
            const uint64_t rows = count / 4096;
            for (uint32_t threads : {256u, 512u}) {
                const uint64_t blocks = rows < two_each ? rows : two_each;
                if ((rows + blocks - 1) / blocks * 512 > layout.lamport_vecs) continue;
                time_one("fused_norm", bytes, blocks, threads, alone, false, false, [&](Device& d, const Launch& how) {
                    const Norm norm = {d.residual, d.weight, d.out, d.residual_out, rows, 4096, 1e-6f, 0.0f};
                    return launch_all_reduce_rms_norm(how, d.group, 3, d.in, norm);
                });
            }
        }
    }
    return 0;
}
