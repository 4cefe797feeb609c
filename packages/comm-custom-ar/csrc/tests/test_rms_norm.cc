// SPDX-License-Identifier: Apache-2.0
// all_reduce_rms_norm gives one and the same bits, whether rows go whole or in pieces, staged, symmetric or after a two-shot
// all-reduce, in place or not, on every rank and instruction set; and they are those of a float64 computation but for rounding.
#include "solve.h"
#include "tuning.h"

namespace {

constexpr uint64_t kArena = 1 << 20;

struct Shape {
    uint64_t rows;
    uint64_t hidden;
};

// Slots hold 1024 bytes: rows that fit many times, just, not quite, and by far not; totals below and above those from which
// symmetric rows are read in place, and three and more ranks take the two-shot path.
std::vector<Shape> shapes(int dtype, uint32_t world) {
    const uint64_t width = element_bytes(dtype), slot = 1024 / width, row = 3 * slot + 1;
    std::vector<Shape> found = {{0, 64}, {3, 0}, {1, 1}, {7, 1}, {5, 31}, {4, 33}, {9, 64}, {3, slot - 1}, {3, slot}, {3, slot + 1},
                                {4, 2 * slot + 32}, {2, 5 * slot + 7}};
    const uint64_t two_shot = commplane_car::two_shot_from(world, width, oversubscribed(world), commplane_car::is_intel());
    if (world > 2) found.push_back({two_shot / (row * width) + 1, row});
    return found;
}

std::vector<Problem> problems(uint32_t world) {
    std::vector<Problem> found;
    for (const int dtype : {kFloat32, kFloat16, kBfloat16}) {
        for (const Shape shape : shapes(dtype, world)) {
            for (const float bias : {0.0f, 1.0f}) {
                found.push_back(norm_problem(dtype, shape.rows, shape.hidden, bias == 0 ? 1e-6f : 1e-5f, bias, world, found.size() * 7));
            }
        }
    }
    return found;
}

void sweep(Rank& self, const std::vector<Problem>& all) {
    Solver solver(self, kArena);
    for (const Problem& problem : all) {
        for (const uint64_t shift : {uint64_t{0}, element_bytes(problem.dtype), uint64_t{1}}) {
            for (int path = 0; path < 8; ++path) {
                Way way;
                way.symmetric = (path & 1) != 0;
                way.in_place = (path & 2) != 0;
                way.residual_in_place = (path & 4) != 0;
                way.shift = shift;
                way.out_shift = shift == 1 ? 7 : 0;
                if (!solver.solve(problem, way)) return;
            }
        }
    }
}

// Long rows as models have them: the mean of many squares, in one piece and in many.
void long_rows() {
    for (const int dtype : {kFloat32, kFloat16, kBfloat16}) {
        const Problem problem = norm_problem(dtype, 2, 8192, 1e-6f, 1.0f, 2, 5);
        for (const uint64_t chunk : {128u, 4096u, 65536u}) {
            GroupOptions options;
            options.chunk = chunk;
            options.staging = 4 * chunk;
            options.symmetric = kArena;
            run_group(options, [&](Rank& self) {
                Solver solver(self, kArena);
                for (const bool symmetric : {false, true}) {
                    Way way;
                    way.symmetric = symmetric;
                    solver.solve(problem, way);
                }
            });
        }
    }
}

// A piece of a row is at least 32 elements: slots of 64 bytes are too small for one of float32. All ranks learn it.
void too_small_slots() {
    GroupOptions options;
    options.chunk = 64;
    run_group(options, [](Rank& self) {
        float in[40] = {}, residual[40] = {}, weight[40] = {}, norm[40], sum[40];
        const int status = commplane_car_all_reduce_rms_norm(self.comm, in, residual, weight, norm, sum, 1, 40, kFloat32, 1e-6f, 0.0f);
        CHECK(status == COMMPLANE_CAR_EINVAL || status == COMMPLANE_CAR_EABORTED);  // the latter if the other rank was first
    });
}

}  // namespace

int main() {
    deadline(590);
    const std::vector<std::string> sets = instruction_sets();
    for (const uint32_t world : {2u, 3u, 4u}) {
        const std::vector<Problem> all = problems(world);
        for (const std::string& isa : sets) {
            CHECK_STATUS(commplane_car_set_isa(isa.c_str()), 0);
            GroupOptions options;
            options.world = world;
            options.symmetric = kArena;
            run_group(options, [&](Rank& self) { sweep(self, all); });
        }
    }
    for (const std::string& isa : sets) {
        CHECK_STATUS(commplane_car_set_isa(isa.c_str()), 0);
        long_rows();
    }
    too_small_slots();
    return report("rms_norm");
}
