// SPDX-License-Identifier: Apache-2.0
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

namespace commplane_car {
namespace {

enum class Look { kRuns, kEnded, kUnknown };

// Reads state and start time of /proc/PID/stat: fields 3 and 22, after the command in brackets, which may hold anything.
Look look_at(uint64_t id, uint64_t* start) {
    char path[48];
    snprintf(path, sizeof path, "/proc/%llu/stat", static_cast<unsigned long long>(id));
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT ? Look::kEnded : Look::kUnknown;
    char text[1024];
    const ssize_t got = read(fd, text, sizeof text - 1);
    const int error = errno;
    close(fd);
    if (got <= 0) return got < 0 && error == ESRCH ? Look::kEnded : Look::kUnknown;
    text[got] = '\0';
    const char* field = strrchr(text, ')');
    if (field == nullptr || field[1] != ' ' || field[2] == '\0') return Look::kUnknown;
    field += 2;
    const char state = *field;
    for (int number = 3; number < 22; ++number) {
        field = strchr(field, ' ');
        if (field == nullptr) return Look::kUnknown;
        ++field;
    }
    *start = strtoull(field, nullptr, 10);
    return state == 'Z' || state == 'X' || state == 'x' ? Look::kEnded : Look::kRuns;
}

uint64_t pid_namespace() {
    struct stat about;
    return stat("/proc/self/ns/pid", &about) == 0 ? static_cast<uint64_t>(about.st_ino) : 0;
}

}  // namespace

ProcessIdentity this_process() {
    ProcessIdentity self = {static_cast<uint64_t>(getpid()), 0, pid_namespace()};
    if (self.space == 0 || look_at(self.id, &self.start) != Look::kRuns) self.id = 0;
    return self;
}

bool has_ended(const ProcessIdentity& process) {
    if (process.id == 0 || process.space != pid_namespace()) return false;
    uint64_t start = process.start;
    const Look look = look_at(process.id, &start);
    return look == Look::kEnded || (look == Look::kRuns && start != process.start);
}

}  // namespace commplane_car
