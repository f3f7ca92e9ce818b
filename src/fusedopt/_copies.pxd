# cython: language_level=3
"""See _copies.pyx."""


cdef class Copier:
    cdef object copy, set_grad, is_grad, count_modes, plainly

    cdef int enable_grad(self, grad) except -1
    cdef int run(self, list targets, list sources) except -1
    cdef int put_back(self, target, source) except -1
