// SPDX-License-Identifier: Apache-2.0
// All-reduce, residual add and RMSNorm in one pass: a row is normalised while it is still in the cache. The rounding points are
// those of FlashInfer's fused kernels (kARResidualRMSNorm): the sum is rounded to the dtype, then the new residual; the norm is
// computed from that in float32 and rounded once.
//
//   staged      one-shot through the pipeline, whole rows a chunk; a row that is longer than a slot goes in pieces.
//   symmetric   one-shot, the peers' rows are read where they are.
//   many ranks  from where a two-shot all-reduce is faster it runs first, into norm_out, and the rest follows row by row.
#include <string.h>

#include "collective.h"
#include "error.h"
#include "faults.h"
#include "pipeline.h"
#include "tuning.h"

namespace commplane_car {
namespace {

float inverse_rms(float squares, uint64_t hidden, float eps) {
    return 1.0f / __builtin_sqrtf(squares / static_cast<float>(hidden) + eps);
}

// What is done with the rows of one call; pieces of a row come in order.
class Rows {
  public:
    explicit Rows(const NormCall& norm)
        : norm_(norm), element_(norm.call.element_bytes), row_bytes_(norm.hidden * norm.call.element_bytes) {}

    // Elements [begin, begin + count) of row `row`; from[r] points to rank r's.
    void piece(uint64_t row, uint64_t begin, uint64_t count, const void* const* from, uint32_t sources) {
        if (begin == 0) memset(lanes_, 0, sizeof lanes_);
        const uint64_t start = row * row_bytes_, at = start + begin * element_;
        norm_.kernels->accumulate(from, sources, norm_.residual + at, norm_.residual_out + at, count, lanes_);
        if (begin + count != norm_.hidden) return;
        const float inverse = inverse_rms(norm_.kernels->total(lanes_), norm_.hidden, norm_.eps);
        norm_.kernels->scale(norm_.residual_out + start, norm_.weight, norm_.call.out + start, norm_.hidden, inverse,
                             norm_.weight_bias);
    }

    // Whole rows; from[r] points to the first of rank r's, and is moved on.
    void rows(uint64_t first, uint64_t number, const void** from, uint32_t sources) {
        for (uint64_t row = first; row < first + number; ++row) {
            piece(row, 0, norm_.hidden, from, sources);
            for (uint32_t r = 0; r < sources; ++r) from[r] = static_cast<const unsigned char*>(from[r]) + row_bytes_;
        }
    }

  private:
    const NormCall& norm_;
    const uint64_t element_;
    const uint64_t row_bytes_;
    alignas(64) float lanes_[kNormLanes];
};

int whole_rows(Comm& comm, const NormCall& norm, uint64_t row_bytes) {
    const Call& call = norm.call;
    const uint64_t fit = comm.slot_bytes / row_bytes;
    Rows rows(norm);
    return pipelined(
        comm, call.descriptor, ceil_div(norm.rows, fit),
        [&](uint64_t i, unsigned char* to) {
            memcpy(to, call.in + i * fit * row_bytes, smaller(norm.rows - i * fit, fit) * row_bytes);
        },
        [&](uint64_t i, uint64_t step) {
            const void* from[COMMPLANE_CAR_MAX_WORLD];
            for (uint32_t rank = 0; rank < comm.world; ++rank) from[rank] = slot(comm, rank, step);
            from[comm.rank] = call.in + i * fit * row_bytes;
            rows.rows(i * fit, smaller(norm.rows - i * fit, fit), from, comm.world);
        });
}

int rows_in_pieces(Comm& comm, const NormCall& norm, uint64_t row_bytes) {
    const Call& call = norm.call;
    const uint64_t block = kNormLanes * call.element_bytes, piece = comm.slot_bytes / block * block;
    const uint64_t pieces = ceil_div(row_bytes, piece);
    Rows rows(norm);
    const auto place = [&](uint64_t i) { return i / pieces * row_bytes + i % pieces * piece; };
    const auto length = [&](uint64_t i) { return smaller(row_bytes - i % pieces * piece, piece); };
    return pipelined(
        comm, call.descriptor, norm.rows * pieces,
        [&](uint64_t i, unsigned char* to) { memcpy(to, call.in + place(i), length(i)); },
        [&](uint64_t i, uint64_t step) {
            const void* from[COMMPLANE_CAR_MAX_WORLD];
            for (uint32_t rank = 0; rank < comm.world; ++rank) from[rank] = slot(comm, rank, step);
            from[comm.rank] = call.in + place(i);
            rows.piece(i / pieces, i % pieces * piece / call.element_bytes, length(i) / call.element_bytes, from, comm.world);
        });
}

int symmetric(Comm& comm, const NormCall& norm) {
    const Call& call = norm.call;
    if (const int status = hop(comm, call.descriptor)) return status;
    const void* from[COMMPLANE_CAR_MAX_WORLD];
    for (uint32_t rank = 0; rank < comm.world; ++rank) from[rank] = peer_input(call, rank, 0);
    Rows(norm).rows(0, norm.rows, from, comm.world);
    return last_hop(comm, call.descriptor);
}

int after_two_shot(Comm& comm, const NormCall& norm) {
    if (const int status = all_reduce_two_shot(comm, norm.call)) return status;
    const void* from = norm.call.out;
    Rows(norm).rows(0, norm.rows, &from, 1);
    return COMMPLANE_CAR_OK;
}

}  // namespace

int all_reduce_rms_norm(Comm& comm, const NormCall& norm) {
    const Call& call = norm.call;
    const uint64_t row_bytes = norm.hidden * call.element_bytes, bytes = norm.rows * row_bytes;
    if (bytes == 0) return hop(comm, call.descriptor);
    // In place, peers would read what is being overwritten; all ranks see it in the descriptor.
    if (call.region != nullptr && call.in != call.out && bytes > kTinyBytes) return symmetric(comm, norm);
    if (comm.world > 2 && bytes >= two_shot_from(comm.world, call.element_bytes, comm.oversubscribed, is_intel())) {
        return after_two_shot(comm, norm);
    }
    if (row_bytes <= comm.slot_bytes) return whole_rows(comm, norm, row_bytes);
    if (comm.slot_bytes >= kNormLanes * call.element_bytes) return rows_in_pieces(comm, norm, row_bytes);
    return fail_here(comm, call.descriptor,
                     fail(COMMPLANE_CAR_EINVAL, "slots of %llu bytes are too small for pieces of a row: chunk_bytes has to be 128",
                          static_cast<unsigned long long>(comm.slot_bytes)));
}

}  // namespace commplane_car
