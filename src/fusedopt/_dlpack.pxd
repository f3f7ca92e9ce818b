# cython: language_level=3
"""DLPack's structures (csrc/third_party/dlpack), and what a step asks of a tensor's layout."""
from libc.stdint cimport int64_t

from fusedopt._c cimport FO_BF16, FO_F16, FO_F32, FO_F64

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


cdef inline ptrdiff_t size_of(const DLTensor *t) noexcept nogil:
    cdef ptrdiff_t n = 1
    cdef int k
    for k in range(t.ndim):
        n *= t.shape[k]
    return n


cdef inline bint is_dense(const DLTensor *t) noexcept nogil:
    """Whether the elements fill one range of memory without gaps, in some order of the axes.

    (Of a tensor without elements they do; older versions of torch export odd strides of one.)
    """
    cdef ptrdiff_t expected = 1, left = 0
    cdef int k, found
    cdef unsigned long long used = 0
    for k in range(t.ndim - 1, -1, -1):
        if t.shape[k] != 1:
            if t.strides[k] != expected:
                break
            expected *= t.shape[k]
    else:
        return True  # row-major
    if size_of(t) == 0:
        return True
    expected = 1
    if t.ndim > 64:
        return False
    while True:
        left, found = 0, -1
        for k in range(t.ndim):
            if t.shape[k] != 1 and not used >> k & 1:
                left += 1
                if t.strides[k] == expected:
                    found = k
        if left == 0:
            return True
        if found < 0:
            return False
        used |= 1ULL << found
        expected *= t.shape[found]


cdef inline bint same_shape(const DLTensor *a, const DLTensor *b) noexcept nogil:
    cdef int k
    if a.ndim != b.ndim:
        return False
    for k in range(a.ndim):
        if a.shape[k] != b.shape[k]:
            return False
    return True


cdef inline bint same_order(const DLTensor *a, const DLTensor *b) noexcept nogil:
    """Of tensors of one shape: whether element i of both, in memory order, has the same index."""
    cdef int k
    for k in range(a.ndim):
        if a.shape[k] != 1 and a.strides[k] != b.strides[k]:
            return size_of(a) == 0
    return True


cdef inline bint repeats(const DLTensor *t) noexcept nogil:
    """Whether elements may share memory, as after expand(): an axis steps within a shorter one."""
    cdef int64_t reach = 1
    cdef int k, found
    cdef unsigned long long used = 0
    if t.ndim > 64:
        return True
    while size_of(t) > 0:
        found = -1
        for k in range(t.ndim):
            if t.shape[k] != 1 and not used >> k & 1 and (
                    found < 0 or t.strides[k] < t.strides[found]):
                found = k
        if found < 0:
            return False
        if t.strides[found] < reach:
            return True
        used |= 1ULL << found
        reach += (t.shape[found] - 1) * t.strides[found]
    return False
