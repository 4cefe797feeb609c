// SPDX-License-Identifier: Apache-2.0
// Ranks that make different calls all get EMISMATCH and see the other calls, decoded; nobody's memory is touched.
#include <string.h>

#include "detail.h"
#include "problem.h"

namespace {

constexpr uint64_t kPart = 64 << 10;       // of the symmetric memory, in two registrations
constexpr uint64_t kMost = 3 * kPart / 2;  // bytes of an ordinary buffer

// A call as the ranks compare it.
commplane_car_call call_of(int kind, int dtype, int op, uint64_t count) {
    commplane_car_call call = {};
    call.kind = static_cast<uint32_t>(kind);
    call.dtype = static_cast<uint32_t>(dtype);
    call.op = static_cast<uint32_t>(op);
    call.count = count;
    return call;
}

commplane_car_call all_reduce(int dtype, int op, uint64_t count) { return call_of(kAllReduce, dtype, op, count); }
commplane_car_call all_gather(int dtype, uint64_t count) { return call_of(kAllGather, dtype, 0, count); }
commplane_car_call reduce_scatter(int dtype, int op, uint64_t count) { return call_of(kReduceScatter, dtype, op, count); }
commplane_car_call barrier() { return call_of(kBarrier, 0, 0, 0); }

commplane_car_call broadcast(int dtype, uint64_t count, uint32_t root) {
    commplane_car_call call = call_of(kBroadcast, dtype, 0, count);
    call.root = root;
    return call;
}

commplane_car_call norm(int dtype, uint64_t rows, uint64_t hidden, float eps, float weight_bias) {
    commplane_car_call call = call_of(kRmsNorm, dtype, COMMPLANE_CAR_SUM, rows * hidden);
    call.hidden = hidden;
    call.eps = eps;
    call.weight_bias = weight_bias;
    return call;
}

commplane_car_call symmetric(commplane_car_call call, uint32_t region, uint64_t offset, bool in_place) {
    call.symmetric = 1;
    call.region = region;
    call.offset = offset;
    call.in_place = in_place ? 1 : 0;
    return call;
}

bool same(const commplane_car_call& a, const commplane_car_call& b) {
    return a.kind == b.kind && a.dtype == b.dtype && a.op == b.op && a.symmetric == b.symmetric && a.in_place == b.in_place &&
           a.region == b.region && a.count == b.count && a.offset == b.offset && a.hidden == b.hidden && a.root == b.root &&
           bits_of(a.eps) == bits_of(b.eps) && bits_of(a.weight_bias) == bits_of(b.weight_bias);
}

// One rank's memory: all zero, and to stay so.
struct Memory {
    Bytes in, out, more, weight;
    explicit Memory(const Rank& self) : in(kMost), out(kMost), more(kMost), weight(kMost) {
        if (self.symmetric != nullptr) memset(self.symmetric, 0, self.symmetric_bytes);
    }
    bool untouched(const Rank& self) const {
        const Bytes zeros(kMost);
        return in == zeros && out == zeros && more == zeros && weight == zeros &&
               (self.symmetric == nullptr || memcmp(self.symmetric, zeros.data(), self.symmetric_bytes) == 0);
    }
};

// Makes the call that `call` describes.
int make(const Rank& self, Memory& memory, const commplane_car_call& call) {
    unsigned char* in = memory.in.data();
    if (call.symmetric != 0) in = self.symmetric + (call.region == 2 ? kPart / 2 : 0) + call.offset;
    unsigned char* const out = call.in_place != 0 ? in : memory.out.data();
    const int dtype = static_cast<int>(call.dtype), op = static_cast<int>(call.op);
    switch (call.kind) {
        case kAllReduce: return commplane_car_all_reduce(self.comm, in, out, call.count, dtype, op);
        case kAllGather: return commplane_car_all_gather(self.comm, in, out, call.count, dtype);
        case kReduceScatter: return commplane_car_reduce_scatter(self.comm, in, out, call.count, dtype, op);
        case kBroadcast: return commplane_car_broadcast(self.comm, in, call.count, dtype, call.root);
        case kRmsNorm:
            return commplane_car_all_reduce_rms_norm(self.comm, in, memory.more.data(), memory.weight.data(), out,
                                                     memory.more.data(), call.count / call.hidden, call.hidden, dtype, call.eps,
                                                     call.weight_bias);
        default: return commplane_car_barrier(self.comm);
    }
}

void register_two(const Rank& self) {
    unsigned char* const base = self.symmetric - self.rank * self.symmetric_bytes;
    CHECK_STATUS(commplane_car_unregister_symmetric(self.comm, 1), 0);
    CHECK_STATUS(commplane_car_register_symmetric(self.comm, base, kPart, kPart / 2, 1), 0);
    CHECK_STATUS(commplane_car_register_symmetric(self.comm, base + kPart / 2, kPart, kPart / 2, 2), 0);
}

// Rank 1 of 3 makes the call `odd`, the others `common`, after one good call.
void mismatch(const commplane_car_call& common, const commplane_car_call& odd) {
    GroupOptions options;
    options.world = 3;
    options.symmetric = kPart;
    const int before = failures;
    run_group(options, [&](Rank& self) {
        register_two(self);
        Memory memory(self);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        const commplane_car_call& mine = self.rank == 1 ? odd : common;
        const commplane_car_call& theirs = self.rank == 1 ? common : odd;
        CHECK_STATUS(make(self, memory, mine), COMMPLANE_CAR_EMISMATCH);
        const commplane_car_detail detail = detail_of(self);
        CHECK(detail.status == COMMPLANE_CAR_EMISMATCH);
        CHECK(detail.sequence == 2);
        CHECK(detail.missing_mask == 0 && detail.dead_mask == 0 && detail.abort_mask == 0);
        CHECK(detail.mismatch_mask == (self.rank == 1 ? 5u : 2u));
        CHECK(same(detail.mine, mine));
        for (uint32_t rank = 0; rank < 3; ++rank) {
            const bool differs = (detail.mismatch_mask >> rank & 1) != 0;
            CHECK(same(detail.peers[rank], differs ? theirs : commplane_car_call{}));
        }
        const char* const text = commplane_car_last_error();
        CHECK(strstr(text, name_of(static_cast<int>(mine.kind))) == text);
        CHECK(strstr(text, self.rank == 1 ? "#2: rank 0, 2 made another call" : "#2: rank 1 made another call") != nullptr);
        CHECK(memory.untouched(self));
        check_poisoned(self);
    });
    if (failures != before) fprintf(stderr, "the calls were a %s and a %s\n", name_of(static_cast<int>(common.kind)), name_of(static_cast<int>(odd.kind)));
}

void every_field() {
    constexpr int kSum = COMMPLANE_CAR_SUM, kMax = COMMPLANE_CAR_MAX, kInt32 = COMMPLANE_CAR_INT32;
    const commplane_car_call reduce = all_reduce(kFloat32, kSum, 100);
    mismatch(reduce, all_reduce(kFloat32, kSum, 101));
    mismatch(reduce, all_reduce(kFloat32, kSum, 0));
    mismatch(reduce, all_reduce(kFloat16, kSum, 100));
    mismatch(reduce, all_reduce(kInt32, kSum, 100));
    mismatch(reduce, all_reduce(kFloat32, kMax, 100));
    mismatch(all_reduce(COMMPLANE_CAR_UINT8, kSum, 77), all_reduce(COMMPLANE_CAR_INT8, kSum, 77));
    mismatch(all_reduce(kFloat64, COMMPLANE_CAR_MIN, 9), all_reduce(COMMPLANE_CAR_INT64, COMMPLANE_CAR_MIN, 9));

    mismatch(all_gather(kFloat32, 100), all_gather(kFloat32, 99));
    mismatch(all_gather(kFloat32, 100), all_gather(kInt32, 100));
    mismatch(reduce_scatter(kFloat32, kSum, 100), reduce_scatter(kFloat32, kSum, 99));
    mismatch(reduce_scatter(kFloat32, kSum, 100), reduce_scatter(kInt32, kSum, 100));
    mismatch(reduce_scatter(kFloat32, kSum, 100), reduce_scatter(kFloat32, COMMPLANE_CAR_AVG, 100));
    mismatch(broadcast(kFloat32, 100, 0), broadcast(kFloat32, 100, 1));
    mismatch(broadcast(kFloat32, 100, 2), broadcast(kFloat32, 101, 2));
    mismatch(broadcast(kFloat32, 100, 2), broadcast(kInt32, 100, 2));
    const commplane_car_call normed = norm(kBfloat16, 4, 30, 1e-6f, 0.0f);
    mismatch(normed, norm(kBfloat16, 5, 30, 1e-6f, 0.0f));
    mismatch(normed, norm(kBfloat16, 5, 24, 1e-6f, 0.0f));  // as many elements
    mismatch(normed, norm(kFloat16, 4, 30, 1e-6f, 0.0f));
    mismatch(normed, norm(kBfloat16, 4, 30, 1e-5f, 0.0f));
    mismatch(normed, norm(kBfloat16, 4, 30, 1e-6f, 1.0f));
    mismatch(normed, norm(kBfloat16, 4, 30, -1e-6f, 0.0f));
}

// Every kind against every other, once with little data and once with more hops on one side than on the other.
void every_kind() {
    for (const uint64_t count : {60u, 12000u}) {
        const commplane_car_call calls[] = {all_reduce(kFloat32, COMMPLANE_CAR_SUM, count), barrier(), all_gather(kFloat32, count / 4),
                                            reduce_scatter(kFloat32, COMMPLANE_CAR_SUM, count / 4), broadcast(kFloat32, count, 0),
                                            norm(kFloat32, count / 60, 60, 1e-6f, 0.0f)};
        for (const commplane_car_call& common : calls) {
            for (const commplane_car_call& odd : calls) {
                if (common.kind != odd.kind) mismatch(common, odd);
            }
        }
    }
}

// Symmetric buffers elsewhere, in place here and not there, or symmetric here and not there, are found before anybody writes.
void symmetric_buffers() {
    constexpr int kSum = COMMPLANE_CAR_SUM;
    for (const uint64_t count : {100u, 2000u}) {  // through the slots, and in place
        const commplane_car_call reduce = all_reduce(kFloat32, kSum, count);
        mismatch(symmetric(reduce, 1, 0, true), symmetric(reduce, 1, 64, true));
        mismatch(symmetric(reduce, 1, 0, true), symmetric(reduce, 2, 0, true));
        mismatch(symmetric(reduce, 2, 64, true), symmetric(reduce, 2, 64, false));
        mismatch(symmetric(reduce, 1, 128, true), reduce);
        mismatch(reduce, symmetric(reduce, 1, 128, false));
        mismatch(symmetric(all_gather(kFloat32, count), 1, 0, false), symmetric(all_gather(kFloat32, count), 1, 4, false));
        mismatch(symmetric(broadcast(kFloat32, count, 0), 1, 0, false), symmetric(broadcast(kFloat32, count, 0), 2, 0, false));
        const commplane_car_call scatter = reduce_scatter(kFloat32, kSum, count / 3);
        mismatch(symmetric(scatter, 1, 0, false), symmetric(scatter, 1, 8, false));
        const commplane_car_call normed = norm(kFloat32, count / 50, 50, 1e-6f, 0.0f);
        mismatch(symmetric(normed, 1, 0, false), symmetric(normed, 1, 0, true));
        mismatch(symmetric(normed, 1, 0, false), symmetric(normed, 1, 64, false));
    }
}

// A mistake that two ranks know of does not wait for the third for long; who comes later finds it, too.
void late_rank() {
    GroupOptions options;
    options.world = 3;
    std::atomic<int> returned{0};
    run_group(options, [&](Rank& self) {
        float data[4] = {};
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        while (self.rank == 2 && returned != 2) std::this_thread::sleep_for(std::chrono::milliseconds(5));
        const uint64_t count = self.rank == 1 ? 3 : 4;
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, count, kFloat32, COMMPLANE_CAR_SUM), COMMPLANE_CAR_EMISMATCH);
        const commplane_car_detail detail = detail_of(self);
        CHECK(detail.mismatch_mask == (self.rank == 1 ? 1u : 2u));
        CHECK(detail.missing_mask == (self.rank == 2 ? 0u : 4u));
        CHECK(detail.peers[self.rank == 1 ? 0 : 1].count == (self.rank == 1 ? 4u : 3u));
        ++returned;
    });
}

// What the ranks opened with is compared as well, by the first call.
void other_geometry(const std::function<void(commplane_car_options&)>& adjust) {
    GroupOptions options;
    options.adjust = adjust;
    run_group(options, [&](Rank& self) {
        float value = 1;
        CHECK_STATUS(commplane_car_all_reduce(self.comm, &value, &value, 1, kFloat32, COMMPLANE_CAR_SUM), COMMPLANE_CAR_EMISMATCH);
        CHECK(detail_of(self).mismatch_mask == UINT64_C(1) << (1 - self.rank));
        CHECK(strstr(commplane_car_last_error(), "opened its communicator with another") != nullptr);
        check_poisoned(self);
    });
}

}  // namespace

int main() {
    deadline(590);
    every_field();
    every_kind();
    symmetric_buffers();
    late_rank();
    other_geometry([](commplane_car_options& own) { own.chunk_bytes = own.rank == 0 ? 1024 : 512; });
    other_geometry([](commplane_car_options& own) { own.token = own.rank; });
    return report("mismatches");
}
