// SPDX-License-Identifier: Apache-2.0
// Two-shot all-reduce without staging: the kernel copies straight between the processes (process_vm_readv). A rank publishes
// the address of its data with the flag.
//
//   hop 1: all inputs are there. Rank r reads slice r of every peer's input, a piece at a time into scratch that stays in the
//          cache, and reduces it into its own `out`.
//   hop 2: all slices are reduced. Every rank reads the other slices from their owners' `out`.
//   hop 3: all have read.
//
// In place is safe: before hop 2 a rank writes nothing but slice r of its buffer, which no peer reads; after it nothing but the
// other slices, of which no peer reads this rank's copy.
//
// It needs the permission to ptrace the peers, and one pid namespace: single_copy_probe() tries it on a word that is known.
#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>

#include "collective.h"
#include "error.h"
#include "faults.h"
#include "pipeline.h"

namespace commplane_car {
namespace {

constexpr uint64_t kScratchBytes = 65536;  // a peer
constexpr uint64_t kSliceAlign = 64;

// 0, or errno.
int read_peer(const Comm& comm, uint32_t rank, uint64_t address, void* to, uint64_t bytes) {
    const auto process = static_cast<pid_t>(comm.control[rank]->hello.process_id.load(std::memory_order_relaxed));
    while (bytes != 0) {
        iovec local = {to, bytes};
        iovec remote = {reinterpret_cast<void*>(address), bytes};
        const ssize_t got = process_vm_readv(process, &local, 1, &remote, 1, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return EFAULT;
        to = static_cast<unsigned char*>(to) + got;
        address += static_cast<uint64_t>(got);
        bytes -= static_cast<uint64_t>(got);
    }
    return 0;
}

int fail_read(Comm& comm, const Call& call, uint32_t rank, int error) {
    // A peer that gave up may have returned its memory since, or have ended.
    std::atomic_thread_fence(std::memory_order_acquire);
    if (any_aborted(comm)) return refuse_aborted(comm, call.descriptor);
    if (error == ESRCH) return fail_peer(comm, call.descriptor, rank);
    return fail_here(comm, call.descriptor, fail_errno(COMMPLANE_CAR_ESYS, error, "cannot read a peer's memory", ""));
}

uint64_t address_at(const Comm& comm, uint32_t rank, uint64_t step) {
    return comm.control[rank]->ring[step % kRing].address.load(std::memory_order_relaxed);
}

}  // namespace

int all_reduce_single_copy(Comm& comm, const Call& call) {
    const uint64_t total = call.count * call.element_bytes;
    const uint64_t slice = ceil_div(ceil_div(total, comm.world), kSliceAlign) * kSliceAlign;
    const uint64_t step = comm.next_step;

    publish(comm, step, call.descriptor, call.in);
    if (const int status = await(comm, step, call.descriptor)) return status;
    const uint64_t begin = smaller(comm.rank * slice, total), end = smaller(begin + slice, total);
    for (uint64_t at = begin; at < end; at += kScratchBytes) {
        const uint64_t bytes = smaller(end - at, kScratchBytes);
        const void* from[COMMPLANE_CAR_MAX_WORLD];
        for (uint32_t rank = 0; rank < comm.world; ++rank) {
            unsigned char* const scratch = comm.scratch + rank * kScratchBytes;
            from[rank] = scratch;
            if (rank == comm.rank) continue;
            const int error = read_peer(comm, rank, address_at(comm, rank, step) + at, scratch, bytes);
            if (error != 0) return fail_read(comm, call, rank, error);
        }
        from[comm.rank] = call.in + at;
        void* to = call.out + at;
        call.reduce(&to, 1, from, comm.world, bytes / call.element_bytes);
    }

    publish(comm, step + 1, call.descriptor, call.out);
    if (const int status = await(comm, step + 1, call.descriptor)) return status;
    for (uint32_t other = 1; other < comm.world; ++other) {
        const uint32_t rank = (comm.rank + other) % comm.world;
        const uint64_t at = smaller(rank * slice, total), bytes = smaller(total - at, slice);
        const int error = read_peer(comm, rank, address_at(comm, rank, step + 1) + at, call.out + at, bytes);
        if (error != 0) return fail_read(comm, call, rank, error);
    }
    comm.next_step = step + 2;
    return last_hop(comm, call.descriptor);
}

int single_copy_probe(Comm& comm) {
    const HelloLine& mine = comm.control[comm.rank]->hello;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        const HelloLine& hello = comm.control[rank]->hello;
        if (hello.magic.load(std::memory_order_acquire) != kMagic) {
            return fail(COMMPLANE_CAR_ESYS, "rank %u has not opened its communicator yet", rank);
        }
        if (hello.process_id.load(std::memory_order_relaxed) == 0 ||
            hello.process_namespace.load(std::memory_order_relaxed) != mine.process_namespace.load(std::memory_order_relaxed)) {
            return fail(COMMPLANE_CAR_ESYS, "rank %u runs in another pid namespace, or /proc is not there", rank);
        }
        uint64_t word = 0;
        const uint64_t place = hello.single_copy_probe.load(std::memory_order_relaxed);
        const int error = read_peer(comm, rank, place, &word, sizeof word);
        if (error != 0) return fail_errno(COMMPLANE_CAR_ESYS, error, "cannot read the memory of another rank", "");
        if (word != (kMagic ^ rank ^ hello.token.load(std::memory_order_relaxed))) {
            return fail(COMMPLANE_CAR_ESYS, "the process with rank %u's number is another one", rank);
        }
    }
    return COMMPLANE_CAR_OK;
}

int single_copy_enable(Comm& comm, uint64_t min_bytes, uint64_t max_bytes) {
    if (max_bytes != 0 && comm.scratch == nullptr) {
        comm.scratch = static_cast<unsigned char*>(aligned_alloc(4096, kScratchBytes * comm.world));
        if (comm.scratch == nullptr) return fail(COMMPLANE_CAR_ENOMEM, "no memory for the scratch of the single-copy path");
    }
    comm.single_copy_min = max_bytes == 0 ? UINT64_MAX : min_bytes;
    comm.single_copy_max = max_bytes;
    return COMMPLANE_CAR_OK;
}

}  // namespace commplane_car
