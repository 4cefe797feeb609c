/* SPDX-License-Identifier: Apache-2.0
 *
 * An all-reduce of a torch tensor in one C call: the tensor is read through DLPack's C functions, which cost a tenth of what its
 * Python attributes cost. Without torch's headers: what is needed of torch is found by name when a call is bound.
 *
 * Only what is certain is done here: exactly a torch.Tensor or Parameter, on the device and of the dtype that were bound, contiguous,
 * without the negative bit (which DLPack does not show). Everything else goes to `fallback`, the same call in Python. A call on CUDA
 * goes to the stream that is torch's current one of that device.
 */
#include <stdlib.h>

#include "dlpack.h"
#include "library.h"

typedef struct {
    void* handle;
    int dtype;
    int op;
    int32_t device_type; /* DLPack's */
    int32_t device;      /* number of the GPU, where it is one */
    uint8_t code; /* DLPack's of the dtype, and its bits */
    uint8_t bits;
    const DLPackExchangeAPI* api;
    PyTypeObject* tensor_type;
    PyTypeObject* parameter_type;
    PyObject* is_neg;     /* torch.Tensor.is_neg */
    PyObject* empty_like; /* torch.empty_like */
    PyObject* fallback;
    PyObject* fail;
} Bound;

static const char kCapsule[] = "commplane_custom_ar.bound";

static void release(PyObject* capsule) {
    Bound* bound = PyCapsule_GetPointer(capsule, kCapsule);
    if (bound == NULL) return;
    Py_XDECREF(bound->tensor_type);
    Py_XDECREF(bound->parameter_type);
    Py_XDECREF(bound->is_neg);
    Py_XDECREF(bound->empty_like);
    Py_XDECREF(bound->fallback);
    Py_XDECREF(bound->fail);
    free(bound);
}

/* 1 and the tensor, if it may be read as it is; 0 if not; -1 with an exception. */
static int view(const Bound* bound, PyObject* object, DLTensor* tensor, uint64_t* count) {
    if (Py_TYPE(object) != bound->tensor_type && Py_TYPE(object) != bound->parameter_type) return 0;
    if (bound->api->dltensor_from_py_object_no_sync(object, tensor) != 0) {
        PyErr_Clear(); /* a tensor without storage, for one: the fallback says what is wrong */
        return 0;
    }
    if (tensor->device.type != bound->device_type || tensor->dtype.code != bound->code || tensor->dtype.bits != bound->bits ||
        tensor->dtype.lanes != 1 || (bound->device_type == kDLCUDA && tensor->device.id != bound->device)) {
        return 0;
    }
    int64_t elements = 1;
    int contiguous = 1;
    for (int32_t i = tensor->ndim - 1; i >= 0; --i) {
        const int64_t size = tensor->shape[i];
        if (size != 1 && tensor->strides != NULL && tensor->strides[i] != elements) contiguous = 0;
        elements *= size;
    }
    if (elements == 0) return 0; /* nothing to win */
    if (!contiguous) return 0;
    if (tensor->dtype.code == kDLFloat) {
        PyObject* negative = PyObject_CallFunctionObjArgs(bound->is_neg, object, NULL);
        if (negative == NULL) return -1;
        Py_DECREF(negative); /* True and False live on */
        if (negative != Py_False) return 0;
    }
    *count = (uint64_t)elements;
    return 1;
}

static PyObject* raise_status(const Bound* bound, int status) {
    if (status == CAR_EINTERRUPTED && PyErr_Occurred()) return NULL;
    PyObject* code = PyLong_FromLong(status);
    if (code == NULL) return NULL;
    PyObject* error = PyObject_CallFunctionObjArgs(bound->fail, code, NULL);
    Py_DECREF(code);
    if (error == NULL) return NULL;
    PyErr_SetObject((PyObject*)Py_TYPE(error), error);
    Py_DECREF(error);
    return NULL;
}

/* 0, or a status and perhaps an exception. */
static int run(const Bound* bound, const DLTensor* in, const DLTensor* out, uint64_t count) {
    const char* from = (const char*)in->data + in->byte_offset;
    char* to = (char*)out->data + out->byte_offset;
    void* stream = NULL;
    const int on_gpu = bound->device_type == kDLCUDA;
    if (on_gpu && bound->api->current_work_stream(kDLCUDA, bound->device, &stream) != 0) return CAR_EINTERRUPTED;
    PyThreadState* state = PyEval_SaveThread();
    const int status = on_gpu ? car_library.cuda_all_reduce(bound->handle, from, to, count, bound->dtype, (uint64_t)(uintptr_t)stream)
                              : car_library.all_reduce(bound->handle, from, to, count, bound->dtype, bound->op);
    PyEval_RestoreThread(state);
    return status;
}

static PyObject* in_place(PyObject* self, PyObject* object) {
    const Bound* bound = PyCapsule_GetPointer(self, kCapsule);
    if (bound == NULL) return NULL;
    DLTensor tensor;
    uint64_t count = 0;
    const int plain = view(bound, object, &tensor, &count);
    if (plain < 0) return NULL;
    if (plain == 0) return PyObject_CallFunctionObjArgs(bound->fallback, object, NULL);
    const int status = run(bound, &tensor, &tensor, count);
    if (status != 0) return raise_status(bound, status);
    Py_INCREF(object);
    return object;
}

static PyObject* out_of_place(PyObject* self, PyObject* object) {
    const Bound* bound = PyCapsule_GetPointer(self, kCapsule);
    if (bound == NULL) return NULL;
    DLTensor from, to;
    uint64_t count = 0;
    const int plain = view(bound, object, &from, &count);
    if (plain < 0) return NULL;
    if (plain == 0) return PyObject_CallFunctionObjArgs(bound->fallback, object, NULL);
    PyObject* result = PyObject_CallFunctionObjArgs(bound->empty_like, object, NULL);
    if (result == NULL) return NULL;
    if (bound->api->dltensor_from_py_object_no_sync(result, &to) != 0) {
        Py_DECREF(result);
        return NULL;
    }
    const int status = run(bound, &from, &to, count);
    if (status != 0) {
        Py_DECREF(result);
        return raise_status(bound, status);
    }
    return result;
}

static PyMethodDef kInPlace = {"all_reduce_", in_place, METH_O, "In place; returns the tensor."};
static PyMethodDef kOutOfPlace = {"all_reduce", out_of_place, METH_O, "Into a new tensor."};

/* torch's DLPack functions, or null without an exception: an older torch, or a version of them that is unknown here. */
static const DLPackExchangeAPI* exchange_api(PyObject* tensor_type) {
    PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
    const DLPackExchangeAPI* api = capsule == NULL ? NULL : PyCapsule_GetPointer(capsule, DLPACK_CAPSULE);
    Py_XDECREF(capsule); /* the table itself lives as long as the process */
    PyErr_Clear();
    while (api != NULL && api->header.version.major != DLPACK_MAJOR) api = api->header.prev_api;
    return api != NULL && api->dltensor_from_py_object_no_sync != NULL ? api : NULL;
}

static int dlpack_dtype(long dtype, Bound* bound) {
    static const uint8_t kCode[] = {0, 2, 2, 4, 2, 0, 0, 0, 1}; /* by the library's number: float, bfloat, int, unsigned */
    static const uint8_t kBits[] = {0, 32, 16, 16, 64, 32, 64, 8, 8};
    if (dtype < 1 || dtype > 8) return 0;
    bound->code = kCode[dtype];
    bound->bits = kBits[dtype];
    return 1;
}

/* torch, handle, dtype, op or the number of a GPU, in_place, fallback, fail */
static PyObject* bound_call(PyObject* const* args, int32_t device_type) {
    Bound* bound = calloc(1, sizeof *bound);
    if (bound == NULL) return PyErr_NoMemory();
    PyObject* self = PyCapsule_New(bound, kCapsule, release);
    if (self == NULL) {
        free(bound);
        return NULL;
    }
    PyObject* out = NULL;
    PyObject* torch = args[0];
    PyObject* nn = NULL;
    bound->handle = PyLong_AsVoidPtr(args[1]);
    const long dtype = PyLong_AsLong(args[2]), op_or_device = PyLong_AsLong(args[3]);
    const int here = PyObject_IsTrue(args[4]);
    if (PyErr_Occurred()) goto done;
    bound->dtype = (int)dtype;
    bound->device_type = device_type;
    if (device_type == kDLCUDA) {
        bound->device = (int32_t)op_or_device;
    } else {
        bound->op = (int)op_or_device;
    }
    bound->tensor_type = (PyTypeObject*)PyObject_GetAttrString(torch, "Tensor");
    nn = PyObject_GetAttrString(torch, "nn");
    if (bound->tensor_type == NULL || nn == NULL) goto done;
    bound->parameter_type = (PyTypeObject*)PyObject_GetAttrString(nn, "Parameter");
    bound->is_neg = PyObject_GetAttrString((PyObject*)bound->tensor_type, "is_neg");
    bound->empty_like = PyObject_GetAttrString(torch, "empty_like");
    if (bound->parameter_type == NULL || bound->is_neg == NULL || bound->empty_like == NULL) goto done;
    bound->api = exchange_api((PyObject*)bound->tensor_type);
    if (bound->api == NULL || (device_type == kDLCUDA && bound->api->current_work_stream == NULL) || !dlpack_dtype(dtype, bound)) {
        out = Py_None;
        Py_INCREF(out);
        goto done;
    }
    Py_INCREF(args[5]);
    bound->fallback = args[5];
    Py_INCREF(args[6]);
    bound->fail = args[6];
    out = PyCFunction_NewEx(here ? &kInPlace : &kOutOfPlace, self, NULL);
done:
    Py_XDECREF(nn);
    Py_DECREF(self);
    return out;
}

PyObject* car_tensor_all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (n != 7 || car_library.all_reduce == NULL) {
        PyErr_SetString(PyExc_TypeError, "tensor_all_reduce(torch, handle, dtype, op, in_place, fallback, fail), after bind()");
        return NULL;
    }
    return bound_call(args, kDLCPU);
}

PyObject* car_cuda_tensor_all_reduce(PyObject* module, PyObject* const* args, Py_ssize_t n) {
    (void)module;
    if (n != 7 || car_library.cuda_all_reduce == NULL) {
        PyErr_SetString(PyExc_TypeError, "cuda_tensor_all_reduce(torch, handle, dtype, device, in_place, fallback, fail), after bind()");
        return NULL;
    }
    return bound_call(args, kDLCUDA);
}
