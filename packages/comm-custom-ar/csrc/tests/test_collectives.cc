// SPDX-License-Identifier: Apache-2.0
// Every dtype, op, size class, alignment, path and instruction set against the oracle, bit for bit. That all ranks, paths
// and instruction sets agree bitwise follows: they are all compared with the same bytes.
#include "harness.h"
#include "oracle.h"

namespace {

constexpr uint64_t kChunk = 1024;
constexpr size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0xa5;

struct Case {
    int dtype;
    int op;
    size_t count;
    size_t shift;  // bytes off alignment
    bool symmetric;
    bool in_place;
};

void run_case(Rank& self, const Case& c, const std::vector<unsigned char>& input, const std::vector<unsigned char>& wanted,
              std::vector<unsigned char>& private_in, std::vector<unsigned char>& private_out) {
    const size_t bytes = c.count * element_bytes(c.dtype);
    unsigned char* in_area = c.symmetric ? self.symmetric : private_in.data();
    unsigned char* out_area = c.in_place ? in_area : private_out.data();
    // Nobody may still be reading this rank's input, nor write into it, once its call has returned: no barrier here.
    memset(in_area, kGuardByte, bytes + 2 * kGuard);
    memset(out_area, kGuardByte, bytes + 2 * kGuard);
    unsigned char* in = in_area + kGuard / 2 + c.shift;
    unsigned char* out = out_area + kGuard / 2 + c.shift;
    if (bytes != 0) memcpy(in, input.data(), bytes);
    CHECK_STATUS(commplane_car_all_reduce(self.comm, in, out, c.count, c.dtype, c.op), 0);
    bool good = bytes == 0 || memcmp(out, wanted.data(), bytes) == 0;
    if (!c.in_place && bytes != 0) good = good && memcmp(in, input.data(), bytes) == 0;
    for (const unsigned char* p = out_area; p < out; ++p) good = good && *p == kGuardByte;
    for (const unsigned char* p = out + bytes; p < out_area + bytes + 2 * kGuard; ++p) good = good && *p == kGuardByte;
    if (!good && ++failures < 20) {
        fprintf(stderr, "world %u rank %u isa %s dtype %d op %d count %zu shift %zu symmetric %d in_place %d\n", self.world,
                self.rank, commplane_car_isa(), c.dtype, c.op, c.count, c.shift, c.symmetric, c.in_place);
    }
}

void sweep(Rank& self) {
    std::vector<unsigned char> private_in(64 << 10), private_out(64 << 10);
    for (int dtype = 1; dtype <= 3; ++dtype) {
        const size_t chunk = kChunk / element_bytes(dtype);
        for (const size_t count : {size_t{0}, size_t{1}, size_t{3}, size_t{17}, size_t{63}, chunk - 1, chunk, chunk + 1,
                                   2 * chunk, 3 * chunk + 5, 9 * chunk + 1}) {
            std::vector<std::vector<unsigned char>> inputs;
            for (uint32_t r = 0; r < self.world; ++r) inputs.push_back(random_input(count * 64 + r, count, dtype));
            for (int op = 1; op <= 4; ++op) {
                const std::vector<unsigned char> wanted = expected(inputs, count, dtype, op);
                for (const size_t shift : {size_t{0}, element_bytes(dtype), size_t{1}}) {
                    for (int path = 0; path < 4; ++path) {
                        const Case c = {dtype, op, count, shift, (path & 1) != 0, (path & 2) != 0};
                        run_case(self, c, inputs[self.rank], wanted, private_in, private_out);
                    }
                }
            }
        }
    }
}

// The application may have set flush-to-zero or another rounding mode on some ranks: results stay the same, and so do they.
void rounding_modes(Rank& self) {
#if defined(__x86_64__)
    const unsigned before = __builtin_ia32_stmxcsr();
    const unsigned odd = before | 0x8040u | (self.rank % 2 == 0 ? 0x6000u : 0u);
    float in[40], out[40];
    for (int i = 0; i < 40; ++i) in[i] = float_of(static_cast<uint32_t>(i));  // denormals
    __builtin_ia32_ldmxcsr(odd);
    const int status = commplane_car_all_reduce(self.comm, in, out, 40, COMMPLANE_CAR_FLOAT32, COMMPLANE_CAR_SUM);
    const unsigned after = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before);
    CHECK_STATUS(status, 0);
    CHECK((after & 0xe040u) == (odd & 0xe040u));
    for (uint32_t i = 0; i < 40; ++i) CHECK(bits_of(out[i]) == i * self.world);
#else
    (void)self;
#endif
}

// Not only like the reference in float32, but close to the true sum.
void against_double(Rank& self) {
    constexpr size_t kCount = 3000;
    std::vector<double> exact(kCount, 0.0), sizes(kCount, 0.0);
    std::vector<float> mine(kCount);
    for (uint32_t r = 0; r < self.world; ++r) {
        Random random{1000 + r};
        for (size_t i = 0; i < kCount; ++i) {
            const float value = static_cast<float>(static_cast<int64_t>(random.next() >> 20)) * 0x1p-40f - 8.0f;
            exact[i] += value;
            sizes[i] += fabs(value);
            if (r == self.rank) mine[i] = value;
        }
    }
    CHECK_STATUS(commplane_car_all_reduce(self.comm, mine.data(), mine.data(), kCount, COMMPLANE_CAR_FLOAT32, COMMPLANE_CAR_SUM), 0);
    for (size_t i = 0; i < kCount; ++i) CHECK(fabs(mine[i] - exact[i]) <= sizes[i] * self.world * 0x1p-24);
}

}  // namespace

int main() {
    for (const std::string& isa : instruction_sets()) {
        CHECK_STATUS(commplane_car_set_isa(isa.c_str()), 0);
        CHECK(isa == commplane_car_isa());
        for (const uint32_t world : {2u, 3u, 4u}) {
            GroupOptions options;
            options.world = world;
            options.chunk = kChunk;
            options.symmetric = 64 << 10;
            run_group(options, [](Rank& self) {
                sweep(self);
                rounding_modes(self);
                against_double(self);
            });
        }
    }
    return report("collectives");
}
