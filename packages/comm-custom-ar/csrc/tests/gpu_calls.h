// SPDX-License-Identifier: Apache-2.0
// Calls of the kernels on CUDA with buffers of their own, and whether they gave what they have to give. `host` is bfloat16 and
// float32; sums and norms are compared with a plain computation in rank order. NaNs are one to these checks: a GPU gives one and
// the same for every sum that is none, an x86 that of its operand.
#pragma once

#include <math.h>

#include <random>

#include "../cuda/all_reduce_pull.h"
#include "../cuda/moves.h"
#include "../cuda/one_shot_push.h"
#include "../cuda/rms_norm.h"
#include "../cuda/two_shot_push.h"
#include "gpu_group.h"

// numbers.h has it for CUDA alone. Two elements in a word, so a word may be half a NaN.
struct HostBFloat16 {
    static constexpr int kPerVec = 8;
    typedef uint16_t Raw;
    static float wide(uint16_t bits) {
        const uint32_t word = uint32_t(bits) << 16;
        float out;
        memcpy(&out, &word, 4);
        return out;
    }
    static uint16_t rounded(float value) {
        uint32_t word;
        memcpy(&word, &value, 4);
        if (value != value) return 0x7fff;
        return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
    }
    static void widen(const car::gpu::Vec& v, float* out) {
        for (int i = 0; i < 8; ++i) out[i] = wide(uint16_t(v.w[i / 2] >> (i % 2 * 16)));
    }
    static car::gpu::Vec narrow(const float* in) {
        car::gpu::Vec v = {{0, 0, 0, 0}};
        for (int i = 0; i < 8; ++i) v.w[i / 2] |= uint32_t(rounded(in[i])) << (i % 2 * 16);
        return v;
    }
};

// Elements behind a gap of bytes that nobody may touch.
class Buffer {
  public:
    Buffer(uint64_t bytes, uint64_t shift) : bytes_(bytes), shift_(shift) {
        memory_.assign(kGap + shift + bytes + kGap + 16, kGuard);
        offset_ = kGap + shift + (16 - reinterpret_cast<uint64_t>(memory_.data()) % 16) % 16;
    }
    unsigned char* data() { return memory_.data() + offset_; }
    const unsigned char* data() const { return memory_.data() + offset_; }
    uint64_t bytes() const { return bytes_; }
    bool aligned() const { return shift_ % 16 == 0; }
    bool guarded() const {
        for (uint64_t i = 0; i < memory_.size(); ++i) {
            if ((i < offset_ || i >= offset_ + bytes_) && memory_[i] != kGuard) return false;
        }
        return true;
    }

  private:
    static constexpr unsigned char kGuard = 0xa5;
    static constexpr uint64_t kGap = 64;
    uint64_t bytes_, shift_, offset_;
    std::vector<unsigned char> memory_;
};

enum class Kind { one_shot_push, two_shot_push, one_shot_pull, two_shot_pull, reduce_scatter, all_gather, broadcast, barrier, rms_norm };
constexpr Kind kSums[] = {Kind::one_shot_push, Kind::two_shot_push, Kind::one_shot_pull, Kind::two_shot_pull, Kind::reduce_scatter};
constexpr Kind kMoves[] = {Kind::all_gather, Kind::broadcast};

enum class Fill { integers, negative_zeros, special, any_bits };

struct Plan {
    Kind kind = Kind::barrier;
    uint64_t count = 0;  // elements, or bytes of a move; of a rank's output of a reduce-scatter
    bool wide = true;    // float32, or bfloat16
    bool in_place = false;
    uint64_t shift = 0;      // elements (bytes of a move) that the input begins behind 16 bytes
    uint64_t out_shift = 0;  // the same of the output
    Fill fill = Fill::integers;
    uint32_t root = 0;
    uint64_t rows = 0, hidden = 0;  // of a norm
    uint32_t data = 4;              // threads of a block
    uint32_t blocks = 2;            // at most
    uint32_t seed = 1;
};

inline uint32_t vecs_of(uint64_t bytes) { return uint32_t((bytes + 15) / 16); }

// One call on all ranks: what its kernels are launched with, and what has to come out.
class GpuCall {
  public:
    GpuCall(const GpuOptions& options, const Plan& plan) : options_(options), plan_(plan), ranks_(options.ranks) {
        const uint64_t n = ranks_, width = element();
        const bool moves = plan.kind == Kind::all_gather || plan.kind == Kind::broadcast;
        if (plan.kind == Kind::rms_norm) {
            plan_.count = plan.rows * plan.hidden;
            plan_.fill = Fill::integers;  // a row with anything that is no number has no norm to compare
        }
        const uint64_t own = plan_.count * width;
        const uint64_t in_bytes = plan.kind == Kind::reduce_scatter ? own * n : own;
        const uint64_t out_bytes = plan.kind == Kind::all_gather ? own * n : own;
        in_place_ = plan.kind == Kind::two_shot_pull || plan.kind == Kind::broadcast ||
                    (plan.in_place && (plan.kind == Kind::one_shot_push || plan.kind == Kind::two_shot_push || plan.kind == Kind::rms_norm));
        const bool pulls = plan.kind == Kind::one_shot_pull || plan.kind == Kind::two_shot_pull;
        const uint64_t shift = pulls || plan.kind == Kind::rms_norm ? 0 : plan.shift * width;
        const uint64_t out_shift = in_place_ ? shift : pulls || plan.kind == Kind::rms_norm ? 0 : plan.out_shift * width;
        std::mt19937 random(plan.seed);
        for (uint32_t r = 0; r < n; ++r) {
            in_.emplace_back(in_bytes, shift);
            fill(in_.back(), random, moves);
            given_.emplace_back(in_.back().data(), in_.back().data() + in_bytes);
            if (!in_place_) out_.emplace_back(out_bytes, out_shift);
        }
        if (plan.kind == Kind::rms_norm) {
            for (uint32_t r = 0; r < n; ++r) residual_out_.emplace_back(own, 0);
            residual_.emplace_back(own, 0);
            residual_.emplace_back(plan.hidden * width, 0);  // the weight
            for (Buffer& one : residual_) fill(one, random, false);
        }
    }

    // The launches of one rank: one, or one a piece where a message is more than the slots take.
    void launches(uint32_t rank, std::vector<GpuGroup::Launch>& stream) {
        using car::gpu::Group;
        using car::gpu::HostBlock;
        const Plan& p = plan_;
        const void* const in = in_[rank].data();
        unsigned char* const out = result(rank).data();
        const bool aligned = in_[rank].aligned() && result(rank).aligned();
        const uint64_t count = p.count, vecs = vecs_of(count * element());
        Grid grid;
        grid.data = p.data < ranks_ ? ranks_ : p.data;
        const auto add = [&](uint64_t items, GpuGroup::Kernel kernel) {
            const uint64_t most = p.blocks < options_.blocks ? p.blocks : options_.blocks;
            grid.blocks = uint32_t(items < most ? (items > 0 ? items : 1) : most);
            GpuGroup::Launch launch = {grid, {uint32_t(p.kind) << 27 | p.root << 19 | p.wide << 15, uint32_t(p.count), p.seed & 0x7fffffff}, std::move(kernel)};
            stream.push_back(std::move(launch));
        };
        switch (p.kind) {
            case Kind::one_shot_push:
            case Kind::two_shot_push: {
                grid.control = ranks_ + 1;  // one to talk with each rank, and one that keeps the state
                const bool twice = p.kind == Kind::two_shot_push;
                const uint64_t most = p.blocks < options_.blocks ? p.blocks : options_.blocks, parts = twice ? ranks_ : 1;
                const uint64_t slots = options_.lamport_vecs / (twice ? 2 : 1), round = grid.data * parts;
                const uint64_t wanted = (vecs + round - 1) / round, blocks = wanted < most ? (wanted > 0 ? wanted : 1) : most;
                const uint64_t piece = blocks * (slots / grid.data * grid.data) * parts * (16 / element());
                for (uint64_t at = 0; at < count; at += piece) {
                    const uint64_t some = count - at < piece ? count - at : piece;
                    const void* const from = static_cast<const unsigned char*>(in) + at * element();
                    void* const to = out + at * element();
                    add(blocks, [=](const HostBlock& b, const Group& g) {
                        by([&](auto t, auto n) {
                            if (twice) car::gpu::two_shot_push<decltype(t), n.value>(b, g, from, to, some, aligned);
                            else car::gpu::one_shot_push<decltype(t), n.value>(b, g, from, to, some, aligned);
                        });
                    });
                }
                return;
            }
            case Kind::one_shot_pull:
                return add((vecs + grid.data - 1) / grid.data, [=](const HostBlock& b, const Group& g) {
                    void* row[car::gpu::kMaxRanks];
                    for (uint32_t r = 0; r < ranks_; ++r) row[r] = in_[r].data();
                    by([&](auto t, auto n) { car::gpu::one_shot_pull<decltype(t), n.value, 2>(b, g, row, out, count); });
                });
            case Kind::two_shot_pull:
                return add((vecs / ranks_ + grid.data) / grid.data, [=](const HostBlock& b, const Group& g) {
                    void* row[car::gpu::kMaxRanks];
                    for (uint32_t r = 0; r < ranks_; ++r) row[r] = in_[r].data();
                    by([&](auto t, auto n) { car::gpu::two_shot_pull<decltype(t), n.value, 2>(b, g, row, count); });
                });
            case Kind::reduce_scatter:
                return add((vecs + options_.tile_vecs - 1) / options_.tile_vecs, [=](const HostBlock& b, const Group& g) {
                    by([&](auto t, auto n) { car::gpu::reduce_scatter<decltype(t), n.value>(b, g, in, out, count, aligned); });
                });
            case Kind::all_gather:
                return add((vecs + options_.tile_vecs - 1) / options_.tile_vecs,
                           [=](const HostBlock& b, const Group& g) { car::gpu::all_gather(b, g, in, out, count, aligned); });
            case Kind::broadcast: {
                const uint32_t root = p.root;
                return add((vecs + options_.tile_vecs - 1) / options_.tile_vecs,
                           [=](const HostBlock& b, const Group& g) { car::gpu::broadcast(b, g, out, count, aligned, root); });
            }
            case Kind::barrier: return add(1, [](const HostBlock& b, const Group& g) { car::gpu::barrier(b, g); });
            case Kind::rms_norm: {
                grid.control = ranks_ + 1;  // one to talk with each rank, and one that keeps the state
                const car::gpu::Norm norm = {residual_[0].data(), residual_[1].data(), out, residual_out_[rank].data(),
                                             p.rows, uint32_t(p.hidden), kEps, kBias};
                const bool few = p.hidden * element() <= uint64_t(grid.data) * 16;
                return add(p.rows, [=](const HostBlock& b, const Group& g) {
                    by([&](auto t, auto n) {
                        if (few) car::gpu::all_reduce_rms_norm<decltype(t), n.value, 1>(b, g, in, norm);
                        else car::gpu::all_reduce_rms_norm<decltype(t), n.value, 4>(b, g, in, norm);
                    });
                });
            }
        }
    }

    // Looks at all ranks' results. `what` is printed with the first thing that is wrong.
    void check(const char* what) {
        const int before = failures;
        for (uint32_t r = 0; r < ranks_; ++r) {
            CHECK(in_[r].guarded());
            CHECK(result(r).guarded());
            if (!in_place_) CHECK(memcmp(in_[r].data(), given_[r].data(), given_[r].size()) == 0);
        }
        switch (plan_.kind) {
            case Kind::all_gather: {
                for (uint32_t r = 0; r < ranks_; ++r) {
                    for (uint32_t s = 0; s < ranks_; ++s) {
                        CHECK(memcmp(result(r).data() + s * given_[s].size(), given_[s].data(), given_[s].size()) == 0);
                    }
                }
                break;
            }
            case Kind::broadcast:
                for (uint32_t r = 0; r < ranks_; ++r) CHECK(memcmp(result(r).data(), given_[plan_.root].data(), given_[r].size()) == 0);
                break;
            case Kind::barrier: break;
            case Kind::rms_norm: check_norm(); break;
            default:
                for (uint32_t r = 0; r < ranks_; ++r) {
                    const uint64_t first = plan_.kind == Kind::reduce_scatter ? r * plan_.count : 0;
                    for (uint64_t i = 0; i < plan_.count; ++i) CHECK(same(result(r).data(), i, total(first + i)));
                }
        }
        if (failures != before) {
            fprintf(stderr, "  in %s: kind %d, %llu elements, %u ranks, %s, in place %d, shifts %llu and %llu, fill %d, seed %u\n", what,
                    int(plan_.kind), static_cast<unsigned long long>(plan_.count), ranks_, plan_.wide ? "float32" : "bfloat16", in_place_,
                    static_cast<unsigned long long>(plan_.shift), static_cast<unsigned long long>(plan_.out_shift), int(plan_.fill), plan_.seed);
        }
    }

    Buffer& result(uint32_t rank) { return in_place_ ? in_[rank] : out_[rank]; }
    const Plan& plan() const { return plan_; }

  private:
    static constexpr float kEps = 1e-5f, kBias = 1.0f;

    bool moves() const { return plan_.kind == Kind::all_gather || plan_.kind == Kind::broadcast; }
    uint64_t element() const { return moves() ? 1 : plan_.wide ? 4 : 2; }

    template <class F>
    void by(F f) const {
        const auto with = [&](auto t) {
            if (ranks_ <= 2) f(t, std::integral_constant<int, 2>());
            else if (ranks_ <= 4) f(t, std::integral_constant<int, 4>());
            else f(t, std::integral_constant<int, 8>());
        };
        if (plan_.wide) with(car::gpu::Float32());
        else with(HostBFloat16());
    }

    void fill(Buffer& buffer, std::mt19937& random, bool raw) const {
        static const uint32_t special[] = {0x80000000u, 0x00000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffffffffu, 0xfffffffeu,
                                           0x00000001u, 0x3f800000u, 0x7f7fffffu, 0xffff3f80u, 0x3f80ffffu, 0xffff0000u, 0x0000ffffu};
        const auto bits = [&]() -> uint32_t {
            switch (plan_.fill) {
                case Fill::integers: {
                    const float value = float(int(random() % 17) - 8);
                    uint32_t word;
                    memcpy(&word, &value, 4);
                    return word;
                }
                case Fill::negative_zeros: return 0x80000000u;
                case Fill::special: return special[random() % (sizeof special / sizeof special[0])];
                default: return random() % 4 == 0 ? 0xffffffffu : uint32_t(random());
            }
        };
        for (uint64_t i = 0; i + (raw ? 1 : element()) <= buffer.bytes(); i += raw ? 1 : element()) {
            const uint32_t word = bits();
            if (raw) buffer.data()[i] = random() % 2 ? 0xff : uint8_t(random());
            else if (plan_.wide) memcpy(buffer.data() + i, &word, 4);
            else memcpy(buffer.data() + i, reinterpret_cast<const char*>(&word) + (plan_.fill == Fill::special ? random() % 2 * 2 : 2), 2);
        }
    }

    float at(const unsigned char* from, uint64_t i) const {
        if (!plan_.wide) {
            uint16_t bits;
            memcpy(&bits, from + 2 * i, 2);
            return HostBFloat16::wide(bits);
        }
        float value;
        memcpy(&value, from + 4 * i, 4);
        return value;
    }

    float total(uint64_t i) const {
        float value = at(given_[0].data(), i);
        for (uint32_t r = 1; r < ranks_; ++r) value += at(given_[r].data(), i);
        return plan_.wide ? value : HostBFloat16::wide(HostBFloat16::rounded(value));
    }

    bool same(const unsigned char* got, uint64_t i, float wanted) const {
        const float value = at(got, i);
        return (value != value && wanted != wanted) || memcmp(&value, &wanted, 4) == 0;
    }

    void check_norm() {
        const uint64_t hidden = plan_.hidden;
        for (uint32_t r = 0; r < ranks_; ++r) {
            CHECK(residual_out_[r].guarded());
            CHECK(memcmp(result(r).data(), result(0).data(), result(0).bytes()) == 0);  // bitwise equal, whatever the order of squares is
            for (uint64_t row = 0; row < plan_.rows; ++row) {
                double squares = 0;
                for (uint64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
                    float v = total(i) + at(residual_[0].data(), i);
                    if (!plan_.wide) v = HostBFloat16::wide(HostBFloat16::rounded(v));
                    CHECK(same(residual_out_[r].data(), i, v));
                    squares += double(v) * double(v);
                }
                const double inverse = 1 / sqrt(squares / double(hidden) + double(kEps));
                for (uint64_t i = 0; i < hidden; ++i) {
                    const double v = at(residual_out_[r].data(), row * hidden + i);
                    const double wanted = v * inverse * (double(kBias) + at(residual_[1].data(), i));
                    CHECK(fabs(at(result(r).data(), row * hidden + i) - wanted) <= (plan_.wide ? 1e-6 : 5e-3) * fabs(wanted) + 1e-30);
                }
            }
        }
    }

    GpuOptions options_;
    Plan plan_;
    uint32_t ranks_;
    bool in_place_ = false;
    std::vector<Buffer> in_, out_, residual_, residual_out_;
    std::vector<std::vector<unsigned char>> given_;
};

// Makes calls one after the other on one communicator, and looks at all that came out.
inline void run_calls(const GpuOptions& options, const std::vector<Plan>& plans, const char* what) {
    GpuGroup group(options);
    std::vector<GpuCall> calls;
    for (const Plan& plan : plans) calls.emplace_back(options, plan);
    std::vector<std::vector<GpuGroup::Launch>> streams(options.ranks);
    for (GpuCall& call : calls) {
        for (uint32_t r = 0; r < options.ranks; ++r) call.launches(r, streams[r]);
    }
    group.run(streams);
    group.check_at_rest();
    for (GpuCall& call : calls) call.check(what);
}
