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

static PyObject* bind(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    void* address[7];
    if (n != 7) {
        PyErr_SetString(PyExc_TypeError, "bind() takes the addresses of 7 functions");
        return NULL;
    }
    for (int i = 0; i < 7; ++i) address[i] = PyLong_AsVoidPtr(args[i]);
    if (PyErr_Occurred()) return NULL;
    car_library.all_reduce = (int (*)(void*, const void*, void*, uint64_t, int, int))(uintptr_t)address[0];
    car_library.barrier = (int (*)(void*))(uintptr_t)address[1];
    car_library.all_gather = (int (*)(void*, const void*, void*, uint64_t, int))(uintptr_t)address[2];
    car_library.reduce_scatter = (int (*)(void*, const void*, void*, uint64_t, int, int))(uintptr_t)address[3];
    car_library.broadcast = (int (*)(void*, void*, uint64_t, int, uint32_t))(uintptr_t)address[4];
    car_library.all_reduce_rms_norm = (int (*)(void*, const void*, const void*, const void*, void*, void*, uint64_t, uint64_t, int,
                                           float, float))(uintptr_t)address[5];
    car_library.set_interrupt_check = (void (*)(int (*)(void)))(uintptr_t)address[6];
    car_library.set_interrupt_check(check_signals);
    Py_RETURN_NONE;
}

static int wrong_call(Py_ssize_t found, Py_ssize_t wanted, const char* signature) {
    if (found == wanted && car_library.barrier != NULL) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd numbers, after bind()", signature, wanted);
    return 1;
}

static PyObject* answer(int status) {
    if (status == CAR_EINTERRUPTED && PyErr_Occurred()) return NULL;
    return PyLong_FromLong(status);
}

/* Calls without the GIL; arguments that were no numbers raise. */
#define CALL(expression)                          \
    do {                                          \
        if (PyErr_Occurred()) return NULL;        \
        PyThreadState* state = PyEval_SaveThread(); \
        const int status = (expression);          \
        PyEval_RestoreThread(state);              \
        return answer(status);                    \
    } while (0)

static PyObject* all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (wrong_call(n, 6, "all_reduce(handle, in_ptr, out_ptr, count, dtype, op)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    const long op = PyLong_AsLong(args[5]);
    CALL(car_library.all_reduce(handle, in, out, count, (int)dtype, (int)op));
}

static PyObject* barrier(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (wrong_call(n, 1, "barrier(handle)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    CALL(car_library.barrier(handle));
}

static PyObject* all_gather(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (wrong_call(n, 5, "all_gather(handle, in_ptr, out_ptr, count, dtype)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    CALL(car_library.all_gather(handle, in, out, count, (int)dtype));
}

static PyObject* reduce_scatter(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (wrong_call(n, 6, "reduce_scatter(handle, in_ptr, out_ptr, count, dtype, op)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    const long op = PyLong_AsLong(args[5]);
    CALL(car_library.reduce_scatter(handle, in, out, count, (int)dtype, (int)op));
}

static PyObject* broadcast(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (wrong_call(n, 5, "broadcast(handle, ptr, count, dtype, root)")) return NULL;
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* buffer = PyLong_AsVoidPtr(args[1]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[2]);
    const long dtype = PyLong_AsLong(args[3]);
    const unsigned long root = PyLong_AsUnsignedLong(args[4]);
    CALL(car_library.broadcast(handle, buffer, count, (int)dtype, (uint32_t)root));
}

static PyObject* all_reduce_rms_norm(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (wrong_call(n, 11, "all_reduce_rms_norm(handle, in_ptr, residual_ptr, weight_ptr, norm_out_ptr, residual_out_ptr, rows, "
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
    CALL(car_library.all_reduce_rms_norm(pointer[0], pointer[1], pointer[2], pointer[3], pointer[4], pointer[5], rows, hidden,
                                     (int)dtype, (float)eps, (float)weight_bias));
}

#define METHOD(name, text) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, text}

static PyMethodDef methods[] = {
    METHOD(bind, "bind(addresses of all_reduce, barrier, all_gather, reduce_scatter, broadcast, all_reduce_rms_norm, "
                 "set_interrupt_check)"),
    METHOD(all_reduce, "all_reduce(handle, in_ptr, out_ptr, count, dtype, op) -> status"),
    METHOD(barrier, "barrier(handle) -> status"),
    METHOD(all_gather, "all_gather(handle, in_ptr, out_ptr, count, dtype) -> status"),
    METHOD(reduce_scatter, "reduce_scatter(handle, in_ptr, out_ptr, count, dtype, op) -> status"),
    METHOD(broadcast, "broadcast(handle, ptr, count, dtype, root) -> status"),
    METHOD(all_reduce_rms_norm, "all_reduce_rms_norm(handle, in_ptr, residual_ptr, weight_ptr, norm_out_ptr, residual_out_ptr, "
                                "rows, hidden, dtype, eps, weight_bias) -> status"),
    {"tensor_all_reduce", (PyCFunction)(void (*)(void))car_tensor_all_reduce, METH_FASTCALL,
     "tensor_all_reduce(torch, handle, dtype, op, in_place, fallback, fail) -> function of one tensor, or None"},
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
