// SPDX-License-Identifier: Apache-2.0
#include "collective.h"

#include <string.h>

#include <initializer_list>

#include "descriptor.h"
#include "error.h"
#include "launch.h"

namespace car {
namespace gpu {
namespace {

using commplane_car::element_bytes;
using commplane_car::fail;

bool is_aligned(const void* at) { return reinterpret_cast<uint64_t>(at) % sizeof(Vec) == 0; }

// As many blocks as there are multiprocessors, each with few threads, before there are more of either: what waits in parallel
// waits less.
uint32_t threads_for(uint64_t vecs, uint32_t blocks, uint32_t most) {
    uint32_t threads = 128;
    while (threads < most && (vecs + threads - 1) / threads > blocks / 2) threads *= 2;
    return threads;
}

uint32_t blocks_for(uint64_t items, uint32_t blocks) { return uint32_t(items < blocks ? (items > 0 ? items : 1) : blocks); }

struct Way {
    uint32_t algorithm;
    uint32_t blocks;
    uint32_t threads;
};

// The entry of a table for a message, or what is right for any group where there is no table.
Way choose(const Comm& comm, bool readable, bool capturing, uint64_t bytes) {
    const Choices& choices = comm.choices[readable][capturing];
    for (uint32_t i = 0; i < choices.count; ++i) {
        const commplane_car_cuda_choice& one = choices.of[i];
        if (bytes <= one.max_bytes || i + 1 == choices.count) return {one.algorithm, one.blocks, one.threads};
    }
    if (readable) return {0, 0, 0};
    return {uint32_t(bytes <= capacity(comm) ? COMMPLANE_CAR_CUDA_ONE_SHOT_PUSH : COMMPLANE_CAR_CUDA_TWO_SHOT_PUSH), 0, 0};
}

const Region* find(const Comm& comm, const void* at, uint64_t bytes, uint64_t* offset) {
    const uint64_t from = reinterpret_cast<uint64_t>(at);
    for (uint32_t i = 0; i < comm.region_count; ++i) {
        const Region& region = comm.regions[i];
        const uint64_t base = reinterpret_cast<uint64_t>(region.bases[comm.group.rank]);
        if (base <= from && from + bytes <= base + region.bytes) {
            *offset = from - base;
            return &region;
        }
    }
    return nullptr;
}

// One call: numbered, recorded, described to the peers, and ordered after the last. `run` is given what a kernel is told.
template <class Run>
int call(Comm& comm, const commplane_car_call& about, uint32_t algorithm, uint64_t rest, cudaStream_t stream, Run run) {
    const uint64_t sequence = comm.sequence.load(std::memory_order_relaxed) + 1;
    comm.flight.begin(sequence, commplane_car::describe(about));
    comm.sequence.store(sequence, std::memory_order_release);
    int status = order(comm, stream);
    if (status == 0) {
        comm.group.timeout_ns = comm.timeout_ns.load(std::memory_order_relaxed);
        describe(about.kind, about.dtype, about.root, algorithm, about.count, rest, comm.group.call);
        const cudaError_t error = run();
        if (error != cudaSuccess) status = fail_cuda(error, commplane_car::kind_name(about.kind));
    }
    comm.flight.end(sequence, status, 0);
    return status;
}

commplane_car_call about(uint32_t kind, int dtype, uint64_t count) {
    commplane_car_call out = {};
    out.kind = kind;
    out.dtype = uint32_t(dtype);
    out.count = count;
    return out;
}

bool is_capturing(const Comm& comm, cudaStream_t stream) {
    if (!comm.capturing) return false;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(stream, &status);
    return error == cudaSuccess && status == cudaStreamCaptureStatusActive;
}

}  // namespace

uint64_t capacity(const Comm& comm) {
    return uint64_t(comm.group.layout.blocks) * comm.group.layout.lamport_vecs * sizeof(Vec);
}

int all_reduce(Comm& comm, const AllReduce& one, cudaStream_t stream, const commplane_car_call* part_of, uint64_t rest) {
    const Group& g = comm.group;
    const uint64_t element = element_bytes(uint32_t(one.dtype)), bytes = one.count * element, vecs = (bytes + sizeof(Vec) - 1) / sizeof(Vec);
    const bool aligned = is_aligned(one.in) && is_aligned(one.out), capturing = is_capturing(comm, stream);
    commplane_car_call said = part_of != nullptr ? *part_of : about(COMMPLANE_CAR_KIND_ALL_REDUCE, one.dtype, one.count);
    said.op = COMMPLANE_CAR_SUM;
    said.in_place = one.in == one.out;

    uint64_t offset = 0;
    const Region* region = comm.region_count != 0 ? find(comm, one.in, bytes, &offset) : nullptr;
    const bool remembered = region == nullptr && capturing && comm.remembering && comm.rows_used < kMostCaptured;
    Way way = {0, 0, 0};
    Row row = {};
    if (aligned && (region != nullptr || remembered)) {
        way = choose(comm, true, capturing, bytes);
        // One-shot lets peers read while it writes; two-shot writes what peers have.
        const bool fits = way.algorithm == COMMPLANE_CAR_CUDA_ONE_SHOT_PULL   ? !said.in_place
                          : way.algorithm == COMMPLANE_CAR_CUDA_TWO_SHOT_PULL ? said.in_place
                                                                              : false;
        if (!fits) {
            way.algorithm = 0;
        } else if (region != nullptr) {
            for (uint32_t r = 0; r < g.ranks; ++r) row.direct[r] = static_cast<char*>(region->bases[r]) + offset;
            said.symmetric = 1;
            said.region = region->id;
            said.offset = offset;
            rest = rest * 31 + (uint64_t(region->id) << 48 ^ offset);
        } else {
            row.table = comm.rows + uint64_t(comm.rows_used) * kMaxRanks;
            comm.captured[comm.rows_used++] = {const_cast<void*>(one.in), bytes};
            rest = rest * 31 + comm.rows_used;
        }
    }
    if (way.algorithm == 0) way = choose(comm, false, capturing, bytes);

    uint64_t piece = one.count;  // elements of a kernel
    const uint32_t most = way.blocks != 0 && way.blocks < g.layout.blocks ? way.blocks : g.layout.blocks;
    Launch how = {stream, most, way.threads != 0 ? way.threads : kMostThreads, comm.early};
    switch (way.algorithm) {
        case COMMPLANE_CAR_CUDA_ONE_SHOT_PUSH:
            if (way.threads == 0) how.threads = threads_for(vecs, most, kMostThreads);
            how.blocks = blocks_for((vecs + how.threads - 1) / how.threads, most);
            piece = uint64_t(how.blocks) * (g.layout.lamport_vecs / how.threads * how.threads) * (sizeof(Vec) / element);
            break;
        case COMMPLANE_CAR_CUDA_TWO_SHOT_PUSH: {
            const uint64_t part = (vecs + g.ranks - 1) / g.ranks, slots = g.layout.lamport_vecs / 2;
            if (way.threads == 0 || way.threads > kTwoShotThreads) how.threads = threads_for(part, most, kTwoShotThreads);
            how.blocks = blocks_for((part + how.threads - 1) / how.threads, most);
            piece = uint64_t(how.blocks) * (slots / how.threads * how.threads) * g.ranks * (sizeof(Vec) / element);
            break;
        }
        default: {
            const uint64_t own = way.algorithm == COMMPLANE_CAR_CUDA_TWO_SHOT_PULL ? (vecs + g.ranks - 1) / g.ranks : vecs;
            how.blocks = blocks_for((own + how.threads - 1) / how.threads, most);
        }
    }
    rest = rest * 1025 + how.blocks;
    rest = rest * 1025 + how.threads;
    return call(comm, said, way.algorithm, rest, stream, [&] {
        switch (way.algorithm) {
            case COMMPLANE_CAR_CUDA_ONE_SHOT_PULL: return launch_one_shot_pull(how, g, one.dtype, row, one.out, one.count);
            case COMMPLANE_CAR_CUDA_TWO_SHOT_PULL: return launch_two_shot_pull(how, g, one.dtype, row, one.count);
            default: break;
        }
        const auto push = way.algorithm == COMMPLANE_CAR_CUDA_ONE_SHOT_PUSH ? launch_one_shot_push : launch_two_shot_push;
        cudaError_t error = cudaSuccess;
        for (uint64_t at = 0; at < one.count && error == cudaSuccess; at += piece) {
            const uint64_t count = one.count - at < piece ? one.count - at : piece;
            error = push(how, g, one.dtype, static_cast<const char*>(one.in) + at * element, static_cast<char*>(one.out) + at * element,
                         count, aligned);
        }
        return error;
    });
}

int all_reduce_rms_norm(Comm& comm, const void* in, const Norm& norm, int dtype, cudaStream_t stream) {
    const Group& g = comm.group;
    const uint64_t element = element_bytes(uint32_t(dtype)), per_vec = sizeof(Vec) / element;
    const bool aligned = is_aligned(in) && is_aligned(norm.residual) && is_aligned(norm.weight) && is_aligned(norm.norm_out) &&
                         is_aligned(norm.residual_out) && norm.hidden % per_vec == 0;
    const uint64_t row_vecs = (norm.hidden + per_vec - 1) / per_vec;
    // By what is equal on all ranks alone: an unaligned tensor on one of them must not send it another way. Up to twice the size from
    // which a sum goes two-shot: so much is a kernel less worth.
    const uint32_t blocks = blocks_for(norm.rows, g.layout.blocks);
    const uint64_t rows_of_block = (norm.rows + blocks - 1) / blocks;
    const Way half = choose(comm, false, is_capturing(comm, stream), (norm.rows * norm.hidden * element + 1) / 2);
    const bool fits = norm.hidden % per_vec == 0 && row_vecs <= 4 * kMostThreads && rows_of_block * row_vecs <= g.layout.lamport_vecs;
    const bool fused = fits && half.algorithm == COMMPLANE_CAR_CUDA_ONE_SHOT_PUSH;
    commplane_car_call said = about(COMMPLANE_CAR_KIND_ALL_REDUCE_RMS_NORM, dtype, norm.rows * norm.hidden);
    said.op = COMMPLANE_CAR_SUM;
    said.hidden = norm.hidden;
    said.eps = norm.eps;
    said.weight_bias = norm.weight_bias;
    said.in_place = in == norm.norm_out;
    uint32_t eps, weight_bias;
    memcpy(&eps, &norm.eps, 4);
    memcpy(&weight_bias, &norm.weight_bias, 4);
    const uint64_t rest = ((uint64_t(eps) * 0x9e3779b9u + weight_bias) * 0x9e3779b9u) ^ norm.hidden;
    if (!fused) {
        if (const int status = all_reduce(comm, {in, norm.norm_out, norm.rows * norm.hidden, dtype}, stream, &said, rest)) return status;
        const Launch how = {stream, blocks_for(norm.rows, g.layout.blocks * 4), 256, comm.early};
        const cudaError_t error = launch_add_rms_norm(how, dtype, norm.norm_out, norm, aligned);
        return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "add_rms_norm");
    }
    if (!aligned) return fail(COMMPLANE_CAR_EINVAL, "tensors of all_reduce_rms_norm are not aligned to 16 bytes");
    const uint32_t threads = row_vecs >= kMostThreads ? kMostThreads : uint32_t((row_vecs + 31) / 32 * 32);
    const Launch how = {stream, blocks, threads, comm.early};
    return call(comm, said, 0, rest, stream, [&] { return launch_all_reduce_rms_norm(how, g, dtype, in, norm); });
}

int all_gather(Comm& comm, const void* in, void* out, uint64_t count, int dtype, cudaStream_t stream) {
    const uint64_t bytes = count * element_bytes(uint32_t(dtype)), tile = uint64_t(comm.group.layout.tile_vecs) * sizeof(Vec);
    const Launch how = {stream, blocks_for((bytes + tile - 1) / tile, comm.group.layout.blocks), kMostThreads, comm.early};
    return call(comm, about(COMMPLANE_CAR_KIND_ALL_GATHER, dtype, count), 0, 0, stream,
                [&] { return launch_all_gather(how, comm.group, in, out, bytes, is_aligned(in) && is_aligned(out)); });
}

int reduce_scatter(Comm& comm, const AllReduce& one, cudaStream_t stream) {
    const uint64_t bytes = one.count * element_bytes(uint32_t(one.dtype)), tile = uint64_t(comm.group.layout.tile_vecs) * sizeof(Vec);
    const Launch how = {stream, blocks_for((bytes + tile - 1) / tile, comm.group.layout.blocks), kMostThreads, comm.early};
    commplane_car_call said = about(COMMPLANE_CAR_KIND_REDUCE_SCATTER, one.dtype, one.count);
    said.op = COMMPLANE_CAR_SUM;
    return call(comm, said, 0, 0, stream, [&] {
        return launch_reduce_scatter(how, comm.group, one.dtype, one.in, one.out, one.count, is_aligned(one.in) && is_aligned(one.out));
    });
}

int broadcast(Comm& comm, void* data, uint64_t count, int dtype, uint32_t root, cudaStream_t stream) {
    const uint64_t bytes = count * element_bytes(uint32_t(dtype)), tile = uint64_t(comm.group.layout.tile_vecs) * sizeof(Vec);
    const Launch how = {stream, blocks_for((bytes + tile - 1) / tile, comm.group.layout.blocks), kMostThreads, comm.early};
    commplane_car_call said = about(COMMPLANE_CAR_KIND_BROADCAST, dtype, count);
    said.root = root;
    return call(comm, said, 0, 0, stream, [&] { return launch_broadcast(how, comm.group, data, bytes, is_aligned(data), root); });
}

int barrier(Comm& comm, cudaStream_t stream) {
    const Launch how = {stream, 1, 32, comm.early};
    return call(comm, about(COMMPLANE_CAR_KIND_BARRIER, 0, 0), 0, 0, stream, [&] { return launch_barrier(how, comm.group); });
}

}  // namespace gpu
}  // namespace car
