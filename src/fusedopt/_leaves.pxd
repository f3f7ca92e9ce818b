# cython: language_level=3
"""What the borders for arrays and for tensors share: see _leaves.pyx."""
cimport cython
from libc.stdint cimport uintptr_t

from fusedopt._c cimport (
    FO_MAX_STATES, fo_array, fo_count, fo_disk, fo_format_info, fo_kind, fo_leaf, fo_region, fo_run,
    fo_stats, fo_status,
)
from fusedopt._core cimport Hypers, Sums
from fusedopt._spans cimport Span, Spans

cdef enum:
    # places: which array of a leaf
    PARAM = 0                     # 1 + k: state k
    EMA = 1 + FO_MAX_STATES       # the running average
    ARRAYS = 2 + FO_MAX_STATES    # how many; ARRAYS + place: what belongs to the codes at a place
    GRAD = 2 * ARRAYS
    COPY = 2 * ARRAYS + 1

cdef object step_result(number, updated, skipped, norm, factor, stats)

cdef const fo_format_info *FORMATS  # of the C library, by fo_format


cdef inline fo_array *array_at(fo_leaf *leaf, int place) noexcept nogil:
    """The data at a place; that of codes where the place is that of what belongs to them."""
    if place >= ARRAYS and place < GRAD:
        place -= ARRAYS
    if place == PARAM:
        return &leaf.param
    if place == EMA:
        return &leaf.ema
    if place == GRAD:
        return &leaf.grad
    if place == COPY:
        return &leaf.copy
    return &leaf.state[place - 1]


cdef inline bint locate(fo_leaf *leaf, ptrdiff_t i, int place, Span *span) noexcept nogil:
    """Describe the memory of one of a leaf's arrays, leaf i; False if there is none."""
    cdef fo_array *array = array_at(leaf, place)
    cdef const fo_format_info *about = &FORMATS[<int>array.format]
    cdef ptrdiff_t n = leaf.n
    if array.data == NULL:
        return False
    if place == GRAD and leaf.by_rows != NULL and leaf.by_rows.starts != NULL:
        n = leaf.by_rows.starts[n // leaf.by_rows.length] * leaf.by_rows.length  # of repeated rows
    span.leaf, span.place = i, place
    if place >= ARRAYS and place < GRAD:
        span.low = <uintptr_t>array.extra
        span.high = span.low + (
            (leaf.n + ((<ptrdiff_t>1 << about.shift) - 1)) >> about.shift) * about.extra
    else:
        span.low = <uintptr_t>array.data
        span.high = span.low + fo_count(array, n) * about.size
    return span.low < span.high


@cython.final
cdef class Verdict:
    cdef readonly bint skipped
    cdef readonly object grad_norm, clip_factor


cdef class LeafList:
    cdef int rule             # number in the C table
    cdef fo_kind kind
    cdef void *scratch        # of a factored rule
    cdef size_t scratch_size
    cdef tuple state_names
    cdef list scalar_names
    cdef fo_leaf *leaves
    cdef ptrdiff_t n          # leaves of a step
    cdef Hypers hypers        # constants of a step
    cdef Spans spans          # of all arrays that any step writes
    cdef Spans others         # of what one step writes beside them: copies, zeroed gradients
    cdef Sums sums            # what is measured of each leaf
    cdef fo_stats *kept       # of an accumulator: what was measured of each of its leaves, or NULL
    cdef public list writes   # (dict, key, value): what a step that succeeds writes, keys it has
    cdef public object disk   # `_disk.Disk`, where state is on one, or None
    cdef fo_region *regions   # its regions, during a call
    cdef fo_disk on_disk
    cdef int claimed          # 1 while a thread has the list; exchanged atomically

    # of a border
    cdef str leaf_name(self, ptrdiff_t i)
    cdef str grad_name(self, ptrdiff_t i)
    cdef str copy_name(self, ptrdiff_t i)
    cdef str extra_name(self, ptrdiff_t i, int place)
    cdef str busy(self)
    cdef bint has_grad(self, ptrdiff_t i) noexcept
    cdef ptrdiff_t row(self, ptrdiff_t i) noexcept
    cdef ptrdiff_t count_rows(self) noexcept
    cdef int add_direction(self, ptrdiff_t i, fo_array *to) except -1
    cdef int replace(self, ptrdiff_t i) except -1
    cdef bint settle(self, double first, double second) except -1

    cdef int set_rule(self, str rule, tuple state_names) except -1
    cdef int claim(self) except -1
    cdef void release(self) noexcept
    cdef str name(self, ptrdiff_t i, int place)

    cdef int refuse_overlap(self, Spans *spans) except -1
    cdef int refuse_alias(self, Spans *spans, ptrdiff_t i, int place) except -1
    cdef int refuse_bytes(self, str name, uintptr_t low, uintptr_t high, Spans *spans) except -1
    cdef int check_others(self, bint zero_grads, bint copies) except -1

    cdef fo_disk *find_regions(self) except NULL
    cdef int use_disk(self, fo_run *how) except -1
    cdef int check_step(self, fo_status status) except -1

    cdef Verdict run(self, options, reduction, fo_run *how, int threads)
    cdef object prepare(self, options, fo_run *how)
    cdef int make_scratch(self) except -1
    cdef bint direct(self, reduction, fo_run *how, int threads) except -1
    cdef bint direct_on_all(self, reduction, fo_run *how, int threads) except -1
    cdef Verdict judge(self, options, reduction, fo_run *how, int threads)
    cdef void zero_gradients(self) noexcept
    cdef int make_writes(self) except -1
    cdef object statistics(self, options, reduction)
    cdef object table(self)
    cdef object sizes(self)
    cdef int take_table(self, table) except -1
