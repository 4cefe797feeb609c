// SPDX-License-Identifier: Apache-2.0
// Ranks of a communicator on CUDA whose kernels run on threads of the host: its memory as comm.cc sets it up, and launches.
#pragma once

#include <stdlib.h>

#include <functional>
#include <memory>
#include <thread>

#include "../cuda/host_machine.h"
#include "harness.h"

// Threads of a kernel: `data` in a block that move data and, behind them, those of `control` that talk about the call.
struct Grid {
    uint32_t blocks = 1;
    uint32_t data = 4;
    uint32_t control = 0;
};

struct GpuOptions {
    uint32_t ranks = 2;
    uint32_t blocks = 2;
    uint32_t lamport_vecs = 12;
    uint32_t tile_vecs = 6;
    uint64_t timeout_ns = UINT64_C(60000000000);
    uint32_t delays = 0;  // see HostThread
    uint32_t seed = 1;
    bool plain_tiles = false;  // see HostMemory
};

constexpr uint32_t kFine = car::gpu::kCauses;  // no cause at all

class GpuGroup {
  public:
    explicit GpuGroup(const GpuOptions& options) : options_(options) {
        using car::gpu::BlockState;
        using car::gpu::Control;
        using car::gpu::Vec;
        const uint32_t ranks = options.ranks;
        car::gpu::Layout layout = {};
        layout.ranks = ranks;
        layout.blocks = options.blocks;
        layout.lamport_vecs = options.lamport_vecs;
        layout.tile_vecs = options.tile_vecs;
        const auto place = [&](uint64_t bytes) {
            const uint64_t here = layout.total;
            layout.total += (bytes + 127) / 128 * 128;
            return here;
        };
        layout.flags = place(options.blocks * 128);
        layout.mailbox = place(uint64_t(options.blocks) * 2 * ranks * sizeof(Vec));
        layout.lamport = place(uint64_t(options.blocks) * 2 * (ranks - 1) * options.lamport_vecs * sizeof(Vec));
        layout.tiles = place(uint64_t(options.blocks) * car::gpu::kRing * ranks * options.tile_vecs * sizeof(Vec));
        const uint64_t states = ranks * options.blocks * sizeof(BlockState), head = 4096 + (states + 127) / 128 * 128;
        arena_.reset(static_cast<unsigned char*>(aligned_alloc(4096, (head + ranks * layout.total + 4095) / 4096 * 4096)));
        memset(arena_.get(), 0, head);
        unsigned char* const base = arena_.get() + head;
        memset(base, 0xff, ranks * layout.total);
        static_assert(sizeof(Control) <= 4096, "a page");
        memory_ = {arena_.get(), base, layout.total, layout.tiles, ranks, options.plain_tiles};
        for (uint32_t r = 0; r < ranks; ++r) {
            memset(base + r * layout.total + layout.flags, 0, options.blocks * 128);
            car::gpu::Group group = {};
            for (uint32_t peer = 0; peer < ranks; ++peer) group.memory[peer] = base + peer * layout.total;
            group.state = reinterpret_cast<BlockState*>(arena_.get() + 4096) + r * options.blocks;
            group.control = reinterpret_cast<Control*>(arena_.get());
            group.layout = layout;
            group.rank = r;
            group.ranks = ranks;
            group.timeout_ns = options.timeout_ns;
            groups_.push_back(group);
        }
    }

    const GpuOptions& options() const { return options_; }
    const car::gpu::Group& group(uint32_t rank) const { return groups_[rank]; }
    car::gpu::Control& control() { return *groups_[0].control; }

    // A kernel of a rank: what a thread of it does, told which launch this is.
    typedef std::function<void(const car::gpu::HostBlock&, const car::gpu::Group&)> Kernel;
    struct Launch {
        Grid grid;
        uint32_t words[car::gpu::kCallWords];
        Kernel kernel;
    };

    // Runs the launches of each rank in order, as on a stream, all ranks at once, and waits for the end.
    void run(const std::vector<std::vector<Launch>>& streams) {
        std::vector<std::thread> threads;
        for (uint32_t r = 0; r < streams.size(); ++r) start(threads, r, streams[r]);
        for (std::thread& thread : threads) thread.join();
    }

    // Several streams: which rank each is of is in `ranks`.
    void run(const std::vector<uint32_t>& ranks, const std::vector<std::vector<Launch>>& streams) {
        std::vector<std::thread> threads;
        for (size_t i = 0; i < streams.size(); ++i) start(threads, ranks[i], streams[i]);
        for (std::thread& thread : threads) thread.join();
    }

    bool met(uint32_t rank, uint32_t cause) { return __atomic_load_n(&control().rank[rank].causes[cause], __ATOMIC_ACQUIRE) != 0; }
    // Why a rank gave up, the most telling cause of those that it met, or kFine.
    uint32_t status(uint32_t rank) {
        for (uint32_t cause : {car::gpu::kOtherCall, car::gpu::kTwoAtOnce, car::gpu::kTimedOut, car::gpu::kStopped}) {
            if (met(rank, cause)) return cause;
        }
        return kFine;
    }
    void abort(uint32_t rank) {
        __atomic_store_n(&control().rank[rank].gave_up, 1u, __ATOMIC_RELEASE);
        __atomic_store_n(&control().stop, 1u, __ATOMIC_RELEASE);
    }

    // After calls without a fault: what was sent was taken, all ranks stand at the same place, and no kernel is inside.
    void check_at_rest() {
        CHECK(control().stop == 0);
        for (uint32_t r = 0; r < options_.ranks; ++r) {
            CHECK(status(r) == kFine);
            const unsigned char* const own = groups_[r].memory[r];
            for (uint64_t i = groups_[r].layout.mailbox; i < groups_[r].layout.tiles; ++i) {
                if (own[i] != 0xff) {
                    CHECK(!"something is left in a slot");
                    break;
                }
            }
            for (uint32_t b = 0; b < options_.blocks; ++b) {
                const car::gpu::BlockState &mine = groups_[r].state[b], &first = groups_[0].state[b];
                CHECK(mine.busy == 0);
                CHECK(mine.calls == first.calls && mine.tiles == first.tiles);
            }
        }
    }

  private:
    // The threads of one rank: as many as its largest launch has, and all of them meet between two launches.
    struct Stream {
        std::vector<Launch> launches;
        car::gpu::Group group;
        uint32_t threads = 0;
        car::gpu::HostMeeting meeting;
        std::vector<std::unique_ptr<car::gpu::HostShared>> blocks;

        void prepare(size_t next) {
            if (next == launches.size()) return;
            const Grid& grid = launches[next].grid;
            blocks.clear();
            for (uint32_t b = 0; b < grid.blocks; ++b) blocks.emplace_back(new car::gpu::HostShared(grid.data));
            memcpy(group.call, launches[next].words, sizeof group.call);
        }
        void work(uint32_t index) {
            for (size_t i = 0; i < launches.size(); ++i) {
                const Grid& grid = launches[i].grid;
                const uint32_t size = grid.data + grid.control, block = index / size;
                if (block < grid.blocks) {
                    launches[i].kernel({*blocks[block], grid.control, grid.data, index % size, block, grid.blocks}, group);
                }
                meeting.meet(threads, [&] { prepare(i + 1); });
            }
        }
    };

    void start(std::vector<std::thread>& threads, uint32_t rank, const std::vector<Launch>& launches) {
        const auto stream = std::make_shared<Stream>();
        stream->launches = launches;
        stream->group = groups_[rank];
        for (const Launch& launch : launches) {
            const uint32_t wanted = launch.grid.blocks * (launch.grid.data + launch.grid.control);
            if (wanted > stream->threads) stream->threads = wanted;
        }
        stream->prepare(0);
        for (uint32_t i = 0; i < stream->threads; ++i) {
            const uint32_t random = (options_.seed * 8191 + rank) * 8191 + i + ++started_ * 65537;
            threads.emplace_back([this, stream, i, random] {
                car::gpu::host_thread().memory = memory_;
                car::gpu::host_thread().delays = options_.delays;
                car::gpu::host_thread().random = random;
                stream->work(i);
            });
        }
    }

    struct Free {
        void operator()(unsigned char* p) const { free(p); }
    };
    GpuOptions options_;
    std::unique_ptr<unsigned char, Free> arena_;
    car::gpu::HostMemory memory_;
    std::vector<car::gpu::Group> groups_;
    uint32_t started_ = 0;
};
