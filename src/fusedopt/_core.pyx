# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True, autotestdict=False
"""The C library as Python sees it: its tables, the choice of an instruction set, its memory.

The only module that the library is linked into. The borders for arrays and for tensors call it
through the functions below, see `_core.pxd`.
"""
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from cpython.buffer cimport (
    PyBUF_STRIDES, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize

from fusedopt._c cimport *
from fusedopt cimport _layout

import os
from math import prod

import numpy

# fo_stats of csrc/fusedopt.h
STATS = numpy.dtype(
    [(name, "f8") for name in ("grad", "param", "update", "largest_grad", "largest_update")]
    + [("zeros", "i8"), ("nonfinite", "i8")]
)
TILE = FO_TILE
BLOCK = FO_BLOCK
STREAMS = FO_STREAMS
WINDOW = FO_WINDOW


cdef int check(fo_status status) except -1:
    """Turn a C status into an exception: the one place where that happens."""
    if status == FO_OK:
        return 0
    raise SystemError(f"fusedopt: internal status {<int>status}; please report")


cdef void *grow(void *memory, Py_ssize_t count, size_t size) except NULL:
    cdef void *larger = realloc(memory, max(count, 1) * size)
    if larger == NULL:
        raise MemoryError("fusedopt: no memory for the work list")
    return larger


# ------------------------------------------------------------------ what lists of leaves use

cdef fo_status run_step(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                        ptrdiff_t n_hypers, const fo_run *run, int threads) noexcept nogil:
    return fo_step(rule, leaves, n, hypers, n_hypers, run, threads)


cdef fo_status run_direct(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                          ptrdiff_t n_hypers, const fo_run *run, int threads) noexcept nogil:
    return fo_direct(rule, leaves, n, hypers, n_hypers, run, threads)


cdef fo_status run_measure(fo_leaf *leaves, ptrdiff_t n, const fo_run *run,
                           int threads) noexcept nogil:
    return fo_measure(leaves, n, run, threads)


cdef fo_status run_stream(fo_leaf *leaves, ptrdiff_t n, int how, int threads) noexcept nogil:
    return fo_stream(leaves, n, how, threads)


cdef fo_status zero_state(fo_leaf *leaves, ptrdiff_t n, int threads) noexcept nogil:
    return fo_zero_state(leaves, n, threads)


cdef int copy_bytes(const fo_disk *disk, void *to, const void *source, size_t bytes) noexcept nogil:
    return fo_copy(disk, to, source, bytes)


cdef fo_status sum_rows(fo_leaf *leaves, ptrdiff_t n, int threads) noexcept nogil:
    return fo_sum_rows(leaves, n, threads)


cdef void add_counts(int64_t *counts, const int64_t *rows, ptrdiff_t k) noexcept nogil:
    fo_add_counts(counts, rows, k)


cdef size_t scratch_of(const fo_leaf *leaf) noexcept nogil:
    return fo_scratch(leaf)


cdef fo_stats sum_stats(const fo_stats *stats, ptrdiff_t n) noexcept nogil:
    return fo_total(stats, n)


cdef uint64_t noise_key(uint64_t seed, uint64_t leaf, uint64_t step) noexcept nogil:
    return fo_key(seed, leaf, step)


cdef const fo_format_info *format_table() noexcept nogil:
    return fo_formats()


cdef ptrdiff_t add_constants(Hypers *hypers, list names, constants, step, count) except -1:
    """Add the constants of a step, see `set_constants`; return their index."""
    if hypers.n == hypers.capacity:
        hypers.of = <fo_hyper *>grow(hypers.of, 2 * hypers.capacity + 4, sizeof(fo_hyper))
        hypers.capacity = 2 * hypers.capacity + 4
    set_constants(&hypers.of[hypers.n], names, constants, step, count)
    hypers.n += 1
    return hypers.n - 1


cdef ptrdiff_t add_row_constants(Hypers *hypers, ptrdiff_t like, list names, dict values,
                                 ptrdiff_t n) except -1:
    """Add n sets that are as set `like` but for the rule's scalars; return the index of the first.

    Of those `values` has a number, or an array of n.
    """
    cdef ptrdiff_t j, first = hypers.n
    cdef const double *column
    cdef double same
    cdef int k
    if first + n > hypers.capacity:
        hypers.of = <fo_hyper *>grow(hypers.of, first + n, sizeof(fo_hyper))
        hypers.capacity = first + n
    for j in range(first, first + n):
        hypers.of[j] = hypers.of[like]
    for k, name in enumerate(names):
        value = values[name]
        if isinstance(value, numpy.ndarray):
            value = numpy.ascontiguousarray(value, numpy.float64)
            column = <const double *>address(value)
            for j in range(n):
                hypers.of[first + j].scalars[k] = column[j]
        else:
            same = value
            for j in range(first, first + n):
                hypers.of[j].scalars[k] = same
    hypers.n = first + n
    return first


cdef int set_constants(fo_hyper *h, list names, constants, step, count) except -1:
    """Set what `rule.Constants` are in a step: a rule's scalars of these names, and all others."""
    cdef int k = 0
    cdef Py_ssize_t at = 0
    cdef PyObject *value
    cdef tuple of = <tuple>constants  # by place: names take longer
    values = of[0](step, of[1])
    for name in names:
        value = entry(<dict?>values, name, &at)
        if value == NULL:
            raise KeyError(name)
        h.scalars[k] = <object>value
        k += 1
    h.grad_scale, h.l1, h.l2 = of[2], of[3], of[4]
    h.ema_weight = 0 if of[5] is None else constants.ema_weight(count)
    return 0


cdef int prepare_sums(Sums *sums, const fo_leaf *leaves, ptrdiff_t n, fo_run *how) except -1:
    """Prepare a step of n leaves for measuring: rows of zeros, and enough scratch."""
    cdef ptrdiff_t tiles = fo_count_tiles(leaves, n)
    sums.stats = <fo_stats *>grow(sums.stats, n, sizeof(fo_stats))
    memset(sums.stats, 0, n * sizeof(fo_stats))
    if sums.tiles == NULL or tiles > sums.capacity:
        sums.tiles = <fo_stats *>grow(sums.tiles, tiles, sizeof(fo_stats))
        sums.capacity = tiles
    how.tiles, how.stats = sums.tiles, sums.stats
    return 0


cdef object stats_table(const Sums *sums, ptrdiff_t n):
    """The sums of n leaves, as rows of `STATS`."""
    rows = PyBytes_FromStringAndSize(<char *>sums.stats, n * sizeof(fo_stats))
    return numpy.frombuffer(rows, STATS)


def total(table):
    """The sums of some leaves' sums, rows of `STATS`, by name.

    Not a row of NumPy: indexing one without memory ends the process.
    """
    cdef Py_buffer view
    cdef fo_stats all
    PyObject_GetBuffer(numpy.ascontiguousarray(table, STATS).view(numpy.uint8), &view,
                       PyBUF_STRIDES)
    all = fo_total(<fo_stats *>view.buf, view.len // sizeof(fo_stats))
    PyBuffer_Release(&view)
    return all


# ------------------------------------------------------------------ rows of a gradient

cdef void *address(array) except? NULL:
    """The address of an array's elements; the caller keeps the array alive."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES)
    cdef void *data = view.buf
    PyBuffer_Release(&view)
    return data


def look_at_rows(indices, int64_t count):
    """The place of the first index that is not a row of `count`, or -1; and whether they ascend.

    Indices here and below are int64, without gaps.
    """
    cdef fo_row_look look
    cdef ptrdiff_t k = len(indices)
    cdef const int64_t *first = <const int64_t *>address(indices)
    with nogil:
        look = fo_look_at_rows(first, k, count)
    return look.bad, bool(look.ascends)


def sort_rows(indices, int64_t count):
    """Rows that ascend; where the places of each begin in the third array; places in `indices`."""
    cdef ptrdiff_t n, k = len(indices)
    # one block, which malloc keeps for the next step: of several it gives pages back to the system
    block = numpy.empty(5 * k + 1, numpy.int64)
    rows, scratch = block[:k], block[k:3 * k]
    starts, order = block[3 * k:4 * k + 1].view(numpy.intp), block[4 * k + 1:].view(numpy.intp)
    cdef const int64_t *given = <const int64_t *>address(indices)
    cdef int64_t *row = <int64_t *>address(rows)
    cdef int64_t *free = <int64_t *>address(scratch)
    cdef ptrdiff_t *start = <ptrdiff_t *>address(starts)
    cdef ptrdiff_t *place = <ptrdiff_t *>address(order)
    with nogil:
        n = fo_sort_rows(given, k, count, row, start, place, free)
    return rows[:n], starts[:n + 1], order[:k]


cdef ptrdiff_t number_counts(const int64_t *counts, const int64_t *rows, ptrdiff_t k, numbers,
                             list values) except? FO_NO_COUNT:
    """Number the different counts of k rows; `values` gets an array of them: see fo_number_counts.

    Returns how many there are, or FO_NO_COUNT if one is no count: then it is the first of them.
    """
    cdef ptrdiff_t n = FO_NO_ROOM, slots = 2
    cdef int32_t *number = <int32_t *>address(numbers)
    cdef int64_t *value
    cdef int32_t *space
    while slots < 2 * k and slots < 1 << 16:  # which lies in cache
        slots *= 2
    while n == FO_NO_ROOM:
        found, table = numpy.empty(slots // 2, numpy.int64), numpy.empty(slots, numpy.int32)
        value, space = <int64_t *>address(found), <int32_t *>address(table)
        with nogil:
            n = fo_number_counts(counts, rows, k, value, number, space, slots)
        slots *= 8
    values.append(found)
    return n


# ------------------------------------------------------------------ layout in memory

def is_dense(array):
    """Whether the elements fill one range of memory without gaps, in some order of the axes."""
    cdef Py_buffer view
    cdef _layout.Axes axes
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES)
    axes = _layout.axes_of_buffer(&view)
    result = _layout.is_dense(&axes)
    PyBuffer_Release(&view)
    return result


def same_layout(array, other):
    """Whether the elements of two arrays of one shape lie in the same order in memory."""
    cdef Py_buffer view, other_view
    cdef _layout.Axes axes, other_axes
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES)
    try:
        PyObject_GetBuffer(other, &other_view, PyBUF_STRIDES)
    except BaseException:
        PyBuffer_Release(&view)
        raise
    axes, other_axes = _layout.axes_of_buffer(&view), _layout.axes_of_buffer(&other_view)
    result = (_layout.same_shape(&axes, &other_axes)
              and _layout.same_order(&axes, &other_axes))
    PyBuffer_Release(&view)
    PyBuffer_Release(&other_view)
    return result


def repeats(tuple shape, tuple strides):
    """Whether elements may share memory, as after expand(): an axis steps within a shorter one."""
    cdef Py_ssize_t lengths[_layout.MAX_AXES]
    cdef Py_ssize_t steps[_layout.MAX_AXES]
    cdef _layout.Axes axes
    cdef int k
    if len(shape) > _layout.MAX_AXES:
        return True
    for k in range(len(shape)):
        lengths[k], steps[k] = shape[k], strides[k]
    axes = _layout.Axes(ndim=len(shape), shape=&lengths[0], strides=&steps[0], unit=1)
    return _layout.repeats(&axes)


# ------------------------------------------------------------------ arithmetic in Python

cdef class Ieee:
    """A ``with`` block in IEEE 754's default mode, whatever mode this thread is in: see ieee.h."""
    cdef fo_mode before

    def __enter__(self):
        self.before = fo_enter_ieee()

    def __exit__(self, kind, value, trace):
        fo_leave_ieee(self.before)


# ------------------------------------------------------------------ memory

cdef class Memory:
    """Bytes from fo_allocate as a writable buffer, released with the last array on them."""
    cdef void *start
    cdef Py_ssize_t size

    def __cinit__(self, Py_ssize_t size):
        self.start = fo_allocate(size)
        if self.start == NULL:
            raise MemoryError(f"fusedopt: no memory for {size} bytes of optimizer state")
        self.size = size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.size, 0, flags)

    def __dealloc__(self):
        fo_release(self.start)


def allocate(specs):
    """Arrays of the given (shape, dtype, strides), on one block of memory, not yet written.

    They start on cache lines and lie in the order given, so that those of a small leaf are close
    together.
    """
    sizes = [-(-max(1, numpy.dtype(dtype).itemsize * prod(shape)) // 64) * 64
             for shape, dtype, _ in specs]
    memory = Memory(sum(sizes))
    offset, arrays = 0, []
    for (shape, dtype, strides), size in zip(specs, sizes):
        arrays.append(numpy.ndarray(shape, dtype, memory, offset, strides))
        offset += size
    return arrays


cdef class File:
    """An open file, closed with the last array on it.

    It is opened and closed in C: Python code could leave it open, because a signal's exception may
    come between any two instructions, and is lost in a destructor.

    Parameters
    ----------
    path, flags
        As for os.open.
    name : str
        For messages.
    """
    cdef int number
    cdef readonly str name

    def __cinit__(self, path, int flags, str name):
        self.number = -1
        self.name = name
        self.number = os.open(path, flags, 0o600)

    def fileno(self):
        return self.number

    def __dealloc__(self):
        if self.number >= 0:
            fo_close_file(self.number)


cdef class Mapped:
    """Bytes of a file as a buffer, unmapped with the last array on them.

    Parameters
    ----------
    file : File
        Kept open as long.
    offset, size : int
        Multiples of the page size, except the size if it is read only.
    is_read_only : bool
        If not, the space in the file is released with the last array.
    """
    cdef fo_region region
    cdef File file
    cdef object __weakref__

    def __cinit__(self, File file not None, int64_t offset, Py_ssize_t size, bint is_read_only):
        cdef int error
        self.file = file
        self.region.offset, self.region.bytes = offset, size
        self.region.file, self.region.is_read_only = file.number, is_read_only
        error = fo_map_file(&self.region)
        if error != 0:
            raise OSError(error, os.strerror(error))

    def row(self):
        """Address, bytes, offset, descriptor, whether it is read only: an fo_region."""
        return (<uintptr_t>self.region.start, self.region.bytes, self.region.offset,
                self.region.file, self.region.is_read_only)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(
            view, self, self.region.start, self.region.bytes, self.region.is_read_only, flags)

    def __dealloc__(self):
        if self.region.start != NULL:
            fo_unmap_file(&self.region)


def relieve(array):
    """Write an array of adjacent elements to its file, if it is on one, and drop it from memory."""
    cdef fo_disk disk
    cdef Py_buffer view
    cdef int error
    base = array
    while isinstance(base, (numpy.ndarray, memoryview)):
        base = base.obj if isinstance(base, memoryview) else base.base
    if not isinstance(base, Mapped):
        return
    disk.regions, disk.n, disk.error = &(<Mapped>base).region, 1, 0
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES)
    with nogil:
        error = fo_relieve(&disk, view.buf, view.len)
    PyBuffer_Release(&view)
    if error != 0:
        raise OSError(error, os.strerror(error), (<Mapped>base).file.name)


# ------------------------------------------------------------------ tables

# by fo_kind; those from "layerwise" on need fo_direct before a step
KINDS = (
    "elementwise", "internal", "rowwise", "layerwise", "counting", "factored", "summing", "matrix")


cdef list table():
    """All rules of C: (name, [scalars], states, required, kind)."""
    cdef const fo_rule *row = fo_rules()
    cdef const char *const *scalar
    rows = []
    while row.name != NULL:
        names, scalar = [], row.scalars
        while scalar[0] != NULL:
            names.append(scalar[0].decode())
            scalar += 1
        rows.append((row.name.decode(), names, row.states, row.required, KINDS[<int>row.kind]))
        row += 1
    return rows


def rules():
    """The optimizers' rules of the C table: (name, [scalars], states, required states)."""
    return [row[:4] for row in table() if row[4] != "internal"]


def formats():
    """The storage formats of the C table: (name, bytes, extra bytes, for each, stochastic)."""
    cdef int i
    cdef const fo_format_info *row = fo_formats()
    return [
        (row[i].name.decode(), row[i].size, row[i].extra, 1 << row[i].shift,
         bool(row[i].stochastic))
        for i in range(FO_FORMATS)
    ]


def available_isas():
    """Names of the instruction sets that this machine can run, best first."""
    cdef const char *const *name = fo_isas()
    names = []
    while name[0] != NULL:
        names.append(name[0].decode())
        name += 1
    return names


def isa():
    """Name of the instruction set in use."""
    return fo_isa().decode()


def select_isa(str name):
    """Use another instruction set; ValueError if this machine cannot run it."""
    if fo_select_isa(name.encode()) != FO_OK:
        raise ValueError(f"instruction set {name!r} is not one of {', '.join(available_isas())}")


def backend():
    """What splits the work over threads: "openmp", "pool" or "serial"."""
    return fo_backend().decode()


def lateness():
    """Loops that waited for late threads, loops that ran on one thread because of that, and whether
    the next one will: see threads.c.
    """
    cdef fo_lateness now = fo_late()
    return now.late, now.alone, bool(now.is_alone)


def force_threads(bint yes):
    """Use threads even if they sleep or come late: for tests, whose steps would run on one."""
    fo_force_threads(yes)


# of all rules, name -> number, names of the scalars, states, kind; read once: it takes memory
RULES = {row[0]: (number, row[1], row[2], row[4]) for number, row in enumerate(table())}
