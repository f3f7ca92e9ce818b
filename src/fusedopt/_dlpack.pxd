# cython: language_level=3
"""DLPack's structures (csrc/third_party/dlpack), and what a step reads in them."""
from libc.stdint cimport int64_t

from fusedopt._c cimport FO_BF16, FO_F16, FO_F32, FO_F64
from fusedopt._layout cimport Axes

cdef extern from "dlpack.h" nogil:
    enum:
        DLPACK_MAJOR_VERSION
        kDLCPU
        kDLFloat
        kDLBfloat
        kDLInt
        kDLUInt

    ctypedef struct DLDevice:
        int device_type

    ctypedef struct DLDataType:
        unsigned char code, bits
        unsigned short lanes

    ctypedef struct DLTensor:
        void *data
        DLDevice device
        int ndim
        DLDataType dtype
        int64_t *shape
        int64_t *strides  # in elements
        size_t byte_offset

    ctypedef struct DLManagedTensor:
        DLTensor dl_tensor

    ctypedef struct DLPackVersion:
        unsigned int major

    ctypedef struct DLPackExchangeAPIHeader:
        DLPackVersion version

    ctypedef struct DLPackExchangeAPI:
        DLPackExchangeAPIHeader header
        int (*dltensor_from_py_object_no_sync)(void *tensor, DLTensor *out)


cdef inline int dtype_of(const DLTensor *t) noexcept nogil:
    """The format of plain numbers of this dtype, -1 if there is none."""
    if t.dtype.lanes != 1:
        return -1
    if t.dtype.code == kDLFloat:
        if t.dtype.bits == 32:
            return FO_F32
        if t.dtype.bits == 64:
            return FO_F64
        return FO_F16 if t.dtype.bits == 16 else -1
    return FO_BF16 if t.dtype.code == kDLBfloat and t.dtype.bits == 16 else -1


cdef inline bint is_int(const DLTensor *t, int code, int bits) noexcept nogil:
    return t.dtype.code == code and t.dtype.bits == bits and t.dtype.lanes == 1


cdef inline Axes axes_of(const DLTensor *t) noexcept nogil:
    """Its shape and strides (int64_t, the same as Py_ssize_t on all systems that have torch)."""
    return Axes(ndim=t.ndim, shape=<const Py_ssize_t *>t.shape,
                strides=<const Py_ssize_t *>t.strides, unit=1)
