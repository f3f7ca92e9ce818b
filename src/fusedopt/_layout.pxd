# cython: language_level=3
"""How arrays lie in memory: one description for NumPy's buffers and DLPack's tensors."""


cdef struct Axes:
    # of an array: borrowed, valid as long as what it describes
    int ndim
    const Py_ssize_t *shape
    const Py_ssize_t *strides
    Py_ssize_t unit  # of the strides in one element: its bytes if strides are in bytes, else 1


cdef enum:
    MAX_AXES = 64  # as in NumPy and torch


cdef inline Axes axes_of_buffer(const Py_buffer *view) noexcept nogil:
    return Axes(ndim=view.ndim, shape=view.shape, strides=view.strides, unit=view.itemsize)


cdef inline Py_ssize_t count_elements(const Axes *a) noexcept nogil:
    cdef Py_ssize_t n = 1
    cdef int k
    for k in range(a.ndim):
        n *= a.shape[k]
    return n


cdef inline bint same_shape(const Axes *a, const Axes *b) noexcept nogil:
    cdef int k
    if a.ndim != b.ndim:
        return False
    for k in range(a.ndim):
        if a.shape[k] != b.shape[k]:
            return False
    return True


cdef inline bint same_order(const Axes *a, const Axes *b) noexcept nogil:
    """Of arrays of one shape: whether element i of both, in memory order, has the same index."""
    cdef int k
    for k in range(a.ndim):
        if a.shape[k] != 1 and a.strides[k] * b.unit != b.strides[k] * a.unit:
            return count_elements(a) == 0
    return True


cdef inline int next_axis(const Axes *a, unsigned long long used) noexcept nogil:
    """The axis with the smallest stride of those longer than 1 that are not used; -1 if none."""
    cdef int k, found = -1
    for k in range(a.ndim):
        if a.shape[k] != 1 and not used >> k & 1 and (
                found < 0 or a.strides[k] < a.strides[found]):
            found = k
    return found


cdef inline bint is_dense(const Axes *a) noexcept nogil:
    """Whether the elements fill one range of memory without gaps, in some order of the axes.

    (Those of an array without elements do, whatever strides older versions of torch export.)
    """
    cdef Py_ssize_t expected = a.unit
    cdef int k
    cdef unsigned long long used = 0
    for k in range(a.ndim - 1, -1, -1):
        if a.shape[k] != 1:
            if a.strides[k] != expected:
                break
            expected *= a.shape[k]
    else:
        return True  # row-major
    if count_elements(a) == 0:
        return True
    if a.ndim > MAX_AXES:
        return False
    expected = a.unit
    while True:
        k = next_axis(a, used)
        if k < 0:
            return True
        if a.strides[k] != expected:
            return False
        used |= 1ULL << k
        expected *= a.shape[k]


cdef inline bint repeats(const Axes *a) noexcept nogil:
    """Whether elements may share memory, as after expand(): an axis steps within a shorter one."""
    cdef Py_ssize_t reach = a.unit
    cdef int k
    cdef unsigned long long used = 0
    if a.ndim > MAX_AXES:
        return True
    if count_elements(a) == 0:
        return False
    while True:
        k = next_axis(a, used)
        if k < 0:
            return False
        if a.strides[k] < reach:
            return True
        used |= 1ULL << k
        reach += (a.shape[k] - 1) * a.strides[k]
