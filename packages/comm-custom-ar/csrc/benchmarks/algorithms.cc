// SPDX-License-Identifier: Apache-2.0
// Which all-reduce is fastest for which size, chunk and number of ranks on this machine: what tuning.h is made from.
//
//     algorithms [--ranks 2] [--rounds 9] [--isa auto] [--sizes 64,1024,...] [--chunks 16384,65536,...] [--dtype float32|bfloat16]
//
// Forked processes as ranks, one a core as far as there are cores. All candidates take turns in every round; the first round is
// not counted. Prints microseconds a call: the median over rounds of the slowest rank's mean.
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "collective.h"
#include "commplane_car.h"
#include "norm.h"
#include "wait.h"

namespace car = commplane_car;

namespace {

using Algorithm = int (*)(car::Comm&, const car::Call&);

struct Candidate {
    const char* name;
    Algorithm run;
    bool symmetric;
};

constexpr Candidate kCandidates[] = {
    {"one_shot", car::all_reduce_one_shot, false},
    {"two_shot", car::all_reduce_two_shot, false},
    {"single_copy", car::all_reduce_single_copy, false},
    {"symmetric", car::all_reduce_symmetric, true},
};

struct Options {
    uint32_t ranks = 2;
    uint32_t rounds = 9;
    std::string isa = "auto";
    int dtype = COMMPLANE_CAR_FLOAT32;
    std::vector<uint64_t> sizes = {64, 1024, 8192, 65536, 262144, 1 << 20, 4 << 20, 16 << 20};
    std::vector<uint64_t> chunks = {65536};
};

void require(int status, const char* what) {
    if (status == 0) return;
    fprintf(stderr, "%s: %s: %s\n", what, commplane_car_status_name(status), commplane_car_last_error());
    _exit(1);
}

std::vector<uint64_t> numbers(const char* text) {
    std::vector<uint64_t> out;
    for (const char* p = text; *p != '\0';) {
        char* end = nullptr;
        out.push_back(strtoull(p, &end, 10));
        p = *end == ',' ? end + 1 : end;
    }
    return out;
}

std::vector<int> cores() {
    cpu_set_t set;
    sched_getaffinity(0, sizeof set, &set);
    std::vector<int> out;
    for (int core = 0; core < CPU_SETSIZE; ++core) {
        if (CPU_ISSET(core, &set)) out.push_back(core);
    }
    return out;
}

struct Job {
    Options options;
    std::string name;
    uint64_t largest;
    double* times;  // [rank][candidate][chunk][size][round], shared
};

double& slot_of(const Job& job, uint32_t rank, size_t candidate, size_t chunk, size_t size, uint32_t round) {
    const Options& o = job.options;
    const size_t index = (((rank * 4 + candidate) * o.chunks.size() + chunk) * o.sizes.size() + size) * o.rounds + round;
    return job.times[index];
}

void run_rank(const Job& job, uint32_t rank) {
    const Options& o = job.options;
    const std::vector<int> have = cores();
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(have[rank % have.size()], &one);
    sched_setaffinity(0, sizeof one, &one);
    require(commplane_car_set_isa(o.isa.c_str()), "isa");

    std::vector<commplane_car_comm*> comms;
    for (size_t c = 0; c < o.chunks.size(); ++c) {
        commplane_car_options options = {};
        options.size = sizeof options;
        options.rank = rank;
        options.world_size = o.ranks;
        options.oversubscribed = o.ranks > have.size();
        options.staging_bytes = o.chunks[c] * 4;
        options.chunk_bytes = o.chunks[c];
        options.timeout_ns = UINT64_C(60000000000);
        commplane_car_layout_info info = {};
        info.size = sizeof info;
        require(commplane_car_layout(&options, &info), "layout");
        commplane_car_segment* segment = nullptr;
        const std::string name = job.name + std::to_string(c);
        require(commplane_car_segment_map(name.c_str(), info.total_bytes, info.part_offset, info.part_bytes, &segment), "map");
        commplane_car_comm* comm = nullptr;
        require(commplane_car_comm_open(&options, segment, &comm), "open");
        require(commplane_car_barrier(comm), "barrier");
        comms.push_back(comm);
    }
    commplane_car_segment* symmetric = nullptr;
    const uint64_t stride = job.largest;
    require(commplane_car_segment_map((job.name + "s").c_str(), stride * o.ranks, rank * stride, stride, &symmetric), "map");
    auto* const base = static_cast<unsigned char*>(commplane_car_segment_base(symmetric));
    bool single_copy = true;
    for (commplane_car_comm* comm : comms) {
        require(commplane_car_register_symmetric(comm, base, stride, stride, 1), "register");
        single_copy = single_copy && commplane_car_single_copy_probe(comm) == 0;
        require(commplane_car_single_copy_enable(comm, 0, UINT64_MAX >> 1), "single copy");
    }
    auto* const plain = static_cast<unsigned char*>(aligned_alloc(4096, (job.largest + 4095) / 4096 * 4096));
    memset(plain, 0, job.largest);
    memset(base + rank * stride, 0, stride);

    for (uint32_t round = 0; round <= o.rounds; ++round) {
        for (size_t size = 0; size < o.sizes.size(); ++size) {
            for (size_t candidate = 0; candidate < 4; ++candidate) {
                if (kCandidates[candidate].run == car::all_reduce_single_copy && !single_copy) continue;
                for (size_t chunk = 0; chunk < o.chunks.size(); ++chunk) {
                    car::Comm& comm = *comms[chunk];
                    car::Call call = {};
                    commplane_car_call about = {};
                    about.kind = COMMPLANE_CAR_KIND_ALL_REDUCE;
                    about.dtype = static_cast<uint32_t>(o.dtype);
                    about.op = COMMPLANE_CAR_SUM;
                    call.element_bytes = car::element_bytes(about.dtype);
                    call.count = about.count = o.sizes[size] / call.element_bytes;
                    call.in = kCandidates[candidate].symmetric ? base + rank * stride : plain;
                    call.out = const_cast<unsigned char*>(call.in);
                    call.region = kCandidates[candidate].symmetric ? &comm.regions[0] : nullptr;
                    call.reduce = car::reduce_table().reduce[o.dtype - 1][COMMPLANE_CAR_SUM - 1];
                    call.descriptor = car::describe(about);
                    const uint64_t calls = std::clamp<uint64_t>((UINT64_C(8) << 20) / o.sizes[size], 3, 1000);
                    require(commplane_car_barrier(&comm), "barrier");
                    const uint64_t begin = car::now_ns();
                    for (uint64_t i = 0; i < calls; ++i) require(kCandidates[candidate].run(comm, call), kCandidates[candidate].name);
                    const double each = static_cast<double>(car::now_ns() - begin) / static_cast<double>(calls) / 1000;
                    if (round > 0) slot_of(job, rank, candidate, chunk, size, round - 1) = each;
                }
            }
        }
    }
    for (commplane_car_comm* comm : comms) require(commplane_car_barrier(comm), "barrier");
}

double median(const Job& job, size_t candidate, size_t chunk, size_t size) {
    std::vector<double> slowest;
    for (uint32_t round = 0; round < job.options.rounds; ++round) {
        double most = 0;
        for (uint32_t rank = 0; rank < job.options.ranks; ++rank) most = std::max(most, slot_of(job, rank, candidate, chunk, size, round));
        slowest.push_back(most);
    }
    std::sort(slowest.begin(), slowest.end());
    return slowest[slowest.size() / 2];
}

}  // namespace

int main(int count, char** arguments) {
    Job job;
    Options& o = job.options;
    for (int i = 1; i + 1 < count; i += 2) {
        const std::string key = arguments[i];
        const char* value = arguments[i + 1];
        if (key == "--ranks") o.ranks = static_cast<uint32_t>(atoi(value));
        else if (key == "--rounds") o.rounds = static_cast<uint32_t>(atoi(value));
        else if (key == "--isa") o.isa = value;
        else if (key == "--sizes") o.sizes = numbers(value);
        else if (key == "--chunks") o.chunks = numbers(value);
        else if (key == "--dtype") o.dtype = strcmp(value, "bfloat16") == 0 ? COMMPLANE_CAR_BFLOAT16 : COMMPLANE_CAR_FLOAT32;
        else return fprintf(stderr, "unknown option %s\n", key.c_str()), 2;
    }
    job.largest = (*std::max_element(o.sizes.begin(), o.sizes.end()) + 4095) / 4096 * 4096;
    job.name = "commplane-car-bench-" + std::to_string(getpid()) + "-";
    const size_t bytes = sizeof(double) * o.ranks * 4 * o.chunks.size() * o.sizes.size() * o.rounds;
    job.times = static_cast<double*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    for (size_t c = 0; c < o.chunks.size(); ++c) {
        commplane_car_options options = {};
        options.size = sizeof options;
        options.world_size = o.ranks;
        options.staging_bytes = o.chunks[c] * 4;
        commplane_car_layout_info info = {};
        info.size = sizeof info;
        require(commplane_car_layout(&options, &info), "layout");
        require(commplane_car_segment_create((job.name + std::to_string(c)).c_str(), info.total_bytes), "create");
    }
    require(commplane_car_segment_create((job.name + "s").c_str(), job.largest * o.ranks), "create");
    for (uint32_t rank = 0; rank < o.ranks; ++rank) {
        if (fork() == 0) {
            run_rank(job, rank);
            _exit(0);
        }
    }
    int failed = 0, status = 0;
    while (wait(&status) > 0) failed |= status;
    for (size_t c = 0; c < o.chunks.size(); ++c) commplane_car_segment_unlink((job.name + std::to_string(c)).c_str());
    commplane_car_segment_unlink((job.name + "s").c_str());
    if (failed != 0) return 1;
    printf("%u ranks on %zu cores, %s, %s: us a call\n%-12s %8s", o.ranks, cores().size(),
           o.dtype == COMMPLANE_CAR_FLOAT32 ? "float32" : "bfloat16", o.isa.c_str(), "", "chunk");
    for (const uint64_t size : o.sizes) printf(" %9llu", static_cast<unsigned long long>(size));
    printf("\n");
    for (size_t candidate = 0; candidate < 4; ++candidate) {
        for (size_t chunk = 0; chunk < o.chunks.size(); ++chunk) {
            printf("%-12s %8llu", kCandidates[candidate].name, static_cast<unsigned long long>(o.chunks[chunk]));
            for (size_t size = 0; size < o.sizes.size(); ++size) printf(" %9.2f", median(job, candidate, chunk, size));
            printf("\n");
        }
    }
    return 0;
}
