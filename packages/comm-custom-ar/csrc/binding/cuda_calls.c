/* SPDX-License-Identifier: Apache-2.0
 *
 * The collectives on CUDA: as those of fastcall.c, with a stream as the last number. They queue work and do not wait. */
#include "library.h"

PyObject* car_cuda_all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 6, "cuda_all_reduce(handle, in_ptr, out_ptr, count, dtype, stream)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    const unsigned long long stream = PyLong_AsUnsignedLongLong(args[5]);
    CAR_CALL(car_library.cuda_all_reduce(handle, in, out, count, (int)dtype, stream));
}

PyObject* car_cuda_barrier(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 2, "cuda_barrier(handle, stream)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    const unsigned long long stream = PyLong_AsUnsignedLongLong(args[1]);
    CAR_CALL(car_library.cuda_barrier(handle, stream));
}

PyObject* car_cuda_all_gather(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 6, "cuda_all_gather(handle, in_ptr, out_ptr, count, dtype, stream)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    const unsigned long long stream = PyLong_AsUnsignedLongLong(args[5]);
    CAR_CALL(car_library.cuda_all_gather(handle, in, out, count, (int)dtype, stream));
}

PyObject* car_cuda_reduce_scatter(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 6, "cuda_reduce_scatter(handle, in_ptr, out_ptr, count, dtype, stream)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    const unsigned long long stream = PyLong_AsUnsignedLongLong(args[5]);
    CAR_CALL(car_library.cuda_reduce_scatter(handle, in, out, count, (int)dtype, stream));
}

PyObject* car_cuda_broadcast(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 6, "cuda_broadcast(handle, ptr, count, dtype, root, stream)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* buffer = PyLong_AsVoidPtr(args[1]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[2]);
    const long dtype = PyLong_AsLong(args[3]);
    const unsigned long root = PyLong_AsUnsignedLong(args[4]);
    const unsigned long long stream = PyLong_AsUnsignedLongLong(args[5]);
    CAR_CALL(car_library.cuda_broadcast(handle, buffer, count, (int)dtype, (uint32_t)root, stream));
}

PyObject* car_cuda_all_reduce_rms_norm(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 12, "cuda_all_reduce_rms_norm(handle, in_ptr, residual_ptr, weight_ptr, norm_out_ptr, residual_out_ptr, "
                              "rows, hidden, dtype, eps, weight_bias, stream)")) {
        return NULL;
    }
    void* pointer[6];
    for (int i = 0; i < 6; ++i) pointer[i] = PyLong_AsVoidPtr(args[i]);
    const unsigned long long rows = PyLong_AsUnsignedLongLong(args[6]);
    const unsigned long long hidden = PyLong_AsUnsignedLongLong(args[7]);
    const long dtype = PyLong_AsLong(args[8]);
    const double eps = PyFloat_AsDouble(args[9]);
    const double weight_bias = PyFloat_AsDouble(args[10]);
    const unsigned long long stream = PyLong_AsUnsignedLongLong(args[11]);
    CAR_CALL(car_library.cuda_all_reduce_rms_norm(pointer[0], pointer[1], pointer[2], pointer[3], pointer[4], pointer[5], rows, hidden,
                                                  (int)dtype, (float)eps, (float)weight_bias, stream));
}
