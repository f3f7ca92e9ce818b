# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True, autotestdict=False
"""The border for arrays: they become pointers, a C status becomes an exception.

What is usual (a plain array of the right dtype and layout) is checked here, in C, without a
Python call; what is not is handed to `_check`, which explains the fault or returns an array that
will do. So every rule about input is written once, in `_check`, and this file holds only its fast
side.
"""
cimport cython
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memmove, memset

from cpython.buffer cimport (
    PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next, PyDict_Size
from cpython.list cimport PyList_GetItem, PyList_Size
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

from fusedopt import _check, _core, formats as _formats
from fusedopt.formats import Stored

cdef object ndarray = numpy.ndarray
cdef object float32 = numpy.dtype(numpy.float32)
cdef object float64 = numpy.dtype(numpy.float64)
cdef object float16 = numpy.dtype(numpy.float16)
cdef object bfloat16 = None  # the dtype of ml_dtypes, once an array of it was seen

cdef list FORMAT_NAMES = list(_formats.FORMATS)  # in the order of the C table


cdef inline int format_of(object array) except? -1:
    """The storage format of a plain array; -1 if it is for `_check` to judge."""
    if type(array) is not ndarray:
        return -1
    dtype = array.dtype
    if dtype is float32:
        return FO_F32
    if dtype is float64:
        return FO_F64
    if dtype is float16:
        return FO_F16
    return FO_BF16 if dtype is bfloat16 and bfloat16 is not None else -1


cdef int checked_format(object array) except? -1:
    """The storage format of an array that `_check` has passed: any equal dtype, any class."""
    global bfloat16
    dtype = array.dtype
    if dtype == float32:
        return FO_F32
    if dtype == float64:
        return FO_F64
    if dtype == float16:
        return FO_F16
    bfloat16 = dtype
    return FO_BF16


cdef bint same_layout(const Py_buffer *a, const Py_buffer *b) noexcept:
    """Whether element i of both, in memory order, has the same index."""
    cdef int k
    if a.ndim != b.ndim:
        return False
    for k in range(a.ndim):
        if a.shape[k] != b.shape[k]:
            return False
    for k in range(a.ndim):
        if a.shape[k] > 1 and a.strides[k] // a.itemsize != b.strides[k] // b.itemsize:
            return a.len == 0
    return True


cdef bint has_same_items(dict container, dict before) except -1:
    """Whether a dict has the same objects under the same keys as before."""
    cdef Py_ssize_t at = 0, other = 0
    cdef PyObject *key
    cdef PyObject *value
    cdef PyObject *other_key
    cdef PyObject *now
    if PyDict_Size(container) != PyDict_Size(before):
        return False
    while PyDict_Next(before, &at, &key, &value):
        # usually the entries follow one another as they did, which saves the search
        if not PyDict_Next(container, &other, &other_key, &now) or other_key != key:
            now = PyDict_GetItemWithError(container, <object>key)
        if now != value:
            return False
    return True


cdef bint has_same_values(object container, list before) except -1:
    """Whether a list or dict has the same objects in it as before, in the same order."""
    cdef Py_ssize_t i = 0, at = 0
    cdef PyObject *key
    cdef PyObject *value
    if isinstance(container, list):
        if PyList_Size(container) != PyList_Size(before):
            return False
        for i in range(PyList_Size(before)):
            if PyList_GetItem(container, i) != PyList_GetItem(before, i):
                return False
        return True
    if PyDict_Size(container) != PyList_Size(before):
        return False
    while PyDict_Next(container, &at, &key, &value):
        if value != PyList_GetItem(before, i):
            return False
        i += 1
    return True


def are_settled(param_groups, list groups):
    """Whether nothing of an optimizer's groups, `_groups.Group`, need be looked at for a step."""
    cdef Py_ssize_t i
    if type(param_groups) is not list or len(<list>param_groups) != len(groups):
        return False
    for i in range(len(groups)):
        group, given = groups[i], (<list>param_groups)[i]
        seen = group.seen
        if seen is None or type(given) is not dict or len(<dict>given) != len(<dict>seen):
            return False
        if not has_same_items(<dict>given, <dict>seen):
            return False
        for node in <list?>group.nodes:
            if not has_same_values((<tuple?>node)[1], (<tuple>node)[2]):
                return False
    return True


def find_none(values, grads):
    """Index of the first of some states that is None where the gradient is not; -1 if none."""
    cdef Py_ssize_t i = -1
    for value in values:
        i += 1
        if value is None and grads[i] is not None:
            return i
    return -1


cdef enum:
    EMA = 5    # slot of a leaf's average
    SLOTS = 6  # of a leaf's written arrays: the parameter, FO_MAX_STATES states, the average
    GRAD, COPY  # of what is written in some steps only

cdef struct Held:
    # what the binding knows of a leaf beside fo_leaf; views stay exported while it lives
    Py_buffer views[12]  # the data of each slot, then the extra of each
    Py_buffer grad, copy  # exported during a step only
    bint noisy           # whether a store rounds stochastically, so that the leaf needs a key
    int64_t step         # steps that this leaf has taken
    int group


cdef class ArrayList:
    """The leaves of an optimizer as C sees them, with what must be held so that they stay valid.

    Parameters
    ----------
    rule : str
        Name of a rule of the C table.
    state_names : tuple of str
        Names of the rule's state arrays, for messages. Behind the rule's own a leaf may have one
        more, its running average.
    """
    cdef int rule, rule_states
    cdef bint layerwise
    cdef tuple state_names
    cdef list scalar_names
    cdef readonly list names
    cdef readonly list params  # arrays as the caller sees them
    cdef readonly list stored  # the same, as arrays or `Stored`
    cdef readonly list states  # of each leaf, arrays or `Stored` or None
    cdef list grad_names
    cdef ptrdiff_t n
    cdef fo_leaf *leaves
    cdef Held *held
    cdef Hypers hypers
    cdef Spans spans          # of all held arrays
    cdef Spans others         # of what else a step writes
    cdef Sums sums            # of the leaves, where a step measures
    cdef fo_stats *kept       # of an accumulator: what was measured of each leaf, or NULL
    cdef readonly object count  # steps of the whole list, a Python int
    cdef public list writes   # (dict, key, value): what a step that succeeds writes, keys it has
    cdef int claimed          # 1 while a thread has the list; exchanged atomically
    cdef bint swapped         # whether `Swap` has it

    def __cinit__(self, str rule, tuple state_names):
        self.rule, self.scalar_names, self.rule_states, self.layerwise = _core.RULES[rule]
        self.state_names = state_names
        self.names, self.grad_names, self.states = [], [], []
        self.params, self.stored, self.writes = [], [], []
        self.count = 0

    def __dealloc__(self):
        cdef ptrdiff_t i
        for i in range(self.n):
            release(&self.held[i])
        free(self.leaves)
        free(self.held)
        free(self.hypers.of)
        free(self.spans.of)
        free(self.others.of)
        free(self.sums.stats)
        free(self.sums.tiles)
        free(self.kept)

    def __len__(self):
        return self.n

    cdef int claim(self) except -1:
        if fo_exchange(&self.claimed, 1) != 0:
            if self.swapped:
                raise RuntimeError(
                    "the averages are in the place of the parameters: leave the block of swap_ema "
                    "first, which puts the parameters back"
                )
            raise RuntimeError(
                "another thread is in a step of this optimizer or accumulator, or saves, loads or "
                "extends it (or this call comes from within one); use one for each thread, or a "
                "lock"
            )
        return 0

    cdef void release(self) noexcept:
        fo_exchange(&self.claimed, 0)

    def __enter__(self):
        """Claim the list for a block; RuntimeError if another thread has it."""
        self.claim()

    def __exit__(self, kind, value, trace):
        self.release()

    def add(self, list names, list grad_names, list params, list states, int group, bint zero,
            int threads, begin=None):
        """Add leaves, all or none: check and export every array, then zero the state if asked.

        `begin`, called without arguments behind that, writes what state begins as otherwise.
        """
        cdef ptrdiff_t i, old = self.n, total = old + len(names)
        self.leaves = <fo_leaf *>grow(self.leaves, total, sizeof(fo_leaf))
        self.held = <Held *>grow(self.held, total, sizeof(Held))
        self.spans.of = <Span *>grow(self.spans.of, total * 2 * SLOTS, sizeof(Span))
        memset(&self.leaves[old], 0, (total - old) * sizeof(fo_leaf))
        memset(&self.held[old], 0, (total - old) * sizeof(Held))
        try:
            for i in range(total - old):
                self.n += 1
                self.leaves[self.n - 1].grad_scale = 1
                self.names.append(names[i])
                self.grad_names.append(grad_names[i])
                self.states.append(list(states[i]))
                self.export(self.n - 1, params[i], group)
            self.collect_spans()
            if zero:
                with nogil:
                    zero_state(&self.leaves[old], total - old, threads)
            if begin is not None:
                begin()
        except BaseException:
            for i in range(old, self.n):
                release(&self.held[i])
            self.n = old
            for column in (self.names, self.grad_names, self.params, self.stored, self.states):
                del column[old:]
            self.collect_spans()
            raise

    cdef int export(self, ptrdiff_t i, object param, int group) except -1:
        """Export a leaf's parameter, and of its state what is there."""
        cdef fo_leaf *leaf = &self.leaves[i]
        cdef Held *held = &self.held[i]
        cdef list states = self.states[i]
        cdef int k
        self.export_slot(i, 0, &leaf.param, param)
        leaf.n = held.views[0].len // held.views[0].itemsize
        held.group = group
        for k in range(len(states)):
            if states[k] is None:
                continue
            if k == self.rule_states:
                states[k] = self.export_slot(i, EMA, &leaf.ema, states[k])
            else:
                states[k] = self.export_slot(i, 1 + k, &leaf.state[k], states[k])
        return 0

    cdef object export_slot(self, ptrdiff_t i, int slot, fo_array *to, object value):
        """Export a parameter (slot 0), or state of one; return it as kept: an array, or `Stored`.
        """
        cdef Held *held = &self.held[i]
        cdef Py_buffer *data = &held.views[slot]
        cdef Py_buffer *extra = &held.views[SLOTS + slot]
        cdef int format = format_of(value)
        if slot != 0 and (format == FO_F64) != (self.leaves[i].param.format == FO_F64):
            format = -1
        if format != FO_F32 and format != FO_F64:
            name = self.name(i, slot)
            value = _check.parameter(name, value) if slot == 0 else (
                _check.state(name, value, self.params[i]))
            format = FORMAT_NAMES.index(value.format) if isinstance(value, Stored) else (
                checked_format(value))
        array = value.data if isinstance(value, Stored) else value
        if slot == 0:
            self.params.append(array)
            self.stored.append(value)
        self.export_array(i, slot, array, data)
        if slot != 0 and not same_layout(data, &held.views[0]):
            _check.state(self.name(i, slot), value, self.params[i])
        to.data, to.format = data.buf, <fo_format>format
        if isinstance(value, Stored) and value.extra is not None:
            self.export_array(i, slot, value.extra, extra)
            to.extra = extra.buf
        held.noisy = held.noisy or is_stochastic(format)
        return value

    cdef int export_array(self, ptrdiff_t i, int slot, object array, Py_buffer *view) except -1:
        """Export an array that steps write to."""
        try:
            PyObject_GetBuffer(array, view, PyBUF_STRIDES | PyBUF_WRITABLE)
        except (BufferError, ValueError):  # NumPy raises the second for read-only
            _check.writable(self.name(i, slot), array)
            raise
        if not PyBuffer_IsContiguous(view, b"A"):
            _check.writable(self.name(i, slot), array)
        return 0

    cdef int collect_spans(self) except -1:
        """List the memory of all held arrays, of which no two may have a byte in common."""
        cdef ptrdiff_t i
        cdef int k
        cdef Py_buffer *view
        cdef Span *span
        self.spans.n = 0
        for i in range(self.n):
            for k in range(2 * SLOTS):
                view = &self.held[i].views[k]
                if <void *>view.obj != NULL and view.len > 0:
                    span = &self.spans.of[self.spans.n]
                    span.low = <uintptr_t>view.buf
                    span.high = span.low + view.len
                    span.leaf, span.slot = i, k % SLOTS
                    self.spans.n += 1
        return self.refuse_overlap(&self.spans)

    cdef int refuse_overlap(self, Spans *spans) except -1:
        """Let no two arrays have a byte in common."""
        cdef ptrdiff_t i = overlap(spans)
        if i > 0:
            a, b = self.span_name(&spans.of[i - 1]), self.span_name(&spans.of[i])
            _check.overlap(min(a, b), max(a, b))
        return 0

    cdef int refuse_alias(self, Spans *spans, ptrdiff_t i, int slot, Py_buffer *view) except -1:
        """Let an array have no byte in common with some."""
        cdef uintptr_t low = <uintptr_t>view.buf
        cdef ptrdiff_t found = alias(spans, low, low + view.len)
        if found >= 0:
            _check.alias(self.name(i, slot), self.span_name(&spans.of[found]))
        return 0

    cdef str span_name(self, Span *span):
        return self.name(span.leaf, span.slot)

    cdef str name(self, ptrdiff_t i, int slot):
        """The name of one of a leaf's arrays, for messages."""
        if slot == GRAD:
            return self.grad_names[i]
        if slot == COPY:
            return "copy_out" + self.grad_names[i].removeprefix("grads")
        if slot == EMA:
            return f"{self.names[i]}.ema"
        return self.names[i] if slot == 0 else f"{self.names[i]}.{self.state_names[slot - 1]}"

    cdef int take_gradient(self, ptrdiff_t i, object grad) except -1:
        cdef Held *held = &self.held[i]
        cdef fo_leaf *leaf = &self.leaves[i]
        cdef int format = format_of(grad)
        if format >= 0:
            PyObject_GetBuffer(grad, &held.grad, PyBUF_STRIDES)
            if not same_layout(&held.grad, &held.views[0]):
                PyBuffer_Release(&held.grad)
                format = -1
        if format < 0:
            grad = _check.gradient(self.grad_names[i], grad, self.params[i])
            PyObject_GetBuffer(grad, &held.grad, PyBUF_STRIDES)
            format = checked_format(grad)
        leaf.grad.data = held.grad.buf
        leaf.grad.format = <fo_format>format
        return self.refuse_alias(&self.spans, i, GRAD, &held.grad)

    cdef ptrdiff_t constants(self, dict seen, int group, object step, object hyper,
                             list options) except -1:
        """Index of the constants of a group at a step; computed once per step of the list."""
        cdef dict values
        index = seen.get((group, step))
        if index is None:
            values = hyper(step, options[group])
            index = seen[(group, step)] = add_constants(&self.hypers, self.scalar_names, values)
        return index

    # -------------------------------------------------------------- around the rule

    cdef int take_others(self, list grads, around) except -1:
        """Export what this step alone writes: copies, and gradients that it zeroes.

        Copies of leaves without a gradient too: those of a step that changes nothing are as good.
        """
        cdef ptrdiff_t i
        cdef list copies = around.copy_out
        self.others.n = 0
        if copies is None and not around.zero_grads:
            return 0
        self.others.of = <Span *>grow(self.others.of, 2 * self.n, sizeof(Span))
        for i in range(self.n):
            if copies is not None and copies[i] is not None:
                copy = _check.copy_target(self.name(i, COPY), copies[i], self.params[i])
                self.export_array(i, COPY, copy, &self.held[i].copy)
                self.leaves[i].copy.data = self.held[i].copy.buf
                self.leaves[i].copy.format = <fo_format>checked_format(copy)
                self.add_other(i, COPY, &self.held[i].copy)
            if around.zero_grads and grads[i] is not None:
                _check.zeroed(self.grad_names[i], grads[i], self.params[i])
                self.add_other(i, GRAD, &self.held[i].grad)
        self.refuse_overlap(&self.others)
        for i in range(self.n):
            if grads[i] is not None and not around.zero_grads:
                self.refuse_alias(&self.others, i, GRAD, &self.held[i].grad)
        return 0

    cdef int add_other(self, ptrdiff_t i, int slot, Py_buffer *view) except -1:
        cdef Span *span = &self.others.of[self.others.n]
        if view.len > 0:
            span.low = <uintptr_t>view.buf
            span.high = span.low + view.len
            span.leaf, span.slot = i, slot
            self.others.n += 1
            self.refuse_alias(&self.spans, i, slot, view)
        return 0

    cdef object judge(self, list grads, around, plain, ArrayList source, fo_run *how, int threads):
        """Measure the gradients, where this step must know them before it writes.

        `source`, an accumulator's list, may know them. Sets the scale of every leaf. Returns
        whether to skip the step, the norm or None, and the factor of the clip.
        """
        cdef ptrdiff_t i
        cdef fo_status status
        cdef double scale = around.grad_scale, factor = 1, least = 1
        cdef fo_stats total
        if source is not None and source.knows(grads):
            for i in range(self.n):
                if grads[i] is not None:
                    self.sums.stats[i] = source.kept[i]
        elif not around.must_measure:
            return False, None, 1.0
        elif plain is not None:
            for i in range(self.n):
                if grads[i] is not None:
                    read_grad(plain._plain_sums(i, grads[i]), &self.sums.stats[i])
        else:
            how.norm_only = around.norm_only
            with nogil:
                status = run_measure(self.leaves, self.n, how, threads)
            check(status)
        how.has_grad = 1
        total = sum_stats(self.sums.stats, self.n)
        norm = around.norm(total.grad, total.largest_grad)
        if total.nonfinite > 0 and around.nonfinite != "propagate":
            if around.nonfinite == "skip":
                return True, norm, 1.0
            _check.not_finite([
                (self.grad_names[i], self.sums.stats[i].nonfinite, self.leaves[i].n)
                for i in range(self.n) if self.sums.stats[i].nonfinite > 0
            ])
        if around.max_grad_norm is None:
            return False, norm, 1.0
        if not around.per_tensor:
            factor = least = around.factor(norm)
        for i in range(self.n):
            if around.per_tensor:
                factor = around.factor(
                    around.norm(self.sums.stats[i].grad, self.sums.stats[i].largest_grad))
                least = factor if not factor >= least else least
            self.leaves[i].grad_scale = scale * factor
        return False, norm, least

    cdef int zero_gradients(self, list grads) except -1:
        cdef ptrdiff_t i
        for i in range(self.n):
            if grads[i] is not None:
                memset(self.held[i].grad.buf, 0, self.held[i].grad.len)
        return 0

    cdef object read_stats(self, list grads):
        """Numbers of the leaves with a gradient, and their sums as rows of `_core.STATS`."""
        table = stats_table(&self.sums, self.n)
        if all([grad is not None for grad in grads]):
            return range(self.n), table
        present = [i for i in range(self.n) if grads[i] is not None]
        return present, table[present]

    def step(self, prepare, grads, hyper, int threads, plain=None, around=None,
             ArrayList source=None):
        """One step of all leaves that have a gradient; either all of it happens or none.

        The list is claimed for the whole call, that of `prepare` included: here, where no signal's
        exception can fall between the claim and the block that ends it.

        Parameters
        ----------
        prepare : callable(grads) -> (list of array or None, list of dict)
            A gradient for each leaf, None leaves it out; and the options of each group. May set
            `writes`, which are made with the last of the step's, behind all that can fail.
        grads
            What `prepare` gets.
        hyper : callable(step, options) -> dict
            The constants of a step by name: see `Rule.hyper`.
        threads : int
        plain : reference.Plain, optional
            Does the arithmetic in the place of C, after the same checks.
        around : Around, optional
            What the step shall do around the rule.
        source : ArrayList, optional
            Of an accumulator whose sums are the gradients: claimed as well, and empty afterwards.

        Returns
        -------
        int, int
            Steps of the list, this one included; leaves updated.
        tuple, optional
            With `around`: whether the step was skipped, the gradients' norm or None, the factor of
            the clip, and None or the statistics: numbers of leaves and their table.

        Raises
        ------
        RuntimeError
            If another thread has the list.
        """
        cdef fo_mode before
        self.claim()
        before = fo_enter_ieee()
        try:
            if source is not None:
                source.claim()
            try:
                gradients, options = prepare(grads)
                return self.run(gradients, hyper, options, threads, plain, around, source)
            finally:
                if source is not None:
                    source.release()
        finally:
            fo_leave_ieee(before)
            self.release()

    cdef tuple run(self, list grads, hyper, list options, int threads, plain, around,
                   ArrayList source):
        cdef ptrdiff_t i, n = self.n, updated = 0, index = 0
        cdef int group = -1
        cdef int64_t step = -1
        cdef fo_status status
        cdef fo_run how
        cdef double scale = 1
        cdef dict seen = {}
        cdef bint skipped = False
        if len(grads) != n:
            raise ValueError(f"grads: {len(grads)} arrays for {n} parameters")
        self.hypers.n = 0
        memset(&how, 0, sizeof(how))
        if around is not None:
            scale, how.clip_value = around.grad_scale, around.clip_value or 0
            how.zero_grads, how.measure = around.zero_grads, <fo_measures><int>around.measure
        try:
            for i in range(n):
                grad = grads[i]
                if grad is None:
                    self.leaves[i].grad.data = NULL
                    continue
                self.take_gradient(i, grad)
                updated += 1
                if self.held[i].group != group or self.held[i].step != step:
                    group, step = self.held[i].group, self.held[i].step
                    index = self.constants(seen, group, step + 1, hyper, options)
                self.leaves[i].hyper = index
                self.leaves[i].grad_scale = scale
                if self.held[i].noisy:
                    self.leaves[i].key = noise_key(options[group]["seed"], i, step + 1)
            if around is not None or self.layerwise:
                make_room(&self.sums, self.leaves, self.n, &how)
            if around is not None:
                self.take_others(grads, around)
                skipped, norm, factor = self.judge(grads, around, plain, source, &how, threads)
            number = self.count + (not skipped)  # an object: no memory may run out behind writes
            if skipped:
                for i in range(n):
                    self.leaves[i].grad.data = NULL
            if plain is None:
                with nogil:
                    status = run_step(
                        self.rule, self.leaves, n, self.hypers.of, self.hypers.n, &how, threads)
                check(status)
            else:
                for i in range(n):
                    self.step_plainly(
                        plain, i, None if skipped else grads[i], around, how.has_grad)
            if how.zero_grads and (skipped or plain is not None):
                self.zero_gradients(grads)
            if source is not None:
                source.forget()
            if skipped:
                return number, 0, (True, norm, factor, None)
            for i in range(n):
                if grads[i] is not None:
                    self.held[i].step += 1
                    if self.kept != NULL:
                        self.kept[i] = self.sums.stats[i]
            self.count = number
            for write in self.writes:
                (<dict>(<tuple>write)[0])[(<tuple>write)[1]] = (<tuple>write)[2]
            if around is None:
                return number, updated
            return number, updated, (
                False, norm, factor, self.read_stats(grads) if around.measure else None)
        finally:
            for i in range(n):
                if <void *>self.held[i].grad.obj != NULL:
                    PyBuffer_Release(&self.held[i].grad)
                if <void *>self.held[i].copy.obj != NULL:
                    PyBuffer_Release(&self.held[i].copy)
                    self.leaves[i].copy.data = NULL

    cdef int step_plainly(self, plain, ptrdiff_t i, grad, around, bint has_grad) except -1:
        copy = None if around is None or around.copy_out is None else around.copy_out[i]
        if grad is None:
            if copy is not None:
                plain._plain_copy(i, copy)
            return 0
        sums = plain._plain_step(i, grad, self.held[i].step + 1, self.leaves[i].grad_scale, around,
                                 copy)
        if sums is not None:
            if not has_grad:
                read_grad(sums[0], &self.sums.stats[i])
            read_step(sums[1], &self.sums.stats[i])
        return 0

    def stream(self, list grads, int threads):
        """Move the bytes of a step without its arithmetic; changes every array it writes."""
        cdef ptrdiff_t i
        try:
            for i in range(self.n):
                self.take_gradient(i, grads[i])
            with nogil:
                run_stream(self.leaves, self.n, threads)
        finally:
            for i in range(self.n):
                if <void *>self.held[i].grad.obj != NULL:
                    PyBuffer_Release(&self.held[i].grad)

    def keep_sums(self):
        """Be the list of an accumulator: keep what is measured of each leaf from step to step."""
        self.kept = <fo_stats *>grow(self.kept, self.n, sizeof(fo_stats))

    def drop_sums(self):
        """Keep it no more, since others may write to the leaves."""
        self.claim()
        free(self.kept)
        self.kept = NULL
        self.release()

    cdef bint knows(self, list grads) noexcept:
        """Whether the sums of these gradients are kept: they are the leaves, in the same order."""
        cdef ptrdiff_t i
        if self.kept == NULL or self.n != len(grads):
            return False
        for i in range(self.n):
            if grads[i] is not None and grads[i] is not self.params[i]:
                return False
        return True

    cdef void forget(self) noexcept:
        """Start anew, on leaves that are zero."""
        cdef ptrdiff_t i
        self.count = 0
        for i in range(self.n):
            self.held[i].step = 0

    def clear(self):
        """Set the leaves to zero, and start anew."""
        cdef ptrdiff_t i
        self.claim()
        for i in range(self.n):
            memset(self.held[i].views[0].buf, 0, self.held[i].views[0].len)
        self.forget()
        self.release()

    def use_states(self, ptrdiff_t i, tuple used):
        """Hide from C the state arrays that the leaf's options do not ask for."""
        cdef int k
        for k in range(self.rule_states):
            self.leaves[i].state[k].data = self.held[i].views[1 + k].buf if used[k] else NULL

    def get_step(self, ptrdiff_t i):
        """Steps that leaf i has taken."""
        return self.held[i].step

    def set_steps(self, count, list steps):
        """Set the number of steps of the list and of each leaf."""
        cdef ptrdiff_t i
        self.count = count
        for i in range(self.n):
            self.held[i].step = steps[i]

    def restore(self, list pairs, count, list steps, list groups, list options):
        """Take over a checkpoint: all of it or, where this raises, none.

        One call, so that no signal's exception and no want of memory can fall between its writes:
        all that can fail comes before them.

        Parameters
        ----------
        pairs : list of (array, array)
            One of the list's arrays, and one whose bytes it gets: as many, in the same order.
        count, steps
            See `set_steps`.
        groups, options : list of dict
            Each of the first, checked to be dicts, is updated by its neighbour in the second.
        """
        cdef ptrdiff_t i, n = len(pairs)
        cdef Py_buffer *views = <Py_buffer *>grow(NULL, 2 * n, sizeof(Py_buffer))
        cdef int64_t *numbers = NULL
        memset(views, 0, 2 * n * sizeof(Py_buffer))
        try:
            numbers = <int64_t *>grow(NULL, self.n, sizeof(int64_t))
            for i in range(self.n):
                numbers[i] = steps[i]
            for i in range(n):
                self.export_pair(pairs[i][0], pairs[i][1], &views[2 * i], &views[2 * i + 1])
            for i in range(len(groups)):
                dict.update(groups[i], options[i])
            for i in range(n):
                memmove(views[2 * i].buf, views[2 * i + 1].buf, views[2 * i].len)
            self.count = count
            for i in range(self.n):
                self.held[i].step = numbers[i]
        finally:
            for i in range(2 * n):
                if <void *>views[i].obj != NULL:
                    PyBuffer_Release(&views[i])
            free(views)
            free(numbers)

    cdef int export_pair(self, object to, object source, Py_buffer *to_view,
                         Py_buffer *view) except -1:
        cdef uintptr_t low
        PyObject_GetBuffer(to, to_view, PyBUF_STRIDES | PyBUF_WRITABLE)
        PyObject_GetBuffer(source, view, PyBUF_STRIDES)
        low = <uintptr_t>view.buf
        if view.buf != to_view.buf and alias(&self.spans, low, low + view.len) >= 0:
            PyBuffer_Release(view)  # another of the list's own, which this call may write first
            PyObject_GetBuffer(source.copy(order="K"), view, PyBUF_STRIDES)
        if view.len != to_view.len or not same_layout(to_view, view):
            raise SystemError("fusedopt: arrays of a checkpoint do not fit; please report")
        return 0


@cython.no_gc_clear
cdef class Swap:
    """Shows other values in the place of a list's parameters for a ``with`` block.

    Claims the list for the block. What is exchanged is exchanged in one call, which no signal's
    exception can interrupt; and if one comes between `__enter__` and the block, the parameters
    are put back as this object goes.

    Parameters
    ----------
    leaves : ArrayList
    show : callable() -> list of array or None
        What each parameter shall show, in its layout and dtype; None leaves it as it is.
    """
    cdef ArrayList leaves
    cdef object show
    cdef char **kept      # of each parameter that was exchanged, its bytes; NULL outside a block
    cdef bint active

    def __cinit__(self, ArrayList leaves not None, show):
        self.leaves, self.show = leaves, show

    def __enter__(self):
        self.leaves.claim()
        try:
            self.exchange(self.show())
        except BaseException:
            self.leaves.release()
            raise
        self.active = self.leaves.swapped = True

    def __exit__(self, kind, value, trace):
        self.put_back()

    def __dealloc__(self):
        self.put_back()

    cdef int exchange(self, list shown) except -1:
        cdef ArrayList leaves = self.leaves
        cdef ptrdiff_t i, n = leaves.n
        cdef Py_buffer *views = <Py_buffer *>grow(NULL, n, sizeof(Py_buffer))
        cdef Py_buffer *own
        memset(views, 0, n * sizeof(Py_buffer))
        try:
            self.kept = <char **>grow(NULL, n, sizeof(char *))
            memset(self.kept, 0, n * sizeof(char *))
            for i in range(n):
                if shown[i] is not None:
                    own = &leaves.held[i].views[0]
                    PyObject_GetBuffer(shown[i], &views[i], PyBUF_STRIDES)
                    if views[i].len != own.len or not same_layout(&views[i], own):
                        raise SystemError("fusedopt: an average does not fit; please report")
                    self.kept[i] = <char *>grow(NULL, own.len, 1)
            for i in range(n):  # from here on nothing fails
                if self.kept[i] != NULL:
                    own = &leaves.held[i].views[0]
                    memmove(self.kept[i], own.buf, own.len)
                    memmove(own.buf, views[i].buf, own.len)
        except BaseException:
            self.drop()
            raise
        finally:
            for i in range(n):
                if <void *>views[i].obj != NULL:
                    PyBuffer_Release(&views[i])
            free(views)
        return 0

    cdef void put_back(self) noexcept:
        cdef ptrdiff_t i
        if self.active:
            for i in range(self.leaves.n):
                if self.kept[i] != NULL:
                    memmove(self.leaves.held[i].views[0].buf, self.kept[i],
                            self.leaves.held[i].views[0].len)
            self.drop()
            self.active = self.leaves.swapped = False
            self.leaves.release()

    cdef void drop(self) noexcept:
        cdef ptrdiff_t i
        if self.kept != NULL:
            for i in range(self.leaves.n):
                free(self.kept[i])
            free(self.kept)
            self.kept = NULL


cdef int read_grad(object values, fo_stats *to) except -1:
    to.grad, to.largest_grad, to.zeros, to.nonfinite = values
    return 0


cdef int read_step(object values, fo_stats *to) except -1:
    to.param, to.update, to.largest_update = values
    return 0


cdef void release(Held *held) noexcept:
    cdef int k
    for k in range(2 * SLOTS):
        if <void *>held.views[k].obj != NULL:
            PyBuffer_Release(&held.views[k])
