// SPDX-License-Identifier: Apache-2.0
#include "comm.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include <new>

#include "error.h"
#include "launch.h"

namespace car {
namespace gpu {
namespace {

using commplane_car::fail;

uint64_t now_ms() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return uint64_t(now.tv_sec) * 1000 + uint64_t(now.tv_nsec) / 1000000;
}

uint32_t seen(const uint32_t& word) { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); }
void say(uint32_t& word, uint32_t value) { __atomic_store_n(&word, value, __ATOMIC_RELEASE); }

// Two on a multiprocessor, as the kernels are bounded; with many ranks their registers allow one.
uint32_t blocks_of_grid(uint32_t ranks, uint32_t multiprocessors) { return ranks <= 4 ? 2 * multiprocessors : multiprocessors; }

// Where everything lies in a rank's memory. With more ranks each has less room, so that the whole stays about the same.
Layout lay_out(uint32_t ranks, uint32_t multiprocessors) {
    Layout out = {};
    out.ranks = ranks;
    out.blocks = blocks_of_grid(ranks, multiprocessors);
    const uint64_t blocks = out.blocks;
    out.lamport_vecs = ranks <= 2 ? 4096 : ranks <= 4 ? 2048 : 1024;
    out.tile_vecs = ranks <= 2 ? 1024 : ranks <= 4 ? 512 : 256;
    const auto place = [&](uint64_t bytes) {
        const uint64_t here = out.total;
        out.total += (bytes + 4095) / 4096 * 4096;
        return here;
    };
    out.flags = place(blocks * 128);
    out.mailbox = place(blocks * 2 * ranks * sizeof(Vec));
    out.lamport = place(blocks * 2 * (ranks - 1) * out.lamport_vecs * sizeof(Vec));
    out.tiles = place(blocks * kRing * ranks * out.tile_vecs * sizeof(Vec));
    return out;
}

int set_up(Comm& comm, const commplane_car_cuda_options& options, unsigned char* handle) {
    int capability = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, options.device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, options.device);
    if (error != cudaSuccess) return fail_cuda(error, "compute capability");
    int compiled_for = 0;
    const char* const missing = missing_code(&compiled_for);
    comm.early = capability >= 9 && compiled_for >= 90;  // code for less does not wait for the kernel before it
    if (missing != nullptr) {
        return fail(COMMPLANE_CAR_EUNSUPPORTED, "this build has no code for compute capability %d.%d: %s", capability, minor, missing);
    }
    Group& group = comm.group;
    group.layout = lay_out(options.world_size, options.multiprocessors);
    group.rank = options.rank;
    group.ranks = options.world_size;
    error = cudaHostRegister(options.control, COMMPLANE_CAR_CUDA_CONTROL_BYTES, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error != cudaSuccess) return fail_cuda(error, "cudaHostRegister of the page of control");
    comm.control = static_cast<Control*>(options.control);
    error = cudaHostGetDevicePointer(reinterpret_cast<void**>(&group.control), options.control, 0);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&comm.order, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&comm.captured_order, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaMalloc(&comm.memory, group.layout.total);
    const uint64_t state_bytes = uint64_t(group.layout.blocks) * sizeof(BlockState);
    if (error == cudaSuccess) error = cudaMalloc(reinterpret_cast<void**>(&group.state), state_bytes);
    if (error == cudaSuccess) error = cudaMemset(comm.memory, 0xff, group.layout.total);  // kEmpty everywhere
    const uint64_t flag_bytes = uint64_t(group.layout.blocks) * 128;
    if (error == cudaSuccess) error = cudaMemset(static_cast<char*>(comm.memory) + group.layout.flags, 0, flag_bytes);
    if (error == cudaSuccess) error = cudaMemset(group.state, 0, state_bytes);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return fail_cuda(error, "memory of the communicator");
    cudaIpcMemHandle_t ipc;
    error = cudaIpcGetMemHandle(&ipc, comm.memory);
    if (error != cudaSuccess) return fail_cuda(error, "cudaIpcGetMemHandle");
    memcpy(handle, &ipc, sizeof ipc);
    return COMMPLANE_CAR_OK;
}

void release(Comm& comm) {
    // An error here has been reported by the call that it came from, or is the device's last.
    for (uint32_t r = 0; r < comm.group.ranks; ++r) {
        if (comm.opened[r] != nullptr) cudaIpcCloseMemHandle(comm.opened[r]);
        comm.opened[r] = nullptr;
    }
    if (comm.control != nullptr && comm.connected) {
        // Memory that a peer still maps should not be freed. A peer that has ended has let go.
        say(comm.control->rank[comm.group.rank].closed, 1);
        const uint64_t until = now_ms() + (seen(comm.control->stop) ? 200 : 2000);
        for (uint32_t r = 0; r < comm.group.ranks; ++r) {
            while (!seen(comm.control->rank[r].closed) && now_ms() < until) {
                const timespec moment = {0, 200000};
                nanosleep(&moment, nullptr);
            }
        }
    }
    if (comm.memory != nullptr) cudaFree(comm.memory);
    if (comm.group.state != nullptr) cudaFree(comm.group.state);
    if (comm.rows != nullptr) cudaFree(comm.rows);
    if (comm.order != nullptr) cudaEventDestroy(comm.order);
    if (comm.captured_order != nullptr) cudaEventDestroy(comm.captured_order);
    if (comm.control != nullptr) cudaHostUnregister(comm.control);
    delete[] comm.captured;
    comm.memory = nullptr;
    comm.group.state = nullptr;
    comm.rows = nullptr;
    comm.order = comm.captured_order = nullptr;
    comm.control = nullptr;
    comm.captured = nullptr;
    cudaGetLastError();
}

}  // namespace

int fail_cuda(cudaError_t error, const char* what) {
    cudaGetLastError();  // it is reported here, and not by the next call of somebody else
    const int status = error == cudaErrorMemoryAllocation ? COMMPLANE_CAR_ENOMEM : COMMPLANE_CAR_ESYS;
    return fail(status, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

OnDevice::OnDevice(int device) {
    int now = -1;
    cudaError_t error = cudaGetDevice(&now);
    if (error == cudaSuccess && now != device) {
        error = cudaSetDevice(device);
        before_ = now;
    }
    if (error != cudaSuccess) status_ = fail_cuda(error, "cudaSetDevice");
}

OnDevice::~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
}

int open(const commplane_car_cuda_options& options, Comm** out, unsigned char* handle) {
    if (out == nullptr || handle == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    if (options.world_size < 2 || options.world_size > COMMPLANE_CAR_CUDA_MAX_WORLD || options.rank >= options.world_size) {
        return fail(COMMPLANE_CAR_EINVAL, "wanted a rank of 2 to %d, found %u of %u", COMMPLANE_CAR_CUDA_MAX_WORLD, options.rank,
                    options.world_size);
    }
    if (options.timeout_ns == 0) return fail(COMMPLANE_CAR_EINVAL, "timeout_ns is 0: every wait has to be bounded");
    if (options.multiprocessors == 0 || options.multiprocessors > 1024) {
        return fail(COMMPLANE_CAR_EINVAL, "wanted 1 to 1024 multiprocessors, found %u", options.multiprocessors);
    }
    if (options.control == nullptr || reinterpret_cast<uint64_t>(options.control) % 4096 != 0) {
        return fail(COMMPLANE_CAR_EINVAL, "the page of control is null or not aligned to 4096 bytes");
    }
    const OnDevice on(options.device);
    if (on.status() != 0) return on.status();
    Comm* comm = new (std::nothrow) Comm;
    if (comm == nullptr) return fail(COMMPLANE_CAR_ENOMEM, "out of memory");
    comm->device = options.device;
    comm->timeout_ns = options.timeout_ns;
    if (const int status = set_up(*comm, options, handle)) {
        release(*comm);
        delete comm;
        return status;
    }
    *out = comm;
    return COMMPLANE_CAR_OK;
}

int connect(Comm& comm, const unsigned char* handles) {
    const OnDevice on(comm.device);
    if (on.status() != 0) return on.status();
    for (uint32_t r = 0; r < comm.group.ranks; ++r) {
        if (r == comm.group.rank) {
            comm.group.memory[r] = static_cast<unsigned char*>(comm.memory);
            continue;
        }
        cudaIpcMemHandle_t ipc;
        memcpy(&ipc, handles + r * COMMPLANE_CAR_CUDA_HANDLE_BYTES, sizeof ipc);
        const cudaError_t error = cudaIpcOpenMemHandle(&comm.opened[r], ipc, cudaIpcMemLazyEnablePeerAccess);
        if (error != cudaSuccess) {
            comm.opened[r] = nullptr;
            char what[64];
            snprintf(what, sizeof what, "cudaIpcOpenMemHandle of rank %u", r);
            return fail_cuda(error, what);
        }
        comm.group.memory[r] = static_cast<unsigned char*>(comm.opened[r]);
    }
    comm.connected = true;
    return COMMPLANE_CAR_OK;
}

int close(Comm& comm) {
    if (comm.busy.exchange(true, std::memory_order_acquire)) return fail(COMMPLANE_CAR_EBUSY, "another thread is in a call on this communicator");
    if (comm.state.exchange(COMMPLANE_CAR_ECLOSED) != COMMPLANE_CAR_ECLOSED) {
        const OnDevice on(comm.device);
        cudaDeviceSynchronize();  // kernels end: each wait of theirs is bounded, and an abort ends them at once
        release(comm);
    }
    comm.busy.store(false, std::memory_order_release);
    return COMMPLANE_CAR_OK;
}

int order(Comm& comm, cudaStream_t stream) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaStreamIsCapturing(stream, &capturing);
    if (error == cudaSuccess && capturing == cudaStreamCaptureStatusActive) {
        // Within a capture an event is an edge of the graph. Between it and anything outside there is no order to make: the graph
        // runs when it is replayed.
        unsigned long long capture = 0;
        error = cudaStreamGetCaptureInfo(stream, &capturing, &capture);
        if (error == cudaSuccess && capture == comm.capture && stream != comm.captured_stream) {
            error = cudaEventRecord(comm.captured_order, comm.captured_stream);
            if (error == cudaSuccess) error = cudaStreamWaitEvent(stream, comm.captured_order, 0);
        }
        if (error != cudaSuccess) return fail_cuda(error, "order of two captured streams");
        comm.capture = capture;
        comm.captured_stream = stream;
        return COMMPLANE_CAR_OK;
    }
    if (error != cudaSuccess) cudaGetLastError();  // the launch will say what is wrong with the stream
    if (comm.called && comm.stream != stream) {
        // An event of a stream that captures by now may not be waited for: it would draw the other stream into the capture.
        error = cudaStreamIsCapturing(comm.stream, &capturing);
        if (error == cudaSuccess && capturing == cudaStreamCaptureStatusNone) {
            error = cudaEventRecord(comm.order, comm.stream);
            if (error == cudaSuccess) error = cudaStreamWaitEvent(stream, comm.order, 0);
        }
        if (error == cudaErrorInvalidResourceHandle || error == cudaErrorContextIsDestroyed) {  // that stream has gone, its work is done
            cudaGetLastError();
        } else if (error != cudaSuccess) {
            return fail_cuda(error, "order of two streams");
        }
    }
    comm.stream = stream;
    comm.called = true;
    return COMMPLANE_CAR_OK;
}

int fault(const Comm& comm) {
    if (comm.control == nullptr || seen(comm.control->stop) == 0) return COMMPLANE_CAR_OK;
    // The most telling first: ranks that call different things wait for each other in vain, too. What a peer's device found out is
    // this rank's fault as well.
    const ControlRank& mine = comm.control->rank[comm.group.rank];
    for (uint32_t r = 0; r < comm.group.ranks; ++r) {
        if (seen(comm.control->rank[r].causes[kOtherCall])) return COMMPLANE_CAR_EMISMATCH;
    }
    if (seen(mine.causes[kTwoAtOnce])) return COMMPLANE_CAR_EBUSY;
    if (seen(mine.causes[kTimedOut])) return COMMPLANE_CAR_ETIMEDOUT;
    return COMMPLANE_CAR_EABORTED;
}

commplane_car_cuda_detail detail(const Comm& comm) {
    commplane_car_cuda_detail out = {};
    out.sequence = comm.sequence.load(std::memory_order_relaxed);
    if (comm.control == nullptr) return out;
    out.status = fault(comm);
    const uint32_t own = comm.group.rank;
    for (uint32_t r = 0; r < comm.group.ranks; ++r) {
        const ControlRank& of = comm.control->rank[r];
        if (seen(of.gave_up) || seen(of.causes[kTimedOut]) || seen(of.causes[kOtherCall]) || seen(of.causes[kTwoAtOnce])) {
            out.abort_mask |= uint64_t(1) << r;
        }
        for (uint32_t p = 0; p < comm.group.ranks; ++p) {
            if (seen(of.missing[p])) out.missing_mask |= uint64_t(1) << p;
        }
    }
    const ControlRank& mine = comm.control->rank[own];
    if (mine.mine[0] != 0) out.mine = decode(mine.mine);
    for (uint32_t p = 0; p < comm.group.ranks; ++p) {
        const ControlRank& of = comm.control->rank[p];
        if (seen(mine.other[p])) {
            out.mismatch_mask |= uint64_t(1) << p;
            out.peers[p] = decode(mine.theirs[p]);
        } else if (p != own && seen(of.other[own])) {  // the peer saw it first
            out.mismatch_mask |= uint64_t(1) << p;
            out.peers[p] = decode(of.mine);
            if (mine.mine[0] == 0) out.mine = decode(of.theirs[own]);
        }
    }
    return out;
}

void describe(uint32_t kind, uint32_t dtype, uint32_t root, uint32_t algorithm, uint64_t count, uint64_t rest, uint32_t* words) {
    // 31 bits a word: none can be kEmpty.
    words[0] = uint32_t(kind << 27 | dtype << 23 | root << 19 | algorithm << 15 | (count >> 31 & 0x7fff));
    words[1] = uint32_t(count & 0x7fffffff);
    rest *= UINT64_C(0x9e3779b97f4a7c15);
    words[2] = uint32_t(rest >> 33);
}

commplane_car_call decode(const uint32_t* words) {
    commplane_car_call out = {};
    out.kind = words[0] >> 27 & 15;
    out.dtype = words[0] >> 23 & 15;
    out.root = words[0] >> 19 & 15;
    out.count = uint64_t(words[0] & 0x7fff) << 31 | words[1];
    out.op = out.kind == COMMPLANE_CAR_KIND_ALL_REDUCE || out.kind == COMMPLANE_CAR_KIND_REDUCE_SCATTER ||
                     out.kind == COMMPLANE_CAR_KIND_ALL_REDUCE_RMS_NORM
                 ? uint32_t(COMMPLANE_CAR_SUM)
                 : 0;
    return out;
}

}  // namespace gpu
}  // namespace car
