// SPDX-License-Identifier: Apache-2.0
// The kernels for CUDA, run on threads of the host: every algorithm, edge of size, alignment and special number, alone and in long
// sequences where calls of all kinds meet what those before them left. `test_gpu_kernels [SEQUENCES [FIRST SEED]]` runs more of them.
#include "gpu_calls.h"

namespace {

constexpr uint32_t kDelays = 24;  // of 1024 accesses

GpuOptions options_of(uint32_t ranks) {
    GpuOptions out;
    out.ranks = ranks;
    out.delays = kDelays;
    out.plain_tiles = true;
    if (ranks > 6) out.lamport_vecs = 16;  // a block has as many threads as ranks, at least
    return out;
}

// Elements of a vector, of the slots or a tile, of the ring: one less, all, one more. Where parts differ in length, too.
std::vector<uint64_t> edges(const GpuOptions& options, Kind kind, uint64_t per_vec) {
    const bool pushes = kind == Kind::one_shot_push || kind == Kind::two_shot_push;
    const uint64_t tile = options.tile_vecs, slots = options.lamport_vecs * options.blocks;
    const uint64_t unit = kind == Kind::one_shot_push ? slots : kind == Kind::two_shot_push ? slots / 2 * options.ranks : tile;
    std::vector<uint64_t> out = {1, per_vec - 1, per_vec, per_vec + 1, unit * per_vec - 1, unit * per_vec, unit * per_vec + 1};
    if (kind == Kind::two_shot_push) {
        for (uint32_t vecs = 2; vecs <= 2 * options.ranks + 1; ++vecs) out.push_back(vecs * per_vec - 1);
        out.push_back((3 * unit - options.ranks) * per_vec + 1);
    }
    if (!pushes) {
        out.push_back(tile * 2 * options.blocks * per_vec + 3);
        out.push_back(tile * (2 * car::gpu::kRing + 1) * options.blocks * per_vec - 2);  // twice round the ring
    }
    return out;
}

void sums(uint32_t ranks) {
    const GpuOptions options = options_of(ranks);
    for (const Kind kind : kSums) {
        std::vector<Plan> plans;
        uint32_t number = 0;
        for (const bool wide : {true, false}) {
            for (const uint64_t count : edges(options, kind, wide ? 4 : 8)) {
                for (const Fill fill : {Fill::integers, Fill::special}) {
                    Plan plan;
                    plan.kind = kind;
                    plan.count = count;
                    plan.wide = wide;
                    plan.fill = fill;
                    plan.seed = ++number;
                    plan.in_place = number % 2 != 0;
                    plan.shift = number % 3 == 0 ? 1 : 0;
                    plan.out_shift = number % 5 == 0 ? 3 : 0;
                    plans.push_back(plan);
                }
            }
            Plan zeros;
            zeros.kind = kind;
            zeros.count = 37;
            zeros.wide = wide;
            zeros.fill = Fill::negative_zeros;
            plans.push_back(zeros);
            zeros.fill = Fill::any_bits;
            plans.push_back(zeros);
        }
        run_calls(options, plans, "sums");
    }
}

void moves(uint32_t ranks) {
    const GpuOptions options = options_of(ranks);
    for (const Kind kind : kMoves) {
        std::vector<Plan> plans;
        uint32_t number = 0;
        for (const uint64_t count : edges(options, kind, 16)) {
            for (const uint64_t shift : {0, 1, 4}) {
                Plan plan;
                plan.kind = kind;
                plan.count = count;
                plan.shift = shift;
                plan.out_shift = shift == 4 ? 2 : 0;
                plan.root = ++number % ranks;
                plan.seed = number;
                plans.push_back(plan);
            }
        }
        run_calls(options, plans, "moves");
    }
}

void norms(uint32_t ranks) {
    GpuOptions options = options_of(ranks);
    options.lamport_vecs = 36;
    std::vector<Plan> plans;
    uint32_t number = 0;
    for (const bool wide : {true, false}) {
        for (const uint64_t row_vecs : {1, 3, 4, 5, 12}) {
            for (const uint64_t rows : {1, 2, 5}) {
                Plan plan;
                plan.kind = Kind::rms_norm;
                plan.wide = wide;
                plan.rows = rows;
                plan.hidden = row_vecs * (wide ? 4 : 8);
                plan.in_place = ++number % 2 != 0;
                plan.seed = number;
                plans.push_back(plan);
            }
        }
    }
    run_calls(options, plans, "norms");
}

// add_rms_norm alone, which is local: any alignment, and the sum where the norm goes. The oracle is the fused kernel's.
void norm_of_a_sum() {
    for (const uint64_t hidden : {1, 4, 7, 33}) {
        for (const uint64_t shift : {0, 4}) {
            const uint64_t rows = 5, bytes = rows * hidden * 4;
            Buffer sum(bytes, shift), residual(bytes, shift), weight(hidden * 4, shift), residual_out(bytes, shift);
            std::mt19937 random(uint32_t(hidden + shift));
            std::vector<float> sums(rows * hidden), residuals(rows * hidden), weights(hidden);
            for (auto* const all : {&sums, &residuals, &weights}) {
                for (float& one : *all) one = float(int(random() % 2001) - 1000) / 64.0f;
            }
            memcpy(sum.data(), sums.data(), bytes);
            memcpy(residual.data(), residuals.data(), bytes);
            memcpy(weight.data(), weights.data(), hidden * 4);
            const car::gpu::Norm norm = {residual.data(), weight.data(), sum.data(), residual_out.data(), rows, uint32_t(hidden), 1e-5f, 0.5f};
            GpuOptions options;
            GpuGroup group(options);
            const bool aligned = shift == 0 && hidden % 4 == 0;
            void* const total = sum.data();
            group.run({0}, {{{Grid{3, 4, 0}, {1, 1, 1}, [=](const car::gpu::HostBlock& b, const car::gpu::Group&) {
                                  car::gpu::add_rms_norm<car::gpu::Float32>(b, total, norm, aligned);
                              }}}});
            CHECK(sum.guarded() && residual.guarded() && weight.guarded() && residual_out.guarded());
            for (uint64_t row = 0; row < rows; ++row) {
                double squares = 0;
                for (uint64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
                    const float v = sums[i] + residuals[i];
                    CHECK(memcmp(residual_out.data() + 4 * i, &v, 4) == 0);
                    squares += double(v) * double(v);
                }
                for (uint64_t i = 0; i < hidden; ++i) {
                    const uint64_t here = row * hidden + i;
                    float got;
                    memcpy(&got, sum.data() + 4 * here, 4);
                    const double wanted = double(sums[here] + residuals[here]) / sqrt(squares / double(hidden) + 1e-5) * (0.5 + double(weights[i]));
                    CHECK(fabs(got - wanted) <= 1e-6 * fabs(wanted) + 1e-30);
                }
            }
        }
    }
}

Plan drawn(std::mt19937& random, const GpuOptions& options) {
    static const Kind kinds[] = {Kind::one_shot_push, Kind::one_shot_push, Kind::two_shot_push,  Kind::one_shot_pull, Kind::two_shot_pull,
                                 Kind::all_gather,    Kind::broadcast,     Kind::reduce_scatter, Kind::barrier,       Kind::rms_norm};
    static const Fill fills[] = {Fill::integers, Fill::special, Fill::any_bits};
    Plan plan;
    plan.kind = kinds[random() % 10];
    plan.wide = random() % 2 != 0;
    plan.count = random() % 3 == 0 ? 1 + random() % 16 : 1 + random() % 300;
    if (plan.kind == Kind::all_gather || plan.kind == Kind::broadcast) plan.count *= 4;
    plan.in_place = random() % 2 != 0;
    plan.shift = random() % 4 == 0 ? 1 + random() % 3 : 0;
    plan.out_shift = random() % 4 == 0 ? 1 + random() % 3 : 0;
    plan.fill = fills[random() % 3];
    plan.root = random() % options.ranks;
    plan.data = random() % 2 != 0 ? 4 : 6;
    plan.blocks = 1 + random() % options.blocks;
    plan.seed = random();
    if (plan.kind == Kind::rms_norm) {
        plan.rows = 1 + random() % 3;
        plan.hidden = (1 + random() % 4) * (plan.wide ? 4 : 8);
    }
    return plan;
}

void sequence(uint32_t seed) {
    std::mt19937 random(seed);
    GpuOptions options = options_of(2 + random() % 3);
    options.lamport_vecs = 12 + random() % 3 * 6;
    options.tile_vecs = 2 + 2 * (random() % 3);
    options.blocks = 1 + random() % 3;
    options.delays = random() % 3 == 0 ? 0 : random() % 2 == 0 ? 16 : 120;
    options.seed = seed;
    std::vector<Plan> plans;
    for (int i = 0; i < 40; ++i) plans.push_back(drawn(random, options));
    const int before = failures;
    run_calls(options, plans, "a sequence");
    if (failures != before) fprintf(stderr, "sequence of seed %u\n", seed);
}

}  // namespace

int main(int argc, char** argv) {
    const int sequences = argc > 1 ? atoi(argv[1]) : 100, first = argc > 2 ? atoi(argv[2]) : 1;
    deadline(argc > 1 ? 3600 : 590);
    for (const uint32_t ranks : {2u, 3u, 4u, 5u}) {
        sums(ranks);
        moves(ranks);
        norms(ranks);
    }
    moves(8);
    norm_of_a_sum();
    for (int i = 0; i < sequences; ++i) sequence(uint32_t(first + i));
    return report("gpu_kernels");
}
