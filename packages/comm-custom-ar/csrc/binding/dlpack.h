/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of DLPack 1.x that is used here, as its specification lays it out (dmlc/dlpack, dlpack.h): what a tensor is, and the
 * table of C functions that a tensor type offers as `__dlpack_c_exchange_api__` (DLPack 1.3; torch 2.10 and later). It is an ABI
 * of its own, so one binary serves every torch. */
#pragma once

#include <stdint.h>

enum { kDLCPU = 1, kDLCUDA = 2 };
enum { kDLFloat = 2 };
#define DLPACK_MAJOR 1
#define DLPACK_CAPSULE "dlpack_exchange_api"

typedef struct {
    void* data;
    struct {
        int32_t type;
        int32_t id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code;
        uint8_t bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides; /* elements; may be null for a contiguous tensor */
    uint64_t byte_offset;
} DLTensor;

typedef struct DLPackExchangeAPI {
    struct {
        struct {
            uint32_t major;
            uint32_t minor;
        } version;
        struct DLPackExchangeAPI* prev_api;
    } header;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object_no_sync;
    void* managed_tensor_to_py_object_no_sync;
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out); /* may be null */
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out); /* what torch.cuda.current_stream says */
} DLPackExchangeAPI;
