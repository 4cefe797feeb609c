// SPDX-License-Identifier: Apache-2.0
// Single copy between processes: the same bits as through the slots, for the sizes that it was enabled for and no others. Where the
// kernel does not let the ranks read each other's memory (ptrace is forbidden in many containers), the probe has to say so, and
// only that is tested.
#include "detail.h"
#include "processes.h"
#include "solve.h"

namespace {

constexpr int kSum = COMMPLANE_CAR_SUM;
constexpr uint64_t kArena = 1 << 20;
constexpr uint64_t kPiece = 65536;  // of a slice, read at a time
constexpr uint32_t kHops = 3;       // of a single-copy call; a staged one of these sizes and slots takes another number
constexpr uint64_t kChunk = 4096;

bool works = true;

std::vector<Problem> problems(uint32_t world) {
    std::vector<Problem> found;
    for (const int dtype : kDtypes) {
        const uint64_t width = element_bytes(dtype);
        // Slices are whole cache lines, so the last ranks' are empty or short; then slices of one piece, of less and of more.
        for (const uint64_t bytes : {width, 64 * world - width, 64 * world + width, kPiece * world - 64, kPiece * world + width,
                                     2 * kPiece * world + 128}) {
            const int op = bytes == width || is_integer(dtype) ? kSum + static_cast<int>(found.size() % 3) : 1 + static_cast<int>(found.size() % 4);
            found.push_back(reduction_problem(kAllReduce, dtype, op, bytes / width, world, found.size() * 10));
        }
    }
    return found;
}

uint32_t hops_of_last_call(const Rank& self) {
    commplane_car_flight_record record = {};
    uint64_t count = 0;
    CHECK_STATUS(commplane_car_flight(self.comm, &record, sizeof record, 1, &count), 0);
    CHECK(count == 1);
    return record.steps;
}

// Every rank asks before any goes on: the answer has to be the same on all of them.
bool probe(Rank& self, Board& board) {
    const int status = commplane_car_single_copy_probe(self.comm);
    CHECK(status == 0 || status == COMMPLANE_CAR_ESYS);
    if (status != 0) ++board.refused;
    CHECK_STATUS(commplane_car_barrier(self.comm), 0);
    return board.refused == 0;
}

void sweep(Rank& self, Board& board, const std::vector<Problem>& all) {
    if (!probe(self, board)) return;
    Solver solver(self, kArena);
    for (const Problem& problem : all) {
        for (const bool in_place : {false, true}) {
            for (const bool enabled : {true, false}) {
                CHECK_STATUS(commplane_car_single_copy_enable(self.comm, enabled ? 1 : 0, enabled ? UINT64_MAX : 0), 0);
                Way way;
                way.in_place = in_place;
                way.shift = 3 + 8 * self.rank;  // elsewhere in every process
                way.out_shift = 16 * self.rank;
                if (!solver.solve(problem, way)) return;
                CHECK(hops_of_last_call(self) != kHops || enabled);
                CHECK(hops_of_last_call(self) == kHops || !enabled);
            }
        }
    }
}

// From `min_bytes` up to `max_bytes`, both included, staged all-reduces only.
void range(Rank& self, Board& board) {
    if (!probe(self, board)) return;
    unsigned char data[300] = {}, out[900] = {};
    CHECK_STATUS(commplane_car_single_copy_enable(self.comm, 100, 200), 0);
    const struct {
        uint64_t bytes;
        uint32_t hops;
    } wanted[] = {{0, 1}, {99, 1}, {100, kHops}, {200, kHops}, {201, 1}};
    for (const auto& one : wanted) {
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, one.bytes, COMMPLANE_CAR_INT8, kSum), 0);
        CHECK(hops_of_last_call(self) == one.hops);
    }
    CHECK_STATUS(commplane_car_all_reduce(self.comm, self.symmetric, out, 150, COMMPLANE_CAR_INT8, kSum), 0);
    CHECK(hops_of_last_call(self) == 1);
    CHECK_STATUS(commplane_car_all_gather(self.comm, data, out, 150, COMMPLANE_CAR_INT8), 0);
    CHECK(hops_of_last_call(self) == 1);
    CHECK_STATUS(commplane_car_single_copy_enable(self.comm, 0, UINT64_MAX), 0);
    CHECK_STATUS(commplane_car_all_reduce(self.comm, nullptr, nullptr, 0, COMMPLANE_CAR_INT8, kSum), 0);
    CHECK_STATUS(commplane_car_single_copy_enable(self.comm, 0, 0), 0);
    CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, 150, COMMPLANE_CAR_INT8, kSum), 0);
    CHECK(hops_of_last_call(self) == 1);
}

// The probe never answers yes for a peer that is not there.
void no_peer() {
    GroupOptions options;
    Processes processes(options, [](Rank& self, Board& board) {
        if (self.rank == 1) {
            board.idle[1] = true;
            for (;;) short_nap();
        }
        wait_until([&] { return board.told.load(); });
        CHECK_STATUS(commplane_car_single_copy_probe(self.comm), COMMPLANE_CAR_ESYS);
    });
    wait_until([&] { return processes.board().idle[1].load(); });
    processes.murder(2, true);
    processes.board().told = true;
}

void not_opened_yet() {
    const std::string name = fresh_name();
    commplane_car_options options = {};
    options.size = sizeof options;
    options.world_size = 2;
    options.staging_bytes = 4096;
    options.timeout_ns = 1000000000;
    commplane_car_layout_info info = {};
    info.size = sizeof info;
    CHECK_STATUS(commplane_car_layout(&options, &info), 0);
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), info.total_bytes), 0);
    commplane_car_segment* segment = nullptr;
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 0, 0, &segment), 0);
    CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
    commplane_car_comm* comm = nullptr;
    CHECK_STATUS(commplane_car_comm_open(&options, segment, &comm), 0);
    const int status = commplane_car_single_copy_probe(comm);
    CHECK_STATUS(status, COMMPLANE_CAR_ESYS);
    CHECK_STATUS(commplane_car_comm_close(comm), 0);
    CHECK_STATUS(commplane_car_segment_unmap(segment), 0);
}

void in_processes(uint32_t world, const Processes::Body& body) {
    GroupOptions options;
    options.world = world;
    options.chunk = kChunk;
    options.staging = 4 * kChunk;
    options.symmetric = kArena;
    Processes processes(options, body);
    wait_until([&] { return processes.ended() == world; });
    if (processes.board().refused != 0) works = false;
}

}  // namespace

int main() {
    deadline(300);
    for (const uint32_t world : {2u, 3u}) {
        const std::vector<Problem> all = problems(world);
        in_processes(world, [&](Rank& self, Board& board) { sweep(self, board, all); });
    }
    in_processes(2, range);
    no_peer();
    not_opened_yet();
    CHECK(names_left() == 0);
    if (!works) printf("the ranks may not read each other's memory here: only the probe was tested\n");
    return report("single_copy");
}
