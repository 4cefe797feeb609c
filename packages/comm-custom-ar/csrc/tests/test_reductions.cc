// SPDX-License-Identifier: Apache-2.0
// all_reduce and reduce_scatter: every dtype, op, size class, alignment, path and instruction set against the oracle, bit for bit.
// That all ranks, paths and instruction sets agree follows: they are all compared with the same bytes.
#include "solve.h"
#include "tuning.h"

namespace {

constexpr uint64_t kChunk = 1024;
constexpr uint64_t kTiny = commplane_car::kTinyBytes;
constexpr uint64_t kArena = 512 << 10;

std::vector<uint64_t> counts(int kind, int dtype, uint32_t world) {
    const uint64_t width = element_bytes(dtype), chunk = kChunk / width;
    if (kind == kReduceScatter) {
        const uint64_t piece = kChunk / world / 64 * 64 / width;  // of a slot
        return {0, 1, 3, piece - 1, piece, piece + 1, kTiny / world / width + 1, 5 * piece + 3};
    }
    std::vector<uint64_t> found = {0, 1, 3, 17, 63, chunk - 1, chunk, chunk + 1, 2 * chunk, kTiny / width + 1, 5 * chunk + 3};
    // One element too few for two-shot, and a last chunk of which only the first ranks have a slice.
    const uint64_t two_shot = commplane_car::two_shot_from(world, width, oversubscribed(world), commplane_car::is_intel());
    if (two_shot != UINT64_MAX) found.insert(found.end(), {two_shot / width - 1, (two_shot + 72) / width});
    return found;
}

std::vector<Problem> problems(uint32_t world) {
    std::vector<Problem> found;
    for (const int kind : {kAllReduce, kReduceScatter}) {
        for (const int dtype : kDtypes) {
            for (int op = COMMPLANE_CAR_SUM; op <= COMMPLANE_CAR_AVG; ++op) {
                if (is_integer(dtype) && op == COMMPLANE_CAR_AVG) continue;
                for (const uint64_t count : counts(kind, dtype, world)) {
                    found.push_back(reduction_problem(kind, dtype, op, count, world, count * 64 + found.size()));
                }
            }
        }
    }
    return found;
}

// Nobody may still be reading a rank's input, nor write into it, once its call has returned: no barrier between the calls.
void sweep(Rank& self, const std::vector<Problem>& all) {
    Solver solver(self, kArena);
    for (const Problem& problem : all) {
        const uint64_t shifts[] = {0, element_bytes(problem.dtype), 1};
        for (const uint64_t shift : shifts) {
            for (const bool symmetric : {false, true}) {
                for (const bool in_place : {false, true}) {
                    Way way;
                    way.symmetric = symmetric;
                    way.in_place = in_place;
                    way.shift = shift;
                    way.out_shift = shift == 1 ? 3 : shift;
                    if (!solver.solve(problem, way)) return;
                }
            }
        }
    }
}

void every_instruction_set(uint32_t world, const std::vector<std::string>& sets) {
    const std::vector<Problem> all = problems(world);
    for (const std::string& isa : sets) {
        CHECK_STATUS(commplane_car_set_isa(isa.c_str()), 0);
        CHECK(isa == commplane_car_isa());
        GroupOptions options;
        options.world = world;
        options.chunk = kChunk;
        options.symmetric = kArena;
        run_group(options, [&](Rank& self) { sweep(self, all); });
    }
}

// The application may have set flush-to-zero or another rounding mode on some ranks: results stay the same, and so do they.
void rounding_modes() {
#if defined(__x86_64__)
    run_group({}, [](Rank& self) {
        const unsigned before = __builtin_ia32_stmxcsr();
        const unsigned odd = before | 0x8040u | (self.rank % 2 == 0 ? 0x6000u : 0u);
        float in[40], out[40];
        for (int i = 0; i < 40; ++i) in[i] = float_of(static_cast<uint32_t>(i));  // denormals
        __builtin_ia32_ldmxcsr(odd);
        const int status = commplane_car_all_reduce(self.comm, in, out, 40, kFloat32, COMMPLANE_CAR_SUM);
        const unsigned after = __builtin_ia32_stmxcsr();
        __builtin_ia32_ldmxcsr(before);
        CHECK_STATUS(status, 0);
        CHECK((after & 0xe040u) == (odd & 0xe040u));
        for (uint32_t i = 0; i < 40; ++i) CHECK(bits_of(out[i]) == i * self.world);
    });
#endif
}

// What the application finds out from set_isa: names that the CPU lacks or nobody knows leave the table as it was.
void unknown_instruction_sets() {
    const std::string before = commplane_car_isa();
    CHECK_STATUS(commplane_car_set_isa("abacus"), COMMPLANE_CAR_EUNSUPPORTED);
    CHECK_STATUS(commplane_car_set_isa(nullptr), COMMPLANE_CAR_EUNSUPPORTED);
    CHECK_STATUS(commplane_car_set_isa(""), COMMPLANE_CAR_EUNSUPPORTED);
    CHECK(before == commplane_car_isa());
}

}  // namespace

int main() {
    deadline(590);
    const std::vector<std::string> sets = instruction_sets();
    for (const uint32_t world : {2u, 3u, 4u}) every_instruction_set(world, sets);
    every_instruction_set(7, {sets.back()});
    for (const std::string& isa : sets) {
        CHECK_STATUS(commplane_car_set_isa(isa.c_str()), 0);
        rounding_modes();
    }
    unknown_instruction_sets();
    return report("reductions");
}
