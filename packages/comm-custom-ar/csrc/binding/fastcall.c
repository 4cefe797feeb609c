/* SPDX-License-Identifier: Apache-2.0
 *
 * The collectives for CPython 3.10 and later (stable ABI): METH_FASTCALL, GIL released around the call. It is told the
 * addresses of the library's functions, so it links to nothing and can never bring in a second copy of it.
 */
#include "library.h"

struct car_library car_library;

/* Called by a thread that waits inside the library, without the GIL. Python's own handlers run in it, so that Ctrl-C is seen
 * while peers are awaited; not 0: one of them raised, and the exception is this thread's. */
static int check_signals(void) {
    PyGILState_STATE state = PyGILState_Ensure();
    const int raised = PyErr_CheckSignals();
    PyGILState_Release(state);
    return raised;
}

#define FUNCTIONS 13

static PyObject* bind(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    uintptr_t address[FUNCTIONS];
    if (n != FUNCTIONS) {  /* the Python half is of another version */
        PyErr_Format(PyExc_TypeError, "bind() takes the addresses of %d functions, found %zd", FUNCTIONS, n);
        return NULL;
    }
    for (int i = 0; i < FUNCTIONS; ++i) address[i] = (uintptr_t)PyLong_AsVoidPtr(args[i]);
    if (PyErr_Occurred()) return NULL;
    car_library.all_reduce = (int (*)(void*, const void*, void*, uint64_t, int, int))address[0];
    car_library.barrier = (int (*)(void*))address[1];
    car_library.all_gather = (int (*)(void*, const void*, void*, uint64_t, int))address[2];
    car_library.reduce_scatter = (int (*)(void*, const void*, void*, uint64_t, int, int))address[3];
    car_library.broadcast = (int (*)(void*, void*, uint64_t, int, uint32_t))address[4];
    car_library.all_reduce_rms_norm = (int (*)(void*, const void*, const void*, const void*, void*, void*, uint64_t, uint64_t, int,
                                               float, float))address[5];
    car_library.cuda_all_reduce = (int (*)(void*, const void*, void*, uint64_t, int, uint64_t))address[6];
    car_library.cuda_barrier = (int (*)(void*, uint64_t))address[7];
    car_library.cuda_all_gather = (int (*)(void*, const void*, void*, uint64_t, int, uint64_t))address[8];
    car_library.cuda_reduce_scatter = (int (*)(void*, const void*, void*, uint64_t, int, uint64_t))address[9];
    car_library.cuda_broadcast = (int (*)(void*, void*, uint64_t, int, uint32_t, uint64_t))address[10];
    car_library.cuda_all_reduce_rms_norm = (int (*)(void*, const void*, const void*, const void*, void*, void*, uint64_t, uint64_t,
                                                    int, float, float, uint64_t))address[11];
    car_library.set_interrupt_check = (void (*)(int (*)(void)))address[12];
    car_library.set_interrupt_check(check_signals);
    Py_RETURN_NONE;
}

int car_wrong_call(Py_ssize_t found, Py_ssize_t wanted, const char* signature) {
    if (found == wanted && car_library.barrier != NULL) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd numbers, after bind()", signature, wanted);
    return 1;
}

PyObject* car_answer(int status) {
    if (status == CAR_EINTERRUPTED && PyErr_Occurred()) return NULL;
    return PyLong_FromLong(status);
}

static PyObject* all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 6, "all_reduce(handle, in_ptr, out_ptr, count, dtype, op)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    const long op = PyLong_AsLong(args[5]);
    CAR_CALL(car_library.all_reduce(handle, in, out, count, (int)dtype, (int)op));
}

static PyObject* barrier(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 1, "barrier(handle)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    CAR_CALL(car_library.barrier(handle));
}

static PyObject* all_gather(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 5, "all_gather(handle, in_ptr, out_ptr, count, dtype)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    CAR_CALL(car_library.all_gather(handle, in, out, count, (int)dtype));
}

static PyObject* reduce_scatter(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 6, "reduce_scatter(handle, in_ptr, out_ptr, count, dtype, op)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    const long op = PyLong_AsLong(args[5]);
    CAR_CALL(car_library.reduce_scatter(handle, in, out, count, (int)dtype, (int)op));
}

static PyObject* broadcast(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 5, "broadcast(handle, ptr, count, dtype, root)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* buffer = PyLong_AsVoidPtr(args[1]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[2]);
    const long dtype = PyLong_AsLong(args[3]);
    const unsigned long root = PyLong_AsUnsignedLong(args[4]);
    CAR_CALL(car_library.broadcast(handle, buffer, count, (int)dtype, (uint32_t)root));
}

static PyObject* all_reduce_rms_norm(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (car_wrong_call(n, 11, "all_reduce_rms_norm(handle, in_ptr, residual_ptr, weight_ptr, norm_out_ptr, residual_out_ptr, rows, "
                              "hidden, dtype, eps, weight_bias)")) {
        return NULL;
    }
    void* pointer[6];
    for (int i = 0; i < 6; ++i) pointer[i] = PyLong_AsVoidPtr(args[i]);
    const unsigned long long rows = PyLong_AsUnsignedLongLong(args[6]);
    const unsigned long long hidden = PyLong_AsUnsignedLongLong(args[7]);
    const long dtype = PyLong_AsLong(args[8]);
    const double eps = PyFloat_AsDouble(args[9]);
    const double weight_bias = PyFloat_AsDouble(args[10]);
    CAR_CALL(car_library.all_reduce_rms_norm(pointer[0], pointer[1], pointer[2], pointer[3], pointer[4], pointer[5], rows, hidden,
                                             (int)dtype, (float)eps, (float)weight_bias));
}

#define METHOD_OF(name, function, text) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, text}
#define METHOD(name, text) METHOD_OF(#name, name, text)

static PyMethodDef methods[] = {
    METHOD(bind, "bind(addresses of all_reduce, barrier, all_gather, reduce_scatter, broadcast, all_reduce_rms_norm, the same "
                 "on cuda, set_interrupt_check)"),
    METHOD(all_reduce, "all_reduce(handle, in_ptr, out_ptr, count, dtype, op) -> status"),
    METHOD(barrier, "barrier(handle) -> status"),
    METHOD(all_gather, "all_gather(handle, in_ptr, out_ptr, count, dtype) -> status"),
    METHOD(reduce_scatter, "reduce_scatter(handle, in_ptr, out_ptr, count, dtype, op) -> status"),
    METHOD(broadcast, "broadcast(handle, ptr, count, dtype, root) -> status"),
    METHOD(all_reduce_rms_norm, "all_reduce_rms_norm(handle, in_ptr, residual_ptr, weight_ptr, norm_out_ptr, residual_out_ptr, "
                                "rows, hidden, dtype, eps, weight_bias) -> status"),
    METHOD_OF("cuda_all_reduce", car_cuda_all_reduce, "cuda_all_reduce(handle, in_ptr, out_ptr, count, dtype, stream) -> status"),
    METHOD_OF("cuda_barrier", car_cuda_barrier, "cuda_barrier(handle, stream) -> status"),
    METHOD_OF("cuda_all_gather", car_cuda_all_gather, "cuda_all_gather(handle, in_ptr, out_ptr, count, dtype, stream) -> status"),
    METHOD_OF("cuda_reduce_scatter", car_cuda_reduce_scatter,
              "cuda_reduce_scatter(handle, in_ptr, out_ptr, count, dtype, stream) -> status"),
    METHOD_OF("cuda_broadcast", car_cuda_broadcast, "cuda_broadcast(handle, ptr, count, dtype, root, stream) -> status"),
    METHOD_OF("cuda_all_reduce_rms_norm", car_cuda_all_reduce_rms_norm,
              "cuda_all_reduce_rms_norm(handle, in_ptr, residual_ptr, weight_ptr, norm_out_ptr, residual_out_ptr, rows, hidden, "
              "dtype, eps, weight_bias, stream) -> status"),
    METHOD_OF("tensor_all_reduce", car_tensor_all_reduce,
              "tensor_all_reduce(torch, handle, dtype, op, in_place, fallback, fail) -> function of one tensor, or None"),
    METHOD_OF("cuda_tensor_all_reduce", car_cuda_tensor_all_reduce,
              "cuda_tensor_all_reduce(torch, handle, dtype, device, in_place, fallback, fail) -> function of one tensor, or None"),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_fastcall",
    .m_doc = "The collectives of commplane_car, called without ctypes.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__fastcall(void) { return PyModuleDef_Init(&definition); }
