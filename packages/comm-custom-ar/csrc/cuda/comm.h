// SPDX-License-Identifier: Apache-2.0
// One rank's end of a communicator on CUDA.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <atomic>

#include "commplane_car_cuda.h"
#include "flight.h"
#include "layout.h"

namespace car {
namespace gpu {

constexpr uint32_t kMostCaptured = 16384;  // inputs of graphs that all ranks can read

struct Region {
    uint32_t id;
    uint64_t bytes;
    void* bases[kMaxRanks];
};

struct Captured {
    void* input;
    uint64_t bytes;
};

struct Choices {
    uint32_t count = 0;
    commplane_car_cuda_choice of[COMMPLANE_CAR_CUDA_MAX_CHOICES];
};

}  // namespace gpu
}  // namespace car

struct commplane_car_cuda {
    std::atomic<int> state{0};  // 0, EPOISONED or ECLOSED: what every further call returns
    std::atomic<bool> busy{false};
    std::atomic<uint64_t> timeout_ns{0};
    int device = 0;
    bool early = false;
    bool connected = false;
    car::gpu::Group group = {};
    car::gpu::Control* control = nullptr;  // as the host sees it
    void* memory = nullptr;
    void* opened[car::gpu::kMaxRanks] = {};

    // The stream of the last call. Calls from another one wait for it; those of a capture among themselves.
    cudaStream_t stream = nullptr;
    bool called = false;
    cudaEvent_t order = nullptr;
    cudaStream_t captured_stream = nullptr;
    unsigned long long capture = 0;  // the last one that had a call; captures are never 0
    cudaEvent_t captured_order = nullptr;

    car::gpu::Choices choices[2][2];  // [readable][capturing]
    uint32_t region_count = 0;
    car::gpu::Region regions[COMMPLANE_CAR_MAX_REGIONS];
    bool capturing = false;
    bool remembering = false;
    void** rows = nullptr;  // kMostCaptured times kMaxRanks addresses on the device
    uint32_t rows_used = 0;
    uint32_t rows_filled = 0;
    car::gpu::Captured* captured = nullptr;

    commplane_car::Word sequence{0};
    commplane_car::FlightRing flight;
};

namespace car {
namespace gpu {

typedef commplane_car_cuda Comm;

int fail_cuda(cudaError_t error, const char* what);

// Makes a device current for as long as it lives.
class OnDevice {
  public:
    explicit OnDevice(int device);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    int status() const { return status_; }

  private:
    int before_ = -1;
    int status_ = 0;
};

int open(const commplane_car_cuda_options& options, Comm** out, unsigned char* handle);
int connect(Comm& comm, const unsigned char* handles);
int close(Comm& comm);

// Why the communicator is poisoned, or 0. Local, does not wait.
int fault(const Comm& comm);
commplane_car_cuda_detail detail(const Comm& comm);

// What is called, as the kernels compare it; `rest` is a hash of all that has no place of its own.
void describe(uint32_t kind, uint32_t dtype, uint32_t root, uint32_t algorithm, uint64_t count, uint64_t rest, uint32_t* words);
commplane_car_call decode(const uint32_t* words);

// Have `stream` wait for the last call, if that was on another one.
int order(Comm& comm, cudaStream_t stream);

}  // namespace gpu
}  // namespace car
