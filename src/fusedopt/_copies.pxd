# cython: language_level=3
"""See _copies.pyx."""


cdef class Copier:
    cdef object copy, set_grad, is_grad, plainly

    cdef int run(self, list targets, list sources) except -1
    cdef int put_back(self, target, source) except -1
