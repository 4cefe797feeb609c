// SPDX-License-Identifier: Apache-2.0
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

namespace commplane_car {
namespace {
thread_local char text[512];
}  // namespace

int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return status;
}

int fail_errno(int status, int error, const char* what, const char* subject) {
    return fail(status, "%s %s: %s", what, subject, strerror(error));
}

const char* last_error() { return text; }

}  // namespace commplane_car
