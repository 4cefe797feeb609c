// SPDX-License-Identifier: Apache-2.0
// Long random sequences of calls, with ranks that dawdle at random: what the ring of slots and flags has to survive.
#include <string.h>

#include "harness.h"
#include "oracle.h"

namespace {

constexpr uint64_t kRegion = 64 << 10;

// Rank r contributes f(call, i) + r: integers small enough to be exact, so the sum is known.
uint32_t base_value(uint64_t call, size_t i) { return static_cast<uint32_t>((call * 31 + i * 7) % 1000); }

void sequence(Rank& self, int calls) {
    Random common{4711};
    Random own{self.rank + 1};
    std::vector<float> in(kRegion / 4), out(kRegion / 4);
    const uint32_t ranks = self.world * (self.world - 1) / 2;
    for (int call = 0; call < calls; ++call) {
        const uint64_t r = common.next();
        const uint64_t dawdle = own.next();
        if (dawdle % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(dawdle >> 8 & 255));
        if (r % 7 == 0) {
            CHECK_STATUS(commplane_car_barrier(self.comm), 0);
            continue;
        }
        const size_t limit = (r >> 8) % 3 == 0 ? 16 : (r >> 8) % 3 == 1 ? 600 : kRegion / 4 - 64;
        const size_t count = (r >> 16) % limit;
        const bool symmetric = (r >> 40) % 2 != 0;
        const bool in_place = (r >> 41) % 2 != 0;
        const size_t shift = (r >> 42) % 16;
        float* from = (symmetric ? reinterpret_cast<float*>(self.symmetric) : in.data()) + shift;
        float* to = in_place ? from : out.data() + shift;
        for (size_t i = 0; i < count; ++i) from[i] = static_cast<float>(base_value(static_cast<uint64_t>(call), i) + self.rank);
        CHECK_STATUS(commplane_car_all_reduce(self.comm, from, to, count, COMMPLANE_CAR_FLOAT32, COMMPLANE_CAR_SUM), 0);
        bool good = true;
        for (size_t i = 0; i < count; ++i) {
            good = good && to[i] == static_cast<float>(base_value(static_cast<uint64_t>(call), i) * self.world + ranks);
        }
        CHECK(good);
        if (failures != 0) return;
    }
}

// A barrier holds everybody until the last one is there.
void barriers(Rank& self, std::atomic<uint32_t>& arrived) {
    for (uint32_t round = 1; round <= 200; ++round) {
        ++arrived;
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        CHECK(arrived >= round * self.world);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
    }
}

}  // namespace

int main() {
    const char* given = getenv("CAR_TEST_CALLS");
    const int calls = given == nullptr ? 6000 : atoi(given);
    for (const uint32_t world : {2u, 3u, 4u, 7u}) {
        for (const uint64_t chunk : {64u, 1024u, 16384u}) {
            GroupOptions options;
            options.world = world;
            options.chunk = chunk;
            options.staging = 4 * chunk;
            options.symmetric = kRegion;
            std::atomic<uint32_t> arrived{0};
            run_group(options, [&](Rank& self) {
                sequence(self, chunk == 64 ? calls / 10 : calls);
                barriers(self, arrived);
            });
        }
    }
    return report("sequences");
}
