// SPDX-License-Identifier: Apache-2.0
// A barrier is one flag hop that carries no data.
#include "collective.h"

namespace commplane_car {

int barrier(Comm& comm, const Descriptor& descriptor) { return hop(comm, descriptor); }

}  // namespace commplane_car
