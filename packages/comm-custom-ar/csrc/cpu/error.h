// SPDX-License-Identifier: Apache-2.0
// The calling thread's error text. Only failures touch it.
#pragma once

namespace commplane_car {

// Formats the text (cut at 511 bytes) and returns `status`, so that a failure is one statement.
[[gnu::cold]] [[gnu::format(printf, 2, 3)]] int fail(int status, const char* format, ...);

// The same for a failed system call: adds errno's words. `error` is an errno value.
[[gnu::cold]] int fail_errno(int status, int error, const char* what, const char* subject);

const char* last_error();

}  // namespace commplane_car
