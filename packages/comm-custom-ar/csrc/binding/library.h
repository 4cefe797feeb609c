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
    int (*cuda_all_reduce)(void*, const void*, void*, uint64_t, int, uint64_t);
    int (*cuda_barrier)(void*, uint64_t);
    int (*cuda_all_gather)(void*, const void*, void*, uint64_t, int, uint64_t);
    int (*cuda_reduce_scatter)(void*, const void*, void*, uint64_t, int, uint64_t);
    int (*cuda_broadcast)(void*, void*, uint64_t, int, uint32_t, uint64_t);
    int (*cuda_all_reduce_rms_norm)(void*, const void*, const void*, const void*, void*, void*, uint64_t, uint64_t, int, float, float,
                                    uint64_t);
    void (*set_interrupt_check)(int (*)(void));
};
extern struct car_library car_library;

/* Number of arguments, checked; an exception and 1 where it is another one or bind() has not been called. */
int car_wrong_call(Py_ssize_t found, Py_ssize_t wanted, const char* signature);
/* A status as a Python number. */
PyObject* car_answer(int status);

/* Calls without the GIL; arguments that were no numbers raise. */
#define CAR_CALL(expression)                        \
    do {                                            \
        if (PyErr_Occurred()) return NULL;          \
        PyThreadState* state = PyEval_SaveThread(); \
        const int status = (expression);            \
        PyEval_RestoreThread(state);                \
        return car_answer(status);                  \
    } while (0)

/* cuda_calls.c */
PyObject* car_cuda_all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n);
PyObject* car_cuda_barrier(PyObject* module, PyObject* const* args, Py_ssize_t n);
PyObject* car_cuda_all_gather(PyObject* module, PyObject* const* args, Py_ssize_t n);
PyObject* car_cuda_reduce_scatter(PyObject* module, PyObject* const* args, Py_ssize_t n);
PyObject* car_cuda_broadcast(PyObject* module, PyObject* const* args, Py_ssize_t n);
PyObject* car_cuda_all_reduce_rms_norm(PyObject* module, PyObject* const* args, Py_ssize_t n);

/* tensor_call.c */
PyObject* car_tensor_all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n);
PyObject* car_cuda_tensor_all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n);
