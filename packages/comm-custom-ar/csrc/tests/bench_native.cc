// SPDX-License-Identifier: Apache-2.0
// What a small call costs, and how much of that is the comparison of calls between ranks and the flight recorder: the same
// library compiled with and without them. Not a test. The target `run_bench_native` builds all and runs
//
//     bench_native [--ranks 2] [--rounds 3000] NAME=LIBRARY.so ...
//
// Forked processes are the ranks, one a core. In each short round every library has its turn, beginning with another one each
// time, so that what disturbs the machine hits all alike. A figure is the mean of a turn's calls on rank 0, in ns; the median
// over rounds is given, with the lower quartile. A difference is the median over rounds of "first library - this one", both in
// the same round.
//
// 2 ranks on 2 cores of an AMD EPYC (Zen 5), nothing else running: barrier 86 ns, all_reduce of 64 bytes 137 ns; of that the
// comparison is 1.5 and 2.6 ns, and the flight recorder is lost in the noise of 2 ns, for it is written while peers are awaited.
// With the cores shared with other work: barrier 261, all_reduce 354; comparison 8 and 0, recorder 15 and 50.
#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "commplane_car.h"

namespace {

constexpr int kCalls = 300;   // of a turn: some tens of microseconds, mostly undisturbed
constexpr uint64_t kCount = 16;  // float32: 64 bytes

struct Library {
    std::string name;
    std::string path;
    decltype(&commplane_car_segment_map) map = nullptr;
    decltype(&commplane_car_layout) layout = nullptr;
    decltype(&commplane_car_comm_open) open = nullptr;
    decltype(&commplane_car_barrier) barrier = nullptr;
    decltype(&commplane_car_all_reduce) all_reduce = nullptr;
    decltype(&commplane_car_segment_create) create = nullptr;
    decltype(&commplane_car_segment_unlink) unlink = nullptr;
    commplane_car_comm* comm = nullptr;
};

[[noreturn]] void give_up(const char* what, const char* why) {
    fprintf(stderr, "%s: %s\n", what, why);
    _exit(1);
}

void require(int status, const char* what) {
    if (status != 0) give_up(what, std::to_string(status).c_str());
}

template <class Function>
void find(void* handle, const char* name, Function* out) {
    void* const symbol = dlsym(handle, name);
    if (symbol == nullptr) give_up(name, dlerror());
    *out = reinterpret_cast<Function>(symbol);
}

void load(Library& library) {
    void* const handle = dlopen(library.path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) give_up("cannot load", dlerror());
    find(handle, "commplane_car_segment_map", &library.map);
    find(handle, "commplane_car_layout", &library.layout);
    find(handle, "commplane_car_comm_open", &library.open);
    find(handle, "commplane_car_barrier", &library.barrier);
    find(handle, "commplane_car_all_reduce", &library.all_reduce);
    find(handle, "commplane_car_segment_create", &library.create);
    find(handle, "commplane_car_segment_unlink", &library.unlink);
}

double now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) * 1e9 + static_cast<double>(t.tv_nsec);
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
    std::vector<Library> libraries;
    uint32_t ranks = 2;
    int rounds = 3000;
    std::string name;
    double* times = nullptr;  // [round][operation][library] of rank 0, shared

    double& time(int round, size_t operation, size_t library) const {
        return times[(static_cast<size_t>(round) * 2 + operation) * libraries.size() + library];
    }
    std::string segment(size_t library) const { return name + std::to_string(library); }
};

commplane_car_options options_of(const Job& job, uint32_t rank) {
    commplane_car_options options = {};
    options.size = sizeof options;
    options.rank = rank;
    options.world_size = job.ranks;
    options.oversubscribed = job.ranks > cores().size();
    options.staging_bytes = 4 * COMMPLANE_CAR_DEFAULT_CHUNK;
    options.timeout_ns = UINT64_C(60000000000);
    return options;
}

commplane_car_layout_info layout_of(const Library& library, const commplane_car_options& options) {
    commplane_car_layout_info info = {};
    info.size = sizeof info;
    require(library.layout(&options, &info), "layout");
    return info;
}

double turn(const Library& library, size_t operation) {
    alignas(64) static float data[kCount];
    require(library.barrier(library.comm), "barrier");
    const double begin = now_ns();
    for (int call = 0; call < kCalls; ++call) {
        if (operation == 0) {
            require(library.barrier(library.comm), "barrier");
        } else {
            require(library.all_reduce(library.comm, data, data, kCount, COMMPLANE_CAR_FLOAT32, COMMPLANE_CAR_SUM), "all_reduce");
        }
    }
    return (now_ns() - begin) / kCalls;
}

void run_rank(Job& job, uint32_t rank) {
    const std::vector<int> have = cores();
    const commplane_car_options options = options_of(job, rank);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(have[rank % have.size()], &one);
    sched_setaffinity(0, sizeof one, &one);
    for (size_t i = 0; i < job.libraries.size(); ++i) {
        Library& library = job.libraries[i];
        const commplane_car_layout_info info = layout_of(library, options);
        commplane_car_segment* segment = nullptr;
        require(library.map(job.segment(i).c_str(), info.total_bytes, info.part_offset, info.part_bytes, &segment), "map");
        require(library.open(&options, segment, &library.comm), "open");
    }
    for (int round = -10; round < job.rounds; ++round) {
        for (size_t operation = 0; operation < 2; ++operation) {
            for (size_t i = 0; i < job.libraries.size(); ++i) {
                const size_t which = (i + static_cast<size_t>(round + 10)) % job.libraries.size();
                const double each = turn(job.libraries[which], operation);
                if (rank == 0 && round >= 0) job.time(round, operation, which) = each;
            }
        }
    }
}

double quantile(std::vector<double> values, double part) {
    std::sort(values.begin(), values.end());
    return values[static_cast<size_t>(part * static_cast<double>(values.size() - 1))];
}

void print(const Job& job) {
    printf("%u ranks on %zu cores, %d rounds of %d calls, ns a call on rank 0\n", job.ranks, cores().size(), job.rounds, kCalls);
    for (size_t operation = 0; operation < 2; ++operation) {
        const char* const name = operation == 0 ? "barrier" : "all_reduce 64 B";
        printf("%-16s %-16s %10s %10s %12s\n", name, "library", "median", "quartile", "difference");
        for (size_t library = 0; library < job.libraries.size(); ++library) {
            std::vector<double> own, less;
            for (int round = 0; round < job.rounds; ++round) {
                own.push_back(job.time(round, operation, library));
                less.push_back(job.time(round, operation, 0) - own.back());
            }
            printf("%-16s %-16s %10.1f %10.1f %12.1f\n", "", job.libraries[library].name.c_str(), quantile(own, 0.5),
                   quantile(own, 0.25), quantile(less, 0.5));
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    Job job;
    for (int i = 1; i < count; ++i) {
        const std::string word = arguments[i];
        const size_t equals = word.find('=');
        if (word == "--ranks" && i + 1 < count) {
            job.ranks = static_cast<uint32_t>(atoi(arguments[++i]));
        } else if (word == "--rounds" && i + 1 < count) {
            job.rounds = atoi(arguments[++i]);
        } else if (equals != std::string::npos) {
            job.libraries.emplace_back();
            job.libraries.back().name = word.substr(0, equals);
            job.libraries.back().path = word.substr(equals + 1);
        } else {
            give_up("unknown argument", word.c_str());
        }
    }
    if (job.libraries.empty() || job.ranks < 2 || job.rounds < 1) give_up("wanted", "[--ranks N] [--rounds N] NAME=LIBRARY.so ...");
    for (Library& library : job.libraries) load(library);
    job.name = "commplane-car-bench-" + std::to_string(getpid()) + "-";
    const size_t bytes = sizeof(double) * static_cast<size_t>(job.rounds) * 2 * job.libraries.size();
    job.times = static_cast<double*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    for (size_t i = 0; i < job.libraries.size(); ++i) {
        const commplane_car_layout_info info = layout_of(job.libraries[i], options_of(job, 0));
        require(job.libraries[i].create(job.segment(i).c_str(), info.total_bytes), "create");
    }
    for (uint32_t rank = 0; rank < job.ranks; ++rank) {
        if (fork() == 0) {
            run_rank(job, rank);
            _exit(0);
        }
    }
    int failed = 0, status = 0;
    while (wait(&status) > 0) failed |= status;
    for (size_t i = 0; i < job.libraries.size(); ++i) job.libraries[i].unlink(job.segment(i).c_str());
    if (failed != 0) return 1;
    print(job);
    return 0;
}
