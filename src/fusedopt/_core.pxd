"""What the borders for arrays and tensors use of `_core`, which holds the one C library.

Only these pass between the modules, as function pointers; the library itself is linked once, so
there is one thread pool and one choice of instruction set.
"""
from libc.stdint cimport int64_t, uint64_t

from fusedopt._c cimport (
    FO_NO_COUNT, fo_disk, fo_format_info, fo_hyper, fo_leaf, fo_run, fo_stats, fo_status,
)

from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next
from cpython.object cimport PyObject


cdef extern from "Python.h":
    int PyUnicode_CheckExact(PyObject *)
    int PyUnicode_Compare(PyObject *, PyObject *) except? -1


cdef inline bint is_same_key(PyObject *a, PyObject *b) except -1:
    """Whether two keys are the same object, or equal strings; False of others that are equal."""
    return a == b or (
        PyUnicode_CheckExact(a) and PyUnicode_CheckExact(b) and PyUnicode_Compare(a, b) == 0)


cdef inline PyObject *entry(of, key, Py_ssize_t *at) except? NULL:
    """The value of a key of a dict, or NULL.

    Entries often follow one another as their keys are asked for: the next one is tried first, which
    saves the search.
    """
    cdef Py_ssize_t after = at[0]
    cdef PyObject *its_key
    cdef PyObject *value
    if PyDict_Next(of, &after, &its_key, &value) and is_same_key(
            its_key, <PyObject *>key):
        at[0] = after
        return value
    return PyDict_GetItemWithError(of, key)


cdef int check(fo_status status) except -1
cdef void *address(array) except? NULL
cdef void *grow(void *memory, Py_ssize_t count, size_t size) except NULL

# as in fusedopt.h
cdef fo_status run_step(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                        ptrdiff_t n_hypers, const fo_run *run, int threads) noexcept nogil
cdef fo_status run_direct(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                          ptrdiff_t n_hypers, const fo_run *run, int threads) noexcept nogil
cdef fo_status run_measure(fo_leaf *leaves, ptrdiff_t n, const fo_run *run,
                           int threads) noexcept nogil
cdef fo_status run_stream(fo_leaf *leaves, ptrdiff_t n, int how, int threads) noexcept nogil
cdef fo_status zero_state(fo_leaf *leaves, ptrdiff_t n, int threads) noexcept nogil
cdef int copy_bytes(const fo_disk *disk, void *to, const void *source, size_t bytes) noexcept nogil
cdef fo_status sum_rows(fo_leaf *leaves, ptrdiff_t n, int threads) noexcept nogil
cdef void add_counts(int64_t *counts, const int64_t *rows, ptrdiff_t k) noexcept nogil
cdef size_t scratch_of(const fo_leaf *leaf) noexcept nogil
cdef fo_stats sum_stats(const fo_stats *stats, ptrdiff_t n) noexcept nogil
cdef uint64_t noise_key(uint64_t seed, uint64_t leaf, uint64_t step) noexcept nogil
cdef const fo_format_info *format_table() noexcept nogil

cdef struct Hypers:
    # the constants of a step, one row for each that leaves differ in
    fo_hyper *of
    ptrdiff_t n, capacity

cdef ptrdiff_t add_constants(Hypers *hypers, list names, constants, step, count) except -1
cdef ptrdiff_t add_row_constants(Hypers *hypers, ptrdiff_t like, list names, dict values,
                                 ptrdiff_t n) except -1
cdef ptrdiff_t number_counts(const int64_t *counts, const int64_t *rows, ptrdiff_t k, numbers,
                             list values) except? FO_NO_COUNT
cdef int set_constants(fo_hyper *h, list names, constants, step, count) except -1

cdef struct Sums:
    # where a list's steps measure: a row for each leaf, and scratch
    fo_stats *stats
    fo_stats *tiles
    ptrdiff_t capacity  # of tiles

cdef int prepare_sums(Sums *sums, const fo_leaf *leaves, ptrdiff_t n, fo_run *how) except -1
cdef object stats_table(const Sums *sums, ptrdiff_t n)
