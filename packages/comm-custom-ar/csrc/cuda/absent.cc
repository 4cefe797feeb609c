// SPDX-License-Identifier: Apache-2.0
//
// The functions of commplane_car_cuda.h in a build without nvcc.
#include "commplane_car_cuda.h"
#include "error.h"

namespace {

int absent() {
    return commplane_car::fail(COMMPLANE_CAR_EUNSUPPORTED,
                               "this build of commplane-custom-ar has no CUDA half: nvcc was not found when it was built");
}

}  // namespace

extern "C" {

int commplane_car_cuda_check() { return absent(); }
int commplane_car_cuda_device_count(int*) { return absent(); }
int commplane_car_cuda_device_info(int, uint32_t*, uint32_t*) { return absent(); }
int commplane_car_cuda_memory_alloc(int, uint64_t, void**, unsigned char*) { return absent(); }
int commplane_car_cuda_memory_open(int, const unsigned char*, void**) { return absent(); }
int commplane_car_cuda_memory_close(int, void*) { return absent(); }
int commplane_car_cuda_memory_free(int, void*) { return absent(); }
int commplane_car_cuda_memory_poke(int, void*, uint64_t, uint32_t) { return absent(); }
int commplane_car_cuda_memory_peek(int, const void*, uint64_t, uint32_t, uint64_t*) { return absent(); }
int commplane_car_cuda_memory_handle(int, const void*, unsigned char*, uint64_t*) { return absent(); }
int commplane_car_cuda_open(const commplane_car_cuda_options*, commplane_car_cuda**, unsigned char*) { return absent(); }
int commplane_car_cuda_connect(commplane_car_cuda*, const unsigned char*) { return absent(); }
int commplane_car_cuda_close(commplane_car_cuda*) { return absent(); }
int commplane_car_cuda_abort(commplane_car_cuda*) { return absent(); }
int commplane_car_cuda_set_timeout(commplane_car_cuda*, uint64_t) { return absent(); }
int commplane_car_cuda_memory(const commplane_car_cuda*, uint64_t*, uint64_t*) { return absent(); }
int commplane_car_cuda_choose(commplane_car_cuda*, int, int, const commplane_car_cuda_choice*, uint32_t) { return absent(); }
int commplane_car_cuda_register(commplane_car_cuda*, void* const*, uint64_t, uint32_t) { return absent(); }
int commplane_car_cuda_unregister(commplane_car_cuda*, uint32_t) { return absent(); }
int commplane_car_cuda_capture_begin(commplane_car_cuda*, int) { return absent(); }
int commplane_car_cuda_capture_end(commplane_car_cuda*) { return absent(); }
int commplane_car_cuda_captured(commplane_car_cuda*, uint32_t, void**, uint64_t*) { return absent(); }
int commplane_car_cuda_captured_count(commplane_car_cuda*, uint32_t*) { return absent(); }
int commplane_car_cuda_fill(commplane_car_cuda*, uint32_t, void* const*) { return absent(); }
int commplane_car_cuda_filled(commplane_car_cuda*) { return absent(); }
int commplane_car_cuda_all_reduce(commplane_car_cuda*, const void*, void*, uint64_t, int, uint64_t) { return absent(); }
int commplane_car_cuda_all_reduce_rms_norm(commplane_car_cuda*, const void*, const void*, const void*, void*, void*, uint64_t,
                                           uint64_t, int, float, float, uint64_t) { return absent(); }
int commplane_car_cuda_all_gather(commplane_car_cuda*, const void*, void*, uint64_t, int, uint64_t) { return absent(); }
int commplane_car_cuda_reduce_scatter(commplane_car_cuda*, const void*, void*, uint64_t, int, uint64_t) { return absent(); }
int commplane_car_cuda_broadcast(commplane_car_cuda*, void*, uint64_t, int, uint32_t, uint64_t) { return absent(); }
int commplane_car_cuda_barrier(commplane_car_cuda*, uint64_t) { return absent(); }
int commplane_car_cuda_check_faults(const commplane_car_cuda*) { return absent(); }
int commplane_car_cuda_status_detail(const commplane_car_cuda*, commplane_car_cuda_detail*) { return absent(); }
int commplane_car_cuda_flight(const commplane_car_cuda*, void*, uint64_t, uint64_t, uint64_t*) { return absent(); }

}  // extern "C"
