/* SPDX-License-Identifier: Apache-2.0
 * The public header compiles as strict C99, and the library answers to it. */
#include <stdio.h>
#include <string.h>

#include "commplane_car.h"

int main(void) {
    if (commplane_car_abi_version() != (COMMPLANE_CAR_ABI_MAJOR << 16 | COMMPLANE_CAR_ABI_MINOR)) return 1;
    if (strcmp(commplane_car_status_name(COMMPLANE_CAR_ELIMIT), "ELIMIT") != 0) return 2;
    if (strcmp(commplane_car_status_name(COMMPLANE_CAR_EMISMATCH), "EMISMATCH") != 0) return 3;
    if (commplane_car_all_reduce(NULL, NULL, NULL, 0, COMMPLANE_CAR_FLOAT32, COMMPLANE_CAR_SUM) != COMMPLANE_CAR_EINVAL) return 4;
    if (commplane_car_set_isa("abacus") != COMMPLANE_CAR_EUNSUPPORTED) return 5;
    printf("abi %u.%u, %s\n", (unsigned)COMMPLANE_CAR_ABI_MAJOR, (unsigned)COMMPLANE_CAR_ABI_MINOR, commplane_car_isa());
    return 0;
}
