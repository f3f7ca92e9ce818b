# cython: language_level=3
"""Ranges of memory that a step writes: whether two overlap, or a gradient lies in one."""
from libc.stdint cimport uintptr_t
from libc.stdlib cimport qsort


cdef struct Span:
    # bytes [low, high) of one array that the step writes
    uintptr_t low, high
    ptrdiff_t leaf
    int place  # see _leaves.pxd


cdef inline int by_address(const void *a, const void *b) noexcept nogil:
    cdef uintptr_t x = (<const Span *>a).low, y = (<const Span *>b).low
    return (x > y) - (x < y)


cdef struct Spans:
    Span *of           # by address
    ptrdiff_t n, capacity
    ptrdiff_t gap      # the last gradient lay between of[gap - 1] and of[gap]


cdef inline ptrdiff_t overlap(Spans *spans) noexcept nogil:
    """Sort; return the index of a span that overlaps the one before it, or 0.

    Spans that kept the order of the last step, as they usually do, need no sorting.
    """
    cdef ptrdiff_t i
    for i in range(1, spans.n):
        if spans.of[i].low < spans.of[i - 1].low:
            qsort(spans.of, spans.n, sizeof(Span), by_address)
            break
    for i in range(1, spans.n):
        if spans.of[i].low < spans.of[i - 1].high:
            return i
    spans.gap = 0
    return 0


cdef inline ptrdiff_t alias(Spans *spans, uintptr_t low, uintptr_t high) noexcept nogil:
    """Return the index of a span that has a byte of [low, high), or -1.

    Gradients often lie side by side: the gap in which the last one lay is tried first.
    """
    cdef ptrdiff_t a = 0, b = spans.n, middle = spans.gap
    if low == high or ((middle == 0 or spans.of[middle - 1].high <= low)
                       and (middle == b or high <= spans.of[middle].low)):
        return -1
    while a < b:  # a: the first span that begins after low
        middle = (a + b) // 2
        if spans.of[middle].low <= low:
            a = middle + 1
        else:
            b = middle
    if a > 0 and spans.of[a - 1].high > low:
        return a - 1
    if a < spans.n and spans.of[a].low < high:
        return a
    spans.gap = a
    return -1
