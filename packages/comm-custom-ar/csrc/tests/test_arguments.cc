// SPDX-License-Identifier: Apache-2.0
// What is wrong with one rank's arguments is refused on that rank before anything is sent, and poisons nothing; and the lives of
// segments, communicators and registrations.
#include <string.h>
#include <sys/statvfs.h>

#include "detail.h"
#include "numbers.h"

namespace {

constexpr int kSum = COMMPLANE_CAR_SUM;
constexpr int kInvalid = COMMPLANE_CAR_EINVAL;
constexpr int kUnsupported = COMMPLANE_CAR_EUNSUPPORTED;
constexpr uint64_t kTooMany = UINT64_C(1) << 48;

void collectives(Rank& self) {
    commplane_car_comm* const comm = self.comm;
    float data[64] = {}, out[64] = {}, more[64] = {}, sum[64] = {};
    // all_reduce
    CHECK_STATUS(commplane_car_all_reduce(comm, data, data + 1, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_all_reduce(comm, nullptr, data, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_all_reduce(comm, data, nullptr, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_all_reduce(comm, data, data, kTooMany, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_all_reduce(comm, data, data, 4, 0, kSum), kUnsupported);
    CHECK_STATUS(commplane_car_all_reduce(comm, data, data, 4, 9, kSum), kUnsupported);
    CHECK_STATUS(commplane_car_all_reduce(comm, data, data, 4, -1, kSum), kUnsupported);
    CHECK_STATUS(commplane_car_all_reduce(comm, data, data, 4, kFloat32, 0), kUnsupported);
    CHECK_STATUS(commplane_car_all_reduce(comm, data, data, 4, kFloat32, 5), kUnsupported);
    // No mean of integers.
    for (const int dtype : kDtypes) {
        if (!is_integer(dtype)) continue;
        CHECK_STATUS(commplane_car_all_reduce(comm, data, data, 4, dtype, COMMPLANE_CAR_AVG), kUnsupported);
        CHECK_STATUS(commplane_car_reduce_scatter(comm, data, out, 4, dtype, COMMPLANE_CAR_AVG), kUnsupported);
    }
    // all_gather: `in` may be this rank's part of `out`, and no other.
    const uint32_t other = 1 - self.rank;
    CHECK_STATUS(commplane_car_all_gather(comm, out + 4 * other, out, 4, kFloat32), kInvalid);
    CHECK_STATUS(commplane_car_all_gather(comm, out + 4 * self.rank + 1, out, 4, kFloat32), kInvalid);
    CHECK_STATUS(commplane_car_all_gather(comm, nullptr, out, 4, kFloat32), kInvalid);
    CHECK_STATUS(commplane_car_all_gather(comm, data, nullptr, 4, kFloat32), kInvalid);
    CHECK_STATUS(commplane_car_all_gather(comm, data, out, kTooMany / 2, kFloat32), kInvalid);
    CHECK_STATUS(commplane_car_all_gather(comm, data, out, 4, 9), kUnsupported);
    // reduce_scatter: `out` may be this rank's part of `in`, and no other.
    CHECK_STATUS(commplane_car_reduce_scatter(comm, data, data + 4 * other, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_reduce_scatter(comm, data, data + 4 * self.rank + 1, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_reduce_scatter(comm, nullptr, out, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_reduce_scatter(comm, data, nullptr, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_reduce_scatter(comm, data, out, kTooMany / 2, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_reduce_scatter(comm, data, out, 4, 0, kSum), kUnsupported);
    CHECK_STATUS(commplane_car_reduce_scatter(comm, data, out, 4, kFloat32, 5), kUnsupported);
    // broadcast
    CHECK_STATUS(commplane_car_broadcast(comm, data, 4, kFloat32, 2), kInvalid);
    CHECK_STATUS(commplane_car_broadcast(comm, nullptr, 4, kFloat32, 0), kInvalid);
    CHECK_STATUS(commplane_car_broadcast(comm, data, kTooMany, kFloat32, 0), kInvalid);
    CHECK_STATUS(commplane_car_broadcast(comm, data, 4, 9, 0), kUnsupported);
    // all_reduce_rms_norm: in, residual, weight, norm_out, residual_out
    const auto norm = [&](const void* in, const void* residual, const void* weight, void* norm_out, void* residual_out) {
        return commplane_car_all_reduce_rms_norm(comm, in, residual, weight, norm_out, residual_out, 2, 4, kFloat32, 1e-6f, 0.0f);
    };
    float* const weight = more + 32;
    CHECK_STATUS(norm(nullptr, more, weight, out, sum), kInvalid);
    CHECK_STATUS(norm(data, nullptr, weight, out, sum), kInvalid);
    CHECK_STATUS(norm(data, more, nullptr, out, sum), kInvalid);
    CHECK_STATUS(norm(data, more, weight, nullptr, sum), kInvalid);
    CHECK_STATUS(norm(data, more, weight, out, nullptr), kInvalid);
    CHECK_STATUS(norm(data, more, weight, data + 1, sum), kInvalid);   // norm_out overlaps in
    CHECK_STATUS(norm(data, more, weight, more, sum), kInvalid);       // norm_out is residual
    CHECK_STATUS(norm(data, more, weight, out, more + 1), kInvalid);   // residual_out overlaps residual
    CHECK_STATUS(norm(data, more, weight, out, data), kInvalid);       // residual_out is in
    CHECK_STATUS(norm(data, more, weight, out, out), kInvalid);        // both outputs the same
    CHECK_STATUS(norm(data, more, out + 4, out, sum), kInvalid);       // norm_out overlaps weight
    CHECK_STATUS(norm(data, more, sum, out, sum), kInvalid);           // residual_out overlaps weight
    for (const int dtype : {0, int{COMMPLANE_CAR_FLOAT64}, int{COMMPLANE_CAR_INT32}, int{COMMPLANE_CAR_UINT8}, 9}) {
        CHECK_STATUS(commplane_car_all_reduce_rms_norm(comm, data, more, weight, out, sum, 1, 2, dtype, 1e-6f, 0.0f), kUnsupported);
    }
    CHECK_STATUS(commplane_car_all_reduce_rms_norm(comm, data, more, weight, out, sum, kTooMany, 1, kFloat32, 1e-6f, 0.0f), kInvalid);
    CHECK_STATUS(commplane_car_all_reduce_rms_norm(comm, data, more, weight, out, sum, 1, kTooMany, kFloat32, 1e-6f, 0.0f), kInvalid);
    CHECK_STATUS(commplane_car_all_reduce_rms_norm(comm, data, more, weight, out, sum, UINT64_C(1) << 40, UINT64_C(1) << 30, kFloat32,
                                                   1e-6f, 0.0f), kInvalid);
    // None of these was a collective step, none poisons, and none of the memory has changed.
    CHECK_STATUS(commplane_car_barrier(comm), 0);
    CHECK(detail_of(self).sequence == 1);
    for (int i = 0; i < 64; ++i) CHECK(data[i] == 0 && out[i] == 0 && more[i] == 0 && sum[i] == 0);
}

void no_communicator() {
    float data[4] = {};
    commplane_car_detail detail = {};
    detail.size = sizeof detail;
    uint64_t count = 0;
    CHECK_STATUS(commplane_car_all_reduce(nullptr, data, data, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_all_gather(nullptr, data, data, 4, kFloat32), kInvalid);
    CHECK_STATUS(commplane_car_reduce_scatter(nullptr, data, data, 4, kFloat32, kSum), kInvalid);
    CHECK_STATUS(commplane_car_broadcast(nullptr, data, 4, kFloat32, 0), kInvalid);
    CHECK_STATUS(commplane_car_all_reduce_rms_norm(nullptr, data, data, data, data, data, 1, 4, kFloat32, 0, 0), kInvalid);
    CHECK_STATUS(commplane_car_barrier(nullptr), kInvalid);
    CHECK_STATUS(commplane_car_abort(nullptr), kInvalid);
    CHECK_STATUS(commplane_car_set_timeout(nullptr, 1), kInvalid);
    CHECK_STATUS(commplane_car_single_copy_probe(nullptr), kInvalid);
    CHECK_STATUS(commplane_car_single_copy_enable(nullptr, 0, 0), kInvalid);
    CHECK_STATUS(commplane_car_flight(nullptr, data, sizeof(commplane_car_flight_record), 1, &count), kInvalid);
    CHECK_STATUS(commplane_car_status_detail(nullptr, &detail), kInvalid);
    CHECK_STATUS(commplane_car_comm_close(nullptr), kInvalid);
    CHECK(commplane_car_chunk_bytes(nullptr) == 0);
}

void regions(Rank& self) {
    commplane_car_comm* const comm = self.comm;
    unsigned char memory[4096];
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory, 16, 32, 1), kInvalid);  // parts would overlap
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory, 16, 16, 0), kInvalid);
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory, 16, 16, 65536), kInvalid);
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory, 16, 0, 1), kInvalid);
    CHECK_STATUS(commplane_car_register_symmetric(comm, nullptr, 16, 16, 1), kInvalid);
    CHECK_STATUS(commplane_car_unregister_symmetric(comm, 9), COMMPLANE_CAR_ENOENT);
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory, 64, 64, 9), 0);
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory + 1024, 64, 64, 9), COMMPLANE_CAR_EEXIST);
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory + 32, 64, 64, 10), kInvalid);  // overlaps 9
    for (uint32_t id = 1; id < COMMPLANE_CAR_MAX_REGIONS; ++id) {
        CHECK_STATUS(commplane_car_register_symmetric(comm, memory + 1024 + 8 * id, 1024, 8, 100 + id), 0);
    }
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory + 512, 8, 8, 1), COMMPLANE_CAR_ELIMIT);
    CHECK_STATUS(commplane_car_unregister_symmetric(comm, 9), 0);
    CHECK_STATUS(commplane_car_register_symmetric(comm, memory + 512, 8, 8, 1), 0);
    CHECK_STATUS(commplane_car_barrier(comm), 0);
}

void lifecycle() {
    const std::string name = fresh_name();
    commplane_car_options options = {};
    options.size = sizeof options;
    options.world_size = 2;
    options.staging_bytes = 4096;
    options.timeout_ns = 1000000000;
    commplane_car_layout_info info = {};
    CHECK_STATUS(commplane_car_layout(&options, &info), kInvalid);  // no size
    info.size = sizeof info;
    CHECK_STATUS(commplane_car_layout(&options, &info), 0);
    CHECK(info.total_bytes == 2 * info.part_bytes);
    commplane_car_segment* segment = nullptr;
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 0, 0, &segment), COMMPLANE_CAR_ENOENT);
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), info.total_bytes), 0);
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), info.total_bytes), COMMPLANE_CAR_EEXIST);
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes + 1, 0, 0, &segment), COMMPLANE_CAR_ESIZE);
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 8, info.total_bytes, &segment), kInvalid);
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 0, info.part_bytes, &segment), 0);
    commplane_car_comm* comm = nullptr;
    const auto refused = [&](const std::function<void(commplane_car_options&)>& change) {
        commplane_car_options odd = options;
        change(odd);
        return commplane_car_comm_open(&odd, segment, &comm);
    };
    CHECK_STATUS(refused([](commplane_car_options& o) { o.chunk_bytes = 100; }), kInvalid);
    CHECK_STATUS(refused([](commplane_car_options& o) { o.rank = 2; }), kInvalid);
    CHECK_STATUS(refused([](commplane_car_options& o) { o.world_size = 1; }), kInvalid);
    CHECK_STATUS(refused([](commplane_car_options& o) { o.world_size = 65; }), kInvalid);
    CHECK_STATUS(refused([](commplane_car_options& o) { o.staging_bytes = 255; }), kInvalid);
    CHECK_STATUS(refused([](commplane_car_options& o) { o.timeout_ns = 0; }), kInvalid);
    CHECK_STATUS(refused([](commplane_car_options& o) { o.world_size = 64; }), COMMPLANE_CAR_ESIZE);
    options.chunk_bytes = 0;
    CHECK_STATUS(commplane_car_comm_open(&options, segment, &comm), 0);
    CHECK(commplane_car_chunk_bytes(comm) == 1024);  // the staging allows no more
    commplane_car_comm* again = nullptr;
    CHECK_STATUS(commplane_car_comm_open(&options, segment, &again), COMMPLANE_CAR_EBUSY);
    CHECK_STATUS(commplane_car_segment_unmap(segment), COMMPLANE_CAR_EBUSY);
    CHECK_STATUS(commplane_car_comm_close(comm), 0);
    CHECK_STATUS(commplane_car_comm_close(comm), 0);
    CHECK_STATUS(commplane_car_barrier(comm), COMMPLANE_CAR_ECLOSED);
    CHECK_STATUS(commplane_car_abort(comm), COMMPLANE_CAR_ECLOSED);
    CHECK_STATUS(commplane_car_segment_unmap(segment), 0);
    CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
    CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
    CHECK_STATUS(commplane_car_segment_create("a/b", 64), kInvalid);
    CHECK_STATUS(commplane_car_segment_create("", 64), kInvalid);
}

// A slot has to hold an element of 8 bytes for every rank.
void slots_for_all_ranks() {
    const std::string name = fresh_name();
    commplane_car_options options = {};
    options.size = sizeof options;
    options.world_size = 9;
    options.staging_bytes = 256;  // slots of 64 bytes
    options.timeout_ns = 1000000000;
    commplane_car_layout_info info = {};
    info.size = sizeof info;
    CHECK_STATUS(commplane_car_layout(&options, &info), 0);
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), info.total_bytes), 0);
    commplane_car_segment* segment = nullptr;
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 0, 0, &segment), 0);
    CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
    commplane_car_comm* comm = nullptr;
    CHECK_STATUS(commplane_car_comm_open(&options, segment, &comm), kInvalid);
    CHECK(strstr(commplane_car_last_error(), "8 * world_size") != nullptr);
    CHECK_STATUS(commplane_car_segment_unmap(segment), 0);
}

// A reservation larger than all of /dev/shm is refused by the kernel before it touches a page.
void full() {
    struct statvfs about;
    if (statvfs("/dev/shm", &about) != 0 || about.f_blocks == 0) {
        printf("/dev/shm has no size here: that a full one is refused was not tested\n");
        return;
    }
    const uint64_t bytes = (about.f_blocks * about.f_frsize + (1 << 20)) / 4096 * 4096;
    const std::string name = fresh_name();
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), bytes), 0);
    commplane_car_segment* segment = nullptr;
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), bytes, 0, bytes, &segment), COMMPLANE_CAR_ENOSPC);
    CHECK(strstr(commplane_car_last_error(), "No space left") != nullptr);
    CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
}

}  // namespace

int main() {
    deadline(120);
    run_group({}, collectives);
    no_communicator();
    run_group({}, regions);
    lifecycle();
    slots_for_all_ranks();
    full();
    return report("arguments");
}
