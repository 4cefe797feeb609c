// SPDX-License-Identifier: Apache-2.0
// Solves a problem on one rank, and looks at every byte around it: after the call the memory has to be what it was before, with
// the results in their places. So inputs that were written to and outputs that ran over are found as well.
#pragma once

#include "problem.h"

// How a rank makes a call. Every rank has to make it with the same `symmetric`, and, if it is so, `in_place` and `shift`.
struct Way {
    bool symmetric = false;
    bool in_place = false;
    bool residual_in_place = false;
    bool out_in_region = false;  // the output lies in the registered region; the input decides which path runs, not the output
    uint64_t shift = 0;          // bytes off a multiple of 64
    uint64_t out_shift = 0;

    std::string text() const {
        char line[160];
        snprintf(line, sizeof line, "symmetric %d in_place %d residual_in_place %d out_in_region %d shift %llu out_shift %llu",
                 symmetric, in_place, residual_in_place, out_in_region, static_cast<unsigned long long>(shift),
                 static_cast<unsigned long long>(out_shift));
        return line;
    }
};

// A piece of memory from which areas are taken, one after the other, and a picture of what has to be in it.
class Arena {
  public:
    Arena(unsigned char* base, uint64_t bytes) : base_(base), picture_(bytes) {}

    unsigned char* take(uint64_t bytes, uint64_t shift) {
        unsigned char* const area = base_ + used_ + kGuard + shift;
        used_ = (used_ + shift + bytes + 63) / 64 * 64 + 2 * kGuard;
        if (used_ > picture_.size()) {
            fprintf(stderr, "a test's arena of %zu bytes is too small\n", picture_.size());
            abort();
        }
        return area;
    }
    // Forgets all areas; the next ones are taken from the beginning.
    void reset() { used_ = 0; }
    void wipe() {
        memset(base_, kEmpty, used_);
        memset(picture_.data(), kEmpty, used_);
    }
    void write(unsigned char* at, const Bytes& data) {
        if (data.empty()) return;
        memcpy(at, data.data(), data.size());
        expect(at, data);
    }
    void expect(const unsigned char* at, const Bytes& data) {
        if (!data.empty()) memcpy(picture_.data() + (at - base_), data.data(), data.size());
    }
    void scribble() { memset(base_, 0xee, used_); }
    // Where the first byte that is wrong lies; used() if none is.
    uint64_t first_wrong() const {
        if (used_ == 0 || memcmp(base_, picture_.data(), used_) == 0) return used_;
        uint64_t at = 0;
        while (base_[at] == picture_[at]) ++at;
        return at;
    }
    uint64_t used() const { return used_; }
    bool holds(const unsigned char* p) const { return p >= base_ && p < base_ + picture_.size(); }
    uint64_t place(const unsigned char* p) const { return static_cast<uint64_t>(p - base_); }

  private:
    static constexpr uint64_t kGuard = 64;
    static constexpr int kEmpty = 0xa5;
    unsigned char* const base_;
    Bytes picture_;
    uint64_t used_ = 0;
};

class Solver {
  public:
    Solver(Rank& self, uint64_t private_bytes)
        : self_(self), memory_(private_bytes + 64), ordinary_(aligned(memory_.data()), private_bytes),
          region_(self.symmetric, self.symmetric_bytes) {}

    // One call, checked. False, and a line that says what went wrong, if anything did.
    bool solve(const Problem& p, const Way& way) {
        if (make_call(p, way) != 0) return wrong(p, way, commplane_car_last_error());
        return check(p, way);
    }

    // The result of make_call.
    bool check(const Problem& p, const Way& way) {
        for (const Arena* arena : {&ordinary_, &region_}) {
            const uint64_t at = arena->first_wrong();
            if (at == arena->used()) continue;
            char where[120];
            snprintf(where, sizeof where, "byte %llu of the %s arena is wrong; output from byte %llu on",
                     static_cast<unsigned long long>(at), arena == &region_ ? "symmetric" : "ordinary",
                     static_cast<unsigned long long>(arena->holds(out_) ? arena->place(out_) : 0));
            return wrong(p, way, where);
        }
        return true;
    }

    // The same without looking at the result. Returns the call's status.
    int make_call(const Problem& p, const Way& way) {
        if (p.kind == kBarrier) {
            ordinary_.reset();
            region_.reset();
            return commplane_car_barrier(self_.comm);
        }
        lay_out(p, way);
        commplane_car_comm* const comm = self_.comm;
        switch (p.kind) {
            case kAllReduce: return commplane_car_all_reduce(comm, in_, out_, p.count, p.dtype, p.op);
            case kAllGather: return commplane_car_all_gather(comm, in_, out_, p.count, p.dtype);
            case kReduceScatter: return commplane_car_reduce_scatter(comm, in_, out_, p.count, p.dtype, p.op);
            case kBroadcast: return commplane_car_broadcast(comm, in_, p.count, p.dtype, p.root);
            default:
                return commplane_car_all_reduce_rms_norm(comm, in_, residual_, weight_, out_, residual_out_, p.rows, p.hidden, p.dtype,
                                                         p.eps, p.weight_bias);
        }
    }

    // Uses the memory of the last call for something else.
    void scribble() {
        ordinary_.scribble();
        region_.scribble();
    }

  private:
    static unsigned char* aligned(unsigned char* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }

    void lay_out(const Problem& p, const Way& way) {
        ordinary_.reset();
        region_.reset();
        const uint64_t bytes = p.count * element_bytes(p.dtype), mine = self_.rank * bytes;
        Arena& from = way.symmetric ? region_ : ordinary_;
        Arena& to = way.in_place ? from : way.out_in_region ? region_ : ordinary_;
        const Bytes& input = p.inputs[self_.rank];
        const Bytes& output = p.output(self_.rank);
        if (p.kind == kAllGather && way.in_place) {
            // Every rank's input at the same place, wherever the output then begins.
            in_ = from.take((2 * p.world - 1) * bytes, way.shift) + (p.world - 1) * bytes;
            out_ = in_ - mine;
        } else {
            in_ = from.take(input.size(), way.shift);
            const bool inside = way.in_place || p.kind == kBroadcast;
            out_ = !inside ? to.take(output.size(), way.out_shift) : p.kind == kReduceScatter ? in_ + mine : in_;
        }
        if (p.kind == kRmsNorm) {
            residual_ = ordinary_.take(bytes, way.out_shift);
            weight_ = ordinary_.take(p.weight.size(), way.shift);
            residual_out_ = way.residual_in_place ? residual_ : ordinary_.take(bytes, way.shift);
        }
        ordinary_.wipe();
        region_.wipe();
        from.write(in_, input);
        if (p.kind == kRmsNorm) {
            ordinary_.write(residual_, p.residual);
            ordinary_.write(weight_, p.weight);
            ordinary_.expect(residual_out_, p.residual_out);
        }
        (p.kind == kBroadcast ? from : to).expect(out_, output);
    }

    // Aborts, so that no other rank waits for one that ends its test here.
    bool wrong(const Problem& p, const Way& way, const char* what) {
        if (++failures < 20) {
            fprintf(stderr, "rank %u isa %s %s %s: %s\n", self_.rank, commplane_car_isa(), p.text().c_str(), way.text().c_str(), what);
        }
        commplane_car_abort(self_.comm);
        return false;
    }

    Rank& self_;
    Bytes memory_;
    Arena ordinary_;
    Arena region_;
    unsigned char* in_ = nullptr;
    unsigned char* out_ = nullptr;
    unsigned char* residual_ = nullptr;
    unsigned char* weight_ = nullptr;
    unsigned char* residual_out_ = nullptr;
};
