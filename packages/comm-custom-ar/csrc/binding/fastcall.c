/* SPDX-License-Identifier: Apache-2.0
 *
 * The two calls of the hot path for CPython 3.10 and later (stable ABI): METH_FASTCALL, GIL released around the call. It is
 * told the addresses of the library's functions, so it links to nothing and can never bring in a second copy of it.
 */
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

typedef int (*all_reduce_function)(void*, const void*, void*, uint64_t, int, int);
typedef int (*barrier_function)(void*);

static all_reduce_function all_reduce_address;
static barrier_function barrier_address;

static PyObject* bind(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (n != 2) {
        PyErr_SetString(PyExc_TypeError, "bind(all_reduce_address, barrier_address) takes 2 integers");
        return NULL;
    }
    void* all_reduce = PyLong_AsVoidPtr(args[0]);
    void* barrier = PyLong_AsVoidPtr(args[1]);
    if (PyErr_Occurred()) return NULL;
    all_reduce_address = (all_reduce_function)(uintptr_t)all_reduce;
    barrier_address = (barrier_function)(uintptr_t)barrier;
    Py_RETURN_NONE;
}

static PyObject* all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (n != 6 || all_reduce_address == NULL) {
        PyErr_SetString(PyExc_TypeError, "all_reduce(handle, in_ptr, out_ptr, count, dtype, op) takes 6 integers, after bind()");
        return NULL;
    }
    void* handle = PyLong_AsVoidPtr(args[0]);
    void* in = PyLong_AsVoidPtr(args[1]);
    void* out = PyLong_AsVoidPtr(args[2]);
    const unsigned long long count = PyLong_AsUnsignedLongLong(args[3]);
    const long dtype = PyLong_AsLong(args[4]);
    const long op = PyLong_AsLong(args[5]);
    if (PyErr_Occurred()) return NULL;
    PyThreadState* state = PyEval_SaveThread();
    const int status = all_reduce_address(handle, in, out, count, (int)dtype, (int)op);
    PyEval_RestoreThread(state);
    return PyLong_FromLong(status);
}

static PyObject* barrier(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (n != 1 || barrier_address == NULL) {
        PyErr_SetString(PyExc_TypeError, "barrier(handle) takes 1 integer, after bind()");
        return NULL;
    }
    void* handle = PyLong_AsVoidPtr(args[0]);
    if (PyErr_Occurred()) return NULL;
    PyThreadState* state = PyEval_SaveThread();
    const int status = barrier_address(handle);
    PyEval_RestoreThread(state);
    return PyLong_FromLong(status);
}

static PyMethodDef methods[] = {
    {"bind", (PyCFunction)(void (*)(void))bind, METH_FASTCALL, "bind(all_reduce_address, barrier_address)"},
    {"all_reduce", (PyCFunction)(void (*)(void))all_reduce, METH_FASTCALL,
     "all_reduce(handle, in_ptr, out_ptr, count, dtype, op) -> status"},
    {"barrier", (PyCFunction)(void (*)(void))barrier, METH_FASTCALL, "barrier(handle) -> status"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_fastcall",
    .m_doc = "The hot path of commplane_car, called without ctypes.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__fastcall(void) { return PyModuleDef_Init(&definition); }
