/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of the binding share: the library's functions, whose addresses bind() was told. */
#pragma once

#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define CAR_EINTERRUPTED (-18) /* COMMPLANE_CAR_EINTERRUPTED */

struct car_library {
    int (*all_reduce)(void*, const void*, void*, uint64_t, int, int);
    int (*barrier)(void*);
    int (*all_gather)(void*, const void*, void*, uint64_t, int);
    int (*reduce_scatter)(void*, const void*, void*, uint64_t, int, int);
    int (*broadcast)(void*, void*, uint64_t, int, uint32_t);
    int (*all_reduce_rms_norm)(void*, const void*, const void*, const void*, void*, void*, uint64_t, uint64_t, int, float, float);
    void (*set_interrupt_check)(int (*)(void));
};
extern struct car_library car_library;

/* tensor_call.c */
PyObject* car_tensor_all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n);
