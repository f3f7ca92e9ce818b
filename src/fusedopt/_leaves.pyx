# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True, autotestdict=False
"""What is the same for arrays and for tensors once a leaf has pointers.

One thread at a time claims a list of leaves. No two arrays that a step writes share memory. A step
measures what it must know before the first write, sums that over ranks if asked, decides, and
commits. A border (`_arrays`, `_tensors`) adds how a leaf gets its pointers and its name.
"""
cimport cython
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject

from fusedopt._c cimport *
from fusedopt._core cimport *
from fusedopt._spans cimport Span, Spans, alias, overlap

cdef extern from *:
    """
    #define fo_exchange(flag, value) __atomic_exchange_n(flag, value, __ATOMIC_ACQ_REL)
    """
    int fo_exchange(int *flag, int value) nogil

import numpy

from fusedopt import _check, _core, _options

FORMATS = format_table()


cdef extern from "Python.h":
    ctypedef object (*newfunc)(object, object, PyObject *)
    int Py_tp_new
    void *PyType_GetSlot(object, int)

cdef object StepResult = _options.StepResult
cdef newfunc new_tuple = <newfunc>PyType_GetSlot(tuple, Py_tp_new)


cdef object step_result(number, updated, skipped, norm, factor, stats):
    """A `StepResult`, without its constructor, which is a Python function."""
    return new_tuple(StepResult, ((number, updated, skipped, norm, factor, stats),), NULL)


@cython.final
cdef class Verdict:
    """What a step decided before its first write; see `StepResult`."""


cdef Verdict decide(bint skipped, grad_norm, clip_factor):
    cdef Verdict verdict = Verdict.__new__(Verdict)
    verdict.skipped, verdict.grad_norm, verdict.clip_factor = skipped, grad_norm, clip_factor
    return verdict


cdef class LeafList:
    """The leaves of an optimizer as C sees them."""

    cdef int set_rule(self, str rule, tuple state_names) except -1:
        """Begin: a rule of the C table, and the names of its state arrays for messages."""
        self.use_row(rule)
        self.state_names = state_names
        self.writes = []
        return 0

    def use_row(self, str rule):
        """Use a row of the C table from now on; a rule may have two, see `Rule.variant`."""
        self.rule, self.scalar_names, _, kind = _core.RULES[rule]
        self.kind = <fo_kind><int>_core.KINDS.index(kind)

    def __dealloc__(self):
        free(self.leaves)
        free(self.hypers.of)
        free(self.spans.of)
        free(self.others.of)
        free(self.sums.stats)
        free(self.sums.tiles)
        free(self.kept)
        free(self.scratch)
        free(self.regions)

    # ---------------------------------------------------------------- of a border

    cdef str leaf_name(self, ptrdiff_t i):
        raise NotImplementedError

    cdef str grad_name(self, ptrdiff_t i):
        raise NotImplementedError

    cdef str copy_name(self, ptrdiff_t i):
        raise NotImplementedError

    cdef str extra_name(self, ptrdiff_t i, int place):
        """The name of what belongs to the codes at a place."""
        return self.name(i, place)

    cdef str busy(self):
        """The message for a thread that finds the list claimed."""
        return (
            "another thread is in a step of this optimizer or accumulator, or saves, loads or "
            "extends it (or this call comes from within one); use one for each thread, or a lock"
        )

    cdef bint has_grad(self, ptrdiff_t i) noexcept:
        """Whether a leaf takes part in the step."""
        return self.leaves[i].grad.data != NULL

    cdef ptrdiff_t row(self, ptrdiff_t i) noexcept:
        """The number of a leaf among all that the optimizer has, the same on each rank."""
        return i

    cdef ptrdiff_t count_rows(self) noexcept:
        return self.n

    cdef int add_direction(self, ptrdiff_t i, fo_array *to) except -1:
        """Point an array of a leaf at new memory, of the compute type, for a step's direction."""
        raise NotImplementedError

    cdef int replace(self, ptrdiff_t i) except -1:
        """Replace the direction of a leaf, which is there, in place."""
        raise NotImplementedError

    cdef bint settle(self, double first, double second) except -1:
        """Compute the constants of a step from the sums of a rule; False if it changes nothing."""
        raise NotImplementedError

    # ---------------------------------------------------------------- one thread at a time

    cdef int claim(self) except -1:
        if self.disk is not None:
            self.disk.refuse_child()
        if fo_exchange(&self.claimed, 1) != 0:
            raise RuntimeError(self.busy())
        return 0

    cdef void release(self) noexcept:
        fo_exchange(&self.claimed, 0)

    def __enter__(self):
        """Claim the list for a block; RuntimeError if another thread has it."""
        self.claim()

    def __exit__(self, kind, value, trace):
        self.release()

    # ---------------------------------------------------------------- of an accumulator

    def keep_sums(self, ptrdiff_t n):
        """Make this the list of an accumulator of n leaves, which keeps the sums of steps."""
        self.kept = <fo_stats *>grow(self.kept, n, sizeof(fo_stats))

    def drop_sums(self):
        """Stop keeping sums, since others may write to the leaves."""
        self.claim()
        free(self.kept)
        self.kept = NULL
        self.release()

    # ---------------------------------------------------------------- names and memory

    cdef str name(self, ptrdiff_t i, int place):
        """The name of one of a leaf's arrays, for messages."""
        if place == GRAD:
            return self.grad_name(i)
        if place == COPY:
            return self.copy_name(i)
        if place >= ARRAYS:
            return self.extra_name(i, place - ARRAYS)
        name = self.leaf_name(i)
        if place == PARAM:
            return name
        return f"{name}.ema" if place == EMA else f"{name}.{self.state_names[place - 1]}"

    cdef int refuse_overlap(self, Spans *spans) except -1:
        """Refuse two arrays that have a byte in common."""
        cdef ptrdiff_t i = overlap(spans)
        if i > 0:
            a, b = [self.name(spans.of[k].leaf, spans.of[k].place) for k in (i - 1, i)]
            _check.overlap(min(a, b), max(a, b))
        return 0

    cdef int refuse_alias(self, Spans *spans, ptrdiff_t i, int place) except -1:
        """Refuse an array that has a byte in common with some that the step writes."""
        cdef Span own
        if (locate(&self.leaves[i], i, place, &own)
                and alias(spans, own.low, own.high) >= 0):  # names take longer than to look
            self.refuse_bytes(self.name(i, place), own.low, own.high, spans)
        return 0

    cdef int refuse_bytes(self, str name, uintptr_t low, uintptr_t high, Spans *spans) except -1:
        """The same of bytes [low, high)."""
        cdef ptrdiff_t found = alias(spans, low, high)
        if found >= 0:
            _check.alias(name, self.name(spans.of[found].leaf, spans.of[found].place))
        return 0

    cdef int check_others(self, bint zero_grads, bint copies) except -1:
        """Refuse shared memory of what this step alone writes: copies and zeroed gradients."""
        cdef ptrdiff_t i
        cdef int place
        self.others.n = self.others.gap = 0
        if not zero_grads and not copies:
            return 0
        if self.others.capacity < 2 * self.n:
            self.others.of = <Span *>grow(self.others.of, 2 * self.n, sizeof(Span))
            self.others.capacity = 2 * self.n
        for i in range(self.n):
            for place in (GRAD, COPY):
                if (zero_grads or place == COPY) and locate(
                        &self.leaves[i], i, place, &self.others.of[self.others.n]):
                    self.others.n += 1
                    self.refuse_alias(&self.spans, i, place)
        self.refuse_overlap(&self.others)
        if not zero_grads:
            for i in range(self.n):
                self.refuse_alias(&self.others, i, GRAD)
        return 0

    # ---------------------------------------------------------------- state on disk

    cdef fo_disk *find_regions(self) except NULL:
        """Return the mapped files of state; the list must have a disk."""
        cdef ptrdiff_t i = 0
        rows = self.disk.regions()
        self.regions = <fo_region *>grow(self.regions, len(rows), sizeof(fo_region))
        for start, size, offset, file, is_read_only in rows:
            self.regions[i] = fo_region(
                start=<char *><uintptr_t>start, bytes=size, offset=offset, file=file,
                is_read_only=is_read_only, process=0)
            i += 1
        self.on_disk = fo_disk(regions=self.regions, n=i, error=0, has_written=0)
        return &self.on_disk

    cdef int use_disk(self, fo_run *how) except -1:
        """Prepare a step that streams state from disk; raise if an earlier step has lost it."""
        if self.disk is not None:
            self.disk.refuse_lost()
            how.disk = self.find_regions()
            if self.on_disk.n == 0:
                how.disk = NULL
        return 0

    cdef int check_step(self, fo_status status) except -1:
        """Raise the error that a step has returned; state may be lost then."""
        if status == FO_DISK_FAILED:
            raise self.disk.fault(self.on_disk.error, self.on_disk.has_written)
        return check(status)

    # ---------------------------------------------------------------- measure, reduce, commit

    cdef Verdict run(self, options, reduction, fo_run *how, int threads):
        """One step of the leaves, whose pointers and constants are set.

        Parameters
        ----------
        options : StepOptions
        reduction : Reduction or None
            Sums over ranks what is measured before it is used.
        how : fo_run *
            Zero, or with `has_grad` where the sums of the gradients are known.

        Returns
        -------
        Verdict
        """
        cdef Verdict verdict
        cdef fo_status status
        cdef ptrdiff_t i
        how.clip_value = options.clip_value or 0
        how.zero_grads, how.measure = options.zero_grads, <fo_measures><int>options.measure
        verdict = self.judge(options, reduction, how, threads)
        if not verdict.skipped and (
                self.kind > FO_FACTORED or (self.kind >= FO_LAYERWISE and reduction is not None)):
            if not self.direct_on_all(reduction, how, threads):
                verdict = decide(True, verdict.grad_norm, verdict.clip_factor)
        if verdict.skipped:
            if how.zero_grads:
                self.zero_gradients()
            for i in range(self.n):
                self.leaves[i].grad.data = NULL  # copies of unchanged parameters are written too
        with nogil:
            status = run_step(
                self.rule, self.leaves, self.n, self.hypers.of, self.hypers.n, how, threads)
        self.check_step(status)
        return verdict

    cdef object prepare(self, options, fo_run *how):
        """Get the memory that a step needs; return its options, None if it measures nothing.

        All memory that grows with the arrays is allocated here, before ranks agree that each can
        take the step.
        """
        cdef ptrdiff_t i, slot = len(self.state_names)
        if self.kind == FO_FACTORED:
            self.make_scratch()
        if self.kind == FO_MATRIX:
            for i in range(self.n):
                if self.leaves[i].grad.data != NULL:
                    self.add_direction(i, &self.leaves[i].state[slot])
        if options is None and self.kind > FO_FACTORED:
            options = _options.PLAIN
        if options is not None or self.kind >= FO_LAYERWISE:
            prepare_sums(&self.sums, self.leaves, self.n, how)
        return options

    cdef int make_scratch(self) except -1:
        """Give leaves with factors the memory that they need in a step."""
        cdef ptrdiff_t i
        cdef size_t size = 0
        cdef fo_shape *shape
        for i in range(self.n):
            if self.leaves[i].state[0].data != NULL:
                size += scratch_of(&self.leaves[i])
        if size > self.scratch_size:
            self.scratch, self.scratch_size = grow(self.scratch, size, 1), size
        size = 0
        for i in range(self.n):
            if self.leaves[i].state[0].data != NULL:
                shape = <fo_shape *>self.leaves[i].state[0].extra
                shape.scratch = <char *>self.scratch + size
                size += scratch_of(&self.leaves[i])
        return 0

    cdef bint direct_on_all(self, reduction, fo_run *how, int threads) except -1:
        """Replace the directions; ranks then agree again, as matrix products may raise."""
        cdef bint goes_on = True
        if reduction is None or self.kind != FO_MATRIX:
            return self.direct(reduction, how, threads)
        fault = None
        try:
            goes_on = self.direct(reduction, how, threads)
        except Exception as exc:
            fault = exc
        reduction.agree(self.count_rows(), fault, False)
        return goes_on

    cdef bint direct(self, reduction, fo_run *how, int threads) except -1:
        """Compute the directions of a rule; replace them, or sum them over ranks.

        Nothing else is written yet: an exception leaves everything as it was. False if the step
        changes nothing.
        """
        cdef fo_status status
        cdef ptrdiff_t i
        cdef bint goes_on = True
        with nogil:
            status = run_direct(
                self.rule, self.leaves, self.n, self.hypers.of, self.hypers.n, how, threads)
        self.check_step(status)
        if self.kind == FO_MATRIX:
            for i in range(self.n):
                if self.leaves[i].grad.data != NULL and self.leaves[i].n > 0:
                    self.replace(i)
        elif self.kind == FO_SUMMING:
            table = self.table()
            if reduction is not None:
                sums = reduction.terms(table)
            else:
                total = _core.total(table)
                sums = total["param"], total["update"]
            goes_on = self.settle(sums[0], sums[1])
        else:
            table = self.table()
            reduction.directions(table)
            self.take_table(table)
        how.has_direction = 1
        return goes_on

    cdef Verdict judge(self, options, reduction, fo_run *how, int threads):
        """Measure the gradients if the step must know them before it writes; scale every leaf.

        Gradients whose sums are known are always tested, unless other ranks have parts of them.
        """
        cdef fo_status status
        cdef ptrdiff_t i
        cdef double scale = options.grad_scale, factor = 1, least = 1
        for i in range(self.n):
            self.leaves[i].grad_scale = scale
        if options.skip:
            return decide(True, None, 1.0)
        if not options.must_measure and not (how.has_grad and reduction is None):
            return decide(False, None, 1.0)
        if not how.has_grad:
            how.norm_only = options.norm_only
            with nogil:
                status = run_measure(self.leaves, self.n, how, threads)
            check(status)
            how.has_grad = 1
        if reduction is None:
            total = sum_stats(self.sums.stats, self.n)
            squares, largest, nonfinite = total.grad, total.largest_grad, total.nonfinite
        else:
            table = self.table()
            squares, largest, nonfinite = reduction.gradients(
                table, self.sizes(), not options.norm_only)
            self.take_table(table)
        norm = options.norm(squares, largest)
        if nonfinite > 0 and options.nonfinite != "propagate":
            if options.nonfinite == "skip":
                return decide(True, norm, 1.0)
            _check.not_finite([
                (self.name(i, GRAD), self.sums.stats[i].nonfinite,
                 self.leaves[i].n if reduction is None else reduction.sizes[self.row(i)])
                for i in range(self.n) if self.sums.stats[i].nonfinite > 0
            ])
        if options.max_grad_norm is None:
            return decide(False, norm, 1.0)
        if not options.per_tensor:
            factor = least = options.factor(norm)
        for i in range(self.n):
            if options.per_tensor and self.leaves[i].grad.data != NULL:
                factor = options.factor(
                    options.norm(self.sums.stats[i].grad, self.sums.stats[i].largest_grad))
                if factor < least or factor != factor:  # NaN stays
                    least = factor
            self.leaves[i].grad_scale = scale * factor
        return decide(False, norm, least)

    cdef void zero_gradients(self) noexcept:
        cdef ptrdiff_t i
        cdef fo_array *grad
        for i in range(self.n):
            grad = &self.leaves[i].grad
            if grad.data != NULL:
                memset(grad.data, 0, self.leaves[i].n * FORMATS[<int>grad.format].size)

    cdef int make_writes(self) except -1:
        for write in self.writes:
            (<dict>(<tuple>write)[0])[(<tuple>write)[1]] = (<tuple>write)[2]
        return 0

    cdef object statistics(self, options, reduction):
        """What was measured, as `StepStats`."""
        cdef ptrdiff_t i
        present = [i for i in range(self.n) if self.has_grad(i)]
        names = [self.leaf_name(i) for i in present]
        if reduction is None:
            table, sizes = stats_table(&self.sums, self.n), [self.leaves[i].n for i in present]
            rows = present
        else:
            table, rows = self.table(), [self.row(i) for i in present]
            if not reduction.knows_gradients:
                reduction.gradients(table, self.sizes())
            reduction.steps(table)
            sizes = reduction.sizes[rows]
        if len(rows) < len(table):
            table = table[rows]
        return _options.StepStats(names, sizes, table, options.grad_scale)

    cdef object table(self):
        """What was measured of all leaves of the optimizer, as rows of `_core.STATS`."""
        cdef ptrdiff_t i
        rows = stats_table(&self.sums, self.n)
        table = numpy.zeros(self.count_rows(), _core.STATS)
        table[[self.row(i) for i in range(self.n)]] = rows
        return table

    cdef object sizes(self):
        """Elements of all leaves of the optimizer, of those with a gradient."""
        cdef ptrdiff_t i
        sizes = numpy.zeros(self.count_rows(), numpy.int64)
        for i in range(self.n):
            if self.has_grad(i):
                sizes[self.row(i)] = self.leaves[i].n
        return sizes

    cdef int take_table(self, table) except -1:
        """Take over such a table."""
        cdef Py_buffer view
        cdef ptrdiff_t i
        rows = numpy.ascontiguousarray(table[[self.row(i) for i in range(self.n)]])
        PyObject_GetBuffer(rows.view(numpy.uint8), &view, PyBUF_SIMPLE)
        memcpy(self.sums.stats, view.buf, self.n * sizeof(fo_stats))
        PyBuffer_Release(&view)
        return 0
