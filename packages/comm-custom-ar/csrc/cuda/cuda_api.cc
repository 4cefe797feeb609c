// SPDX-License-Identifier: Apache-2.0
// The exported functions: check what the caller gave, then hand over.
#include <string.h>

#include <new>

#include "collective.h"
#include "commplane_car_cuda.h"
#include "descriptor.h"
#include "error.h"
#include "launch.h"

using car::gpu::Comm;
using car::gpu::fail_cuda;
using car::gpu::OnDevice;
using commplane_car::element_bytes;
using commplane_car::fail;
using commplane_car::kCountBits;

namespace {

// Copies a caller's struct that may be older (shorter) or newer (longer) than ours; unknown fields are zero.
template <class Struct>
int take(const Struct* given, Struct* out) {
    if (given == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a struct pointer is null");
    if (given->size < sizeof *out) return fail(COMMPLANE_CAR_EINVAL, "struct size %u is below %zu: set `size` first", given->size, sizeof *out);
    memcpy(out, given, sizeof *out);
    return COMMPLANE_CAR_OK;
}

int null_comm() { return fail(COMMPLANE_CAR_EINVAL, "communicator handle is null"); }

// One call at a time, none on a communicator that is at fault; its device is current meanwhile.
class Entered {
  public:
    explicit Entered(Comm* comm) : comm_(comm) {
        if (comm == nullptr) {
            status_ = null_comm();
            return;
        }
        if (comm->busy.exchange(true, std::memory_order_acquire)) [[unlikely]] {
            status_ = fail(COMMPLANE_CAR_EBUSY, "another thread is in a call on this communicator");
            return;
        }
        owner_ = true;
        const int state = comm->state.load(std::memory_order_relaxed);
        if (state == COMMPLANE_CAR_ECLOSED) [[unlikely]] {
            status_ = fail(state, "the communicator is closed");
        } else if (state != 0) [[unlikely]] {
            status_ = fail(state, "the communicator was poisoned by an earlier call: %s",
                           commplane_car_status_name(car::gpu::fault(*comm)));
        } else if (const int fault = car::gpu::fault(*comm)) [[unlikely]] {
            comm->state.store(COMMPLANE_CAR_EPOISONED, std::memory_order_relaxed);
            status_ = fail(fault, "a kernel of an earlier call gave up");
        } else if (!comm->connected) [[unlikely]] {
            status_ = fail(COMMPLANE_CAR_EINVAL, "the communicator is not connected yet");
        }
    }
    ~Entered() {
        if (owner_) comm_->busy.store(false, std::memory_order_release);
    }
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;
    int status() const { return status_; }

  private:
    Comm* comm_;
    bool owner_ = false;
    int status_ = COMMPLANE_CAR_OK;
};

// `run` in the communicator and on its device.
template <class Run>
int collective(Comm* comm, Run run) {
    const Entered entered(comm);
    if (entered.status() != 0) [[unlikely]] return entered.status();
    const OnDevice on(comm->device);
    if (on.status() != 0) [[unlikely]] return on.status();
    return run(*comm);
}

bool is_summed(int dtype) { return dtype >= COMMPLANE_CAR_FLOAT32 && dtype <= COMMPLANE_CAR_BFLOAT16; }

int bad_dtype(int dtype) { return fail(COMMPLANE_CAR_EUNSUPPORTED, "dtype %d is not served on cuda", dtype); }

int bad_buffers(const char* what) { return fail(COMMPLANE_CAR_EINVAL, "%s", what); }

int bad_count() { return fail(COMMPLANE_CAR_EINVAL, "there are 2^46 elements or more"); }

bool is_many(uint64_t count) { return count >> 46 != 0; }

bool is_element_aligned(const void* at, int dtype) { return reinterpret_cast<uint64_t>(at) % element_bytes(uint32_t(dtype)) == 0; }

bool overlap(const void* a, uint64_t a_bytes, const void* b, uint64_t b_bytes) {
    const auto from = reinterpret_cast<uint64_t>(a), to = reinterpret_cast<uint64_t>(b);
    return from < to + b_bytes && to < from + a_bytes;
}

cudaStream_t as_stream(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace

extern "C" {

int commplane_car_cuda_check(void) {
    int devices = 0, driver = 0;
    cudaError_t error = cudaDriverGetVersion(&driver);
    if (error == cudaSuccess && driver == 0) return fail(COMMPLANE_CAR_EUNSUPPORTED, "there is no CUDA driver on this machine");
    if (error == cudaSuccess) error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess) return COMMPLANE_CAR_OK;
    cudaGetLastError();
    int runtime = 0;
    cudaRuntimeGetVersion(&runtime);
    return fail(COMMPLANE_CAR_EUNSUPPORTED, "the CUDA driver (%d.%d) does not serve this build (CUDA %d.%d): %s", driver / 1000,
                driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10, cudaGetErrorString(error));
}

int commplane_car_cuda_device_count(int* count) {
    if (count == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    const cudaError_t error = cudaGetDeviceCount(count);
    return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "cudaGetDeviceCount");
}

int commplane_car_cuda_device_info(int device, uint32_t* multiprocessors, uint32_t* capability) {
    if (multiprocessors == nullptr || capability == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    int count = 0, major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) return fail_cuda(error, "device attributes");
    *multiprocessors = uint32_t(count);
    *capability = uint32_t(10 * major + minor);
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_memory_alloc(int device, uint64_t bytes, void** out, unsigned char handle[64]) {
    if (out == nullptr || handle == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    const OnDevice on(device);
    if (on.status() != 0) return on.status();
    void* memory = nullptr;
    cudaError_t error = cudaMalloc(&memory, bytes);
    if (error != cudaSuccess) return fail_cuda(error, "cudaMalloc");
    cudaIpcMemHandle_t ipc;
    error = cudaIpcGetMemHandle(&ipc, memory);
    if (error != cudaSuccess) {
        cudaFree(memory);
        return fail_cuda(error, "cudaIpcGetMemHandle");
    }
    memcpy(handle, &ipc, sizeof ipc);
    *out = memory;
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_memory_open(int device, const unsigned char handle[64], void** out) {
    if (out == nullptr || handle == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    const OnDevice on(device);
    if (on.status() != 0) return on.status();
    cudaIpcMemHandle_t ipc;
    memcpy(&ipc, handle, sizeof ipc);
    const cudaError_t error = cudaIpcOpenMemHandle(out, ipc, cudaIpcMemLazyEnablePeerAccess);
    return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "cudaIpcOpenMemHandle");
}

int commplane_car_cuda_memory_close(int device, void* opened) {
    const OnDevice on(device);
    if (on.status() != 0) return on.status();
    const cudaError_t error = cudaIpcCloseMemHandle(opened);
    return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "cudaIpcCloseMemHandle");
}

int commplane_car_cuda_memory_free(int device, void* allocated) {
    const OnDevice on(device);
    if (on.status() != 0) return on.status();
    const cudaError_t error = cudaFree(allocated);
    return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "cudaFree");
}

int commplane_car_cuda_memory_poke(int device, void* at, uint64_t words, uint32_t value) {
    const OnDevice on(device);
    if (on.status() != 0) return on.status();
    cudaError_t error = car::gpu::launch_poke(at, words, value);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "writing to memory of a GPU");
}

int commplane_car_cuda_memory_peek(int device, const void* at, uint64_t words, uint32_t value, uint64_t* wrong) {
    if (wrong == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    const OnDevice on(device);
    if (on.status() != 0) return on.status();
    unsigned long long *count = nullptr, found = 0;
    cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&count), sizeof *count);
    if (error == cudaSuccess) error = cudaMemset(count, 0, sizeof *count);
    if (error == cudaSuccess) error = car::gpu::launch_peek(at, words, value, count);
    if (error == cudaSuccess) error = cudaMemcpy(&found, count, sizeof found, cudaMemcpyDeviceToHost);
    if (count != nullptr) cudaFree(count);
    *wrong = found;
    return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "reading memory of a GPU");
}

int commplane_car_cuda_memory_handle(int device, const void* at, unsigned char handle[64], uint64_t* offset) {
    if (handle == nullptr || offset == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    const OnDevice on(device);
    if (on.status() != 0) return on.status();
    typedef int (*AddressRange)(unsigned long long*, size_t*, unsigned long long);
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return fail_cuda(error, "cuMemGetAddressRange");
    unsigned long long base = 0;
    size_t bytes = 0;
    const auto address = reinterpret_cast<unsigned long long>(at);
    if (reinterpret_cast<AddressRange>(found)(&base, &bytes, address) != 0) {
        return fail(COMMPLANE_CAR_EINVAL, "the address is not of memory on a GPU");
    }
    cudaIpcMemHandle_t ipc;
    error = cudaIpcGetMemHandle(&ipc, reinterpret_cast<void*>(base));
    if (error != cudaSuccess) {
        const int status = fail_cuda(error, "cudaIpcGetMemHandle");
        return status == COMMPLANE_CAR_ESYS ? COMMPLANE_CAR_EUNSUPPORTED : status;
    }
    memcpy(handle, &ipc, sizeof ipc);
    *offset = address - base;
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_open(const commplane_car_cuda_options* options, commplane_car_cuda** out, unsigned char handle[64]) {
    commplane_car_cuda_options own;
    if (const int status = take(options, &own)) return status;
    return car::gpu::open(own, out, handle);
}

int commplane_car_cuda_connect(commplane_car_cuda* comm, const unsigned char* handles) {
    if (comm == nullptr) return null_comm();
    if (handles == nullptr) return bad_buffers("handles are null");
    return car::gpu::connect(*comm, handles);
}

int commplane_car_cuda_close(commplane_car_cuda* comm) { return comm == nullptr ? null_comm() : car::gpu::close(*comm); }

int commplane_car_cuda_abort(commplane_car_cuda* comm) {
    if (comm == nullptr) return null_comm();
    if (comm->control == nullptr) return COMMPLANE_CAR_OK;
    __atomic_store_n(&comm->control->rank[comm->group.rank].gave_up, 1u, __ATOMIC_RELEASE);
    __atomic_store_n(&comm->control->stop, 1u, __ATOMIC_RELEASE);
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_set_timeout(commplane_car_cuda* comm, uint64_t timeout_ns) {
    if (comm == nullptr) return null_comm();
    if (timeout_ns == 0) return fail(COMMPLANE_CAR_EINVAL, "timeout_ns is 0: every wait has to be bounded");
    comm->timeout_ns.store(timeout_ns, std::memory_order_relaxed);
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_memory(const commplane_car_cuda* comm, uint64_t* bytes, uint64_t* capacity) {
    if (comm == nullptr) return null_comm();
    if (bytes == nullptr || capacity == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    *bytes = comm->group.layout.total;
    *capacity = car::gpu::capacity(*comm);
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_choose(commplane_car_cuda* comm, int readable, int capturing, const commplane_car_cuda_choice* choices,
                              uint32_t count) {
    if (comm == nullptr) return null_comm();
    if (count > COMMPLANE_CAR_CUDA_MAX_CHOICES) {
        return fail(COMMPLANE_CAR_ELIMIT, "wanted at most %d choices, found %u", COMMPLANE_CAR_CUDA_MAX_CHOICES, count);
    }
    for (uint32_t i = 0; i < count; ++i) {
        const commplane_car_cuda_choice& one = choices[i];
        const bool pulls = one.algorithm >= COMMPLANE_CAR_CUDA_ONE_SHOT_PULL;
        if (one.algorithm < COMMPLANE_CAR_CUDA_ONE_SHOT_PUSH || one.algorithm > COMMPLANE_CAR_CUDA_TWO_SHOT_PULL || (pulls && !readable)) {
            return fail(COMMPLANE_CAR_EINVAL, "choice %u: algorithm %u does not serve these inputs", i, one.algorithm);
        }
        if (one.threads % 64 != 0 || one.threads > 512) return fail(COMMPLANE_CAR_EINVAL, "choice %u: %u threads", i, one.threads);
        if (i > 0 && one.max_bytes <= choices[i - 1].max_bytes) return fail(COMMPLANE_CAR_EINVAL, "choice %u is not sorted", i);
    }
    car::gpu::Choices& to = comm->choices[readable != 0][capturing != 0];
    to.count = count;
    if (count != 0) memcpy(to.of, choices, count * sizeof *choices);
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_register(commplane_car_cuda* comm, void* const* bases, uint64_t bytes, uint32_t id) {
    if (comm == nullptr) return null_comm();
    if (comm->region_count == COMMPLANE_CAR_MAX_REGIONS) return fail(COMMPLANE_CAR_ELIMIT, "%d regions are registered", COMMPLANE_CAR_MAX_REGIONS);
    if (bases == nullptr) return bad_buffers("addresses are null");
    car::gpu::Region& region = comm->regions[comm->region_count];
    region.id = id;
    region.bytes = bytes;
    for (uint32_t r = 0; r < comm->group.ranks; ++r) region.bases[r] = bases[r];
    ++comm->region_count;
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_unregister(commplane_car_cuda* comm, uint32_t id) {
    if (comm == nullptr) return null_comm();
    for (uint32_t i = 0; i < comm->region_count; ++i) {
        if (comm->regions[i].id != id) continue;
        comm->regions[i] = comm->regions[--comm->region_count];
        return COMMPLANE_CAR_OK;
    }
    return fail(COMMPLANE_CAR_ENOENT, "region %u is not registered", id);
}

int commplane_car_cuda_capture_begin(commplane_car_cuda* comm, int registered) {
    // A fault is no reason to refuse: the calls inside will, and the ranks' vote at the end is where they learn whose it is.
    if (comm == nullptr) return null_comm();
    if (comm->state.load(std::memory_order_relaxed) == COMMPLANE_CAR_ECLOSED) return fail(COMMPLANE_CAR_ECLOSED, "the communicator is closed");
    if (registered && comm->rows == nullptr) {
        const OnDevice on(comm->device);
        if (on.status() != 0) return on.status();
        const uint64_t bytes = uint64_t(car::gpu::kMostCaptured) * car::gpu::kMaxRanks * sizeof(void*);
        if (comm->captured == nullptr) comm->captured = new (std::nothrow) car::gpu::Captured[car::gpu::kMostCaptured];
        if (comm->captured == nullptr) return fail(COMMPLANE_CAR_ENOMEM, "out of memory");
        const cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&comm->rows), bytes);
        if (error != cudaSuccess) return fail_cuda(error, "addresses of captured inputs");
        cudaMemset(comm->rows, 0, bytes);  // a graph that is replayed before they are filled in stops at once
    }
    comm->capturing = true;
    comm->remembering = registered != 0;
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_capture_end(commplane_car_cuda* comm) {
    if (comm == nullptr) return null_comm();
    comm->capturing = comm->remembering = false;
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_captured_count(commplane_car_cuda* comm, uint32_t* count) {
    if (comm == nullptr) return null_comm();
    if (count == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    *count = comm->rows_used - comm->rows_filled;
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_captured(commplane_car_cuda* comm, uint32_t index, void** input, uint64_t* bytes) {
    if (comm == nullptr) return null_comm();
    if (index >= comm->rows_used - comm->rows_filled) return fail(COMMPLANE_CAR_EINVAL, "input %u was not captured", index);
    if (input == nullptr || bytes == nullptr) return fail(COMMPLANE_CAR_EINVAL, "a place for an answer is null");
    const car::gpu::Captured& one = comm->captured[comm->rows_filled + index];
    *input = one.input;
    *bytes = one.bytes;
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_fill(commplane_car_cuda* comm, uint32_t index, void* const* addresses) {
    if (comm == nullptr) return null_comm();
    if (index >= comm->rows_used - comm->rows_filled) return fail(COMMPLANE_CAR_EINVAL, "input %u was not captured", index);
    const OnDevice on(comm->device);
    if (on.status() != 0) return on.status();
    if (addresses == nullptr) return bad_buffers("addresses are null");
    void* row[car::gpu::kMaxRanks] = {};
    memcpy(row, addresses, comm->group.ranks * sizeof(void*));
    void** const to = comm->rows + uint64_t(comm->rows_filled + index) * car::gpu::kMaxRanks;
    const cudaError_t error = cudaMemcpy(to, row, sizeof row, cudaMemcpyHostToDevice);
    return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "addresses of captured inputs");
}

int commplane_car_cuda_filled(commplane_car_cuda* comm) {
    if (comm == nullptr) return null_comm();
    comm->rows_filled = comm->rows_used;
    const OnDevice on(comm->device);
    if (on.status() != 0) return on.status();
    const cudaError_t error = cudaDeviceSynchronize();  // the copies are there before any stream replays
    return error == cudaSuccess ? COMMPLANE_CAR_OK : fail_cuda(error, "addresses of captured inputs");
}

int commplane_car_cuda_all_reduce(commplane_car_cuda* comm, const void* in, void* out, uint64_t count, int dtype, uint64_t stream) {
    if (!is_summed(dtype)) return bad_dtype(dtype);
    if (is_many(count)) return bad_count();
    const uint64_t bytes = count * element_bytes(uint32_t(dtype));
    if (count != 0 && (in == nullptr || out == nullptr)) return bad_buffers("a buffer is null");
    if (!is_element_aligned(in, dtype) || !is_element_aligned(out, dtype)) return bad_buffers("a buffer is not aligned to its elements");
    if (in != out && overlap(in, bytes, out, bytes)) return bad_buffers("input and output overlap without being the same");
    return collective(comm, [&](Comm& c) { return car::gpu::all_reduce(c, {in, out, count, dtype}, as_stream(stream)); });
}

int commplane_car_cuda_all_reduce_rms_norm(commplane_car_cuda* comm, const void* in, const void* residual, const void* weight,
                                           void* norm_out, void* residual_out, uint64_t rows, uint64_t hidden, int dtype, float eps,
                                           float weight_bias, uint64_t stream) {
    if (!is_summed(dtype)) return bad_dtype(dtype);
    if (hidden >> 32 != 0 || (hidden != 0 && is_many(rows)) || (hidden != 0 && rows > (UINT64_C(1) << 46) / hidden)) return bad_count();
    const uint64_t element = element_bytes(uint32_t(dtype)), bytes = rows * hidden * element;
    if (bytes != 0) {
        if (in == nullptr || residual == nullptr || weight == nullptr || norm_out == nullptr || residual_out == nullptr) {
            return bad_buffers("a buffer is null");
        }
        if ((norm_out != in && overlap(norm_out, bytes, in, bytes)) || overlap(norm_out, bytes, residual, bytes) ||
            (residual_out != residual && overlap(residual_out, bytes, residual, bytes)) || overlap(residual_out, bytes, in, bytes) ||
            overlap(norm_out, bytes, residual_out, bytes) || overlap(norm_out, bytes, weight, hidden * element) ||
            overlap(residual_out, bytes, weight, hidden * element)) {
            return bad_buffers("an output overlaps what it may not");
        }
    }
    const car::gpu::Norm norm = {residual, weight, norm_out, residual_out, rows, uint32_t(hidden), eps, weight_bias};
    return collective(comm, [&](Comm& c) {
        if (bytes == 0) return car::gpu::barrier(c, as_stream(stream));
        return car::gpu::all_reduce_rms_norm(c, in, norm, dtype, as_stream(stream));
    });
}

int commplane_car_cuda_all_gather(commplane_car_cuda* comm, const void* in, void* out, uint64_t count, int dtype, uint64_t stream) {
    if (dtype < COMMPLANE_CAR_FLOAT32 || dtype > COMMPLANE_CAR_UINT8) return bad_dtype(dtype);
    if (is_many(count)) return bad_count();
    if (count != 0 && (in == nullptr || out == nullptr)) return bad_buffers("a buffer is null");
    return collective(comm, [&](Comm& c) {
        const uint64_t bytes = count * element_bytes(uint32_t(dtype));
        if (overlap(in, bytes, out, bytes * c.group.ranks)) return bad_buffers("the input overlaps the output");
        return car::gpu::all_gather(c, in, out, count, dtype, as_stream(stream));
    });
}

int commplane_car_cuda_reduce_scatter(commplane_car_cuda* comm, const void* in, void* out, uint64_t count, int dtype, uint64_t stream) {
    if (!is_summed(dtype)) return bad_dtype(dtype);
    if (is_many(count)) return bad_count();
    if (count != 0 && (in == nullptr || out == nullptr)) return bad_buffers("a buffer is null");
    if (!is_element_aligned(in, dtype) || !is_element_aligned(out, dtype)) return bad_buffers("a buffer is not aligned to its elements");
    return collective(comm, [&](Comm& c) {
        const uint64_t bytes = count * element_bytes(uint32_t(dtype));
        if (overlap(in, bytes * c.group.ranks, out, bytes)) return bad_buffers("the output overlaps the input");
        return car::gpu::reduce_scatter(c, {in, out, count, dtype}, as_stream(stream));
    });
}

int commplane_car_cuda_broadcast(commplane_car_cuda* comm, void* data, uint64_t count, int dtype, uint32_t root, uint64_t stream) {
    if (dtype < COMMPLANE_CAR_FLOAT32 || dtype > COMMPLANE_CAR_UINT8) return bad_dtype(dtype);
    if (is_many(count)) return bad_count();
    if (count != 0 && data == nullptr) return bad_buffers("a buffer is null");
    return collective(comm, [&](Comm& c) {
        if (root >= c.group.ranks) return fail(COMMPLANE_CAR_EINVAL, "root %u is not below %u", root, c.group.ranks);
        return car::gpu::broadcast(c, data, count, dtype, root, as_stream(stream));
    });
}

int commplane_car_cuda_barrier(commplane_car_cuda* comm, uint64_t stream) {
    return collective(comm, [&](Comm& c) { return car::gpu::barrier(c, as_stream(stream)); });
}

int commplane_car_cuda_check_faults(const commplane_car_cuda* comm) {
    if (comm == nullptr) return null_comm();
    const int status = car::gpu::fault(*comm);
    return status == 0 ? COMMPLANE_CAR_OK : fail(status, "a kernel gave up");
}

int commplane_car_cuda_status_detail(const commplane_car_cuda* comm, commplane_car_cuda_detail* out) {
    if (comm == nullptr) return null_comm();
    if (out == nullptr || out->size < sizeof *out) return fail(COMMPLANE_CAR_EINVAL, "set `size` of the struct first");
    const uint32_t size = out->size;
    *out = car::gpu::detail(*comm);
    out->size = size;
    return COMMPLANE_CAR_OK;
}

int commplane_car_cuda_flight(const commplane_car_cuda* comm, void* records, uint64_t record_bytes, uint64_t capacity, uint64_t* count) {
    if (comm == nullptr) return null_comm();
    if (records == nullptr || count == nullptr || record_bytes != sizeof(commplane_car_flight_record)) {
        return fail(COMMPLANE_CAR_EINVAL, "flight records are %zu bytes each, and need a place", sizeof(commplane_car_flight_record));
    }
    *count = comm->flight.read(comm->sequence.load(std::memory_order_acquire), static_cast<commplane_car_flight_record*>(records), capacity);
    return COMMPLANE_CAR_OK;
}

}  // extern "C"
