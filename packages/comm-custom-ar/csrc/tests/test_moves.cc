// SPDX-License-Identifier: Apache-2.0
// all_gather and broadcast bring every byte to its place and no other, and a barrier holds everybody until the last one is there.
#include "solve.h"
#include "tuning.h"

namespace {

constexpr uint64_t kChunk = 1024;
constexpr uint64_t kTiny = commplane_car::kTinyBytes;
constexpr uint64_t kArena = 512 << 10;

std::vector<Problem> problems(uint32_t world) {
    std::vector<Problem> found;
    for (const int dtype : kDtypes) {
        const uint64_t width = element_bytes(dtype), chunk = kChunk / width;
        for (const uint64_t count : {uint64_t{0}, uint64_t{1}, uint64_t{3}, uint64_t{63}, chunk - 1, chunk, chunk + 1, kTiny / width,
                                     kTiny / width + 1, 5 * chunk + 3, 32 * chunk + 1}) {
            found.push_back(gather_problem(dtype, count, world, found.size() * 100));
            for (uint32_t root = 0; root < world; ++root) {
                found.push_back(broadcast_problem(dtype, count, root, world, found.size() * 100));
            }
        }
    }
    return found;
}

void sweep(Rank& self, const std::vector<Problem>& all) {
    Solver solver(self, kArena);
    for (const Problem& problem : all) {
        for (const uint64_t shift : {0, 1, 8}) {
            for (const bool symmetric : {false, true}) {
                for (const bool in_place : {false, true}) {
                    Way way;
                    way.symmetric = symmetric;
                    way.in_place = in_place;
                    way.shift = shift;
                    way.out_shift = shift == 8 ? 5 : shift;
                    if (!solver.solve(problem, way)) return;
                }
            }
        }
    }
}

void barriers(Rank& self, std::atomic<uint32_t>& arrived) {
    for (uint32_t round = 1; round <= 500; ++round) {
        ++arrived;
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        CHECK(arrived >= round * self.world);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
    }
}

}  // namespace

int main() {
    deadline(590);
    for (const uint32_t world : {2u, 3u, 4u, 7u}) {
        const std::vector<Problem> all = problems(world);
        GroupOptions options;
        options.world = world;
        options.chunk = kChunk;
        options.symmetric = kArena;
        std::atomic<uint32_t> arrived{0};
        run_group(options, [&](Rank& self) {
            sweep(self, all);
            barriers(self, arrived);
        });
    }
    return report("moves");
}
