# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True, autotestdict=False
"""The border for arrays: how they become the leaves of a step.

Usual input (an ordinary array of the right dtype and layout) is checked here, in C, without a
Python call; all other input goes to `_check`, which explains the fault or returns an array that a
step can use. So every check of input is written once, in `_check`; this file has its fast path
alone.
"""
cimport cython
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memmove, memset

from cpython.buffer cimport (
    PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next, PyDict_Size
from cpython.list cimport PyList_GetItem, PyList_Size
from cpython.object cimport PyObject

from fusedopt._c cimport *
from fusedopt._core cimport *
from fusedopt._layout cimport Axes, axes_of_buffer, is_dense, same_order, same_shape
from fusedopt._leaves cimport (
    ARRAYS, COPY, EMA, FORMATS, GRAD, PARAM, LeafList, Verdict, array_at, locate, step_result,
)
from fusedopt._spans cimport Span, Spans, alias

import numpy

from fusedopt import _check, _options, _rows, formats as _formats, rule as _rule
from fusedopt.formats import Stored

cdef extern from "Python.h":
    ctypedef object (*descrgetfunc)(object, object, object)
    int Py_tp_descr_get
    void *PyType_GetSlot(object, int)

cdef object ndarray = numpy.ndarray
cdef object dtype_attribute = ndarray.dtype
cdef descrgetfunc get_attribute = <descrgetfunc>PyType_GetSlot(
    type(dtype_attribute), Py_tp_descr_get)
cdef object float32 = numpy.dtype(numpy.float32)
cdef object float64 = numpy.dtype(numpy.float64)
cdef object float16 = numpy.dtype(numpy.float16)
cdef object Rows = _rows.Rows
cdef int COUNTS = _rule.COUNTS
cdef object bfloat16 = None  # the dtype of ml_dtypes, once an array of it was seen

cdef list FORMAT_NAMES = list(_formats.FORMATS)  # in the order of the C table


cdef inline int format_of(object array) except? -1:
    """The storage format of an array of a usual class and dtype; -1 if `_check` must look."""
    if type(array) is not ndarray:
        return -1
    dtype = get_attribute(dtype_attribute, array, ndarray)  # not searched for in each step
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
    cdef Axes axes = axes_of_buffer(a), other = axes_of_buffer(b)
    return same_shape(&axes, &other) and same_order(&axes, &other)


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


cdef bint has_same_values(object container, object before) except -1:
    """Whether a list or dict has the same objects in the same places as before."""
    cdef Py_ssize_t i
    if isinstance(container, dict):
        return has_same_items(<dict>container, <dict>before)
    if PyList_Size(container) != PyList_Size(before):
        return False
    for i in range(PyList_Size(before)):
        if PyList_GetItem(container, i) != PyList_GetItem(before, i):
            return False
    return True


cdef list read_gradients(owner, grads):
    """What `Optimizer._flatten` returns."""
    reader = owner._reader
    if reader is None:
        return owner._flatten(grads, "grads")
    return (<Reader?>reader).read("grads", grads)


cpdef bint are_settled(param_groups, list groups) except -1:
    """Whether the groups of an optimizer, `_groups.Group`, are as in the last step."""
    cdef Py_ssize_t i
    if type(param_groups) is not list or len(<list>param_groups) != len(groups):
        return False
    for i in range(len(groups)):
        if i >= len(<list>param_groups):  # which a key that compared itself has made shorter
            return False
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


@cython.final
cdef class Reader:
    """Reads the leaves of what is nested like some tree, in its order: see `_tree.reader`.

    Parameters
    ----------
    keys : tuple or None
        Of a dict; None stands for a list, a tuple or a leaf.
    parts : list of Reader, or None
        Of the entries; None of a leaf.
    """
    cdef tuple keys
    cdef list parts
    cdef Py_ssize_t n
    cdef bint is_flat  # whether all entries are leaves

    def __cinit__(self, tuple keys, list parts):
        self.keys, self.parts = keys, parts
        self.n = 0 if parts is None else len(parts)
        self.is_flat = parts is not None and all([(<Reader?>part).parts is None for part in parts])

    cpdef list read(self, str name, other):
        """The leaves of a tree of this name; None in the place of a part stands for all of its."""
        cdef Py_ssize_t i
        cdef list values, out = []
        if self.parts is None:
            return [other]  # _check tests whether it is an array
        if other is None:
            values = [None] * self.n
        else:
            values = self.items(name, other) if self.keys is None else self.values(name, other)
        if self.is_flat:
            return values
        for i in range(self.n):
            place = i if self.keys is None else self.keys[i]
            out += (<Reader>self.parts[i]).read(f"{name}[{place!r}]", values[i])
        return out

    cdef list items(self, str name, other):
        if not isinstance(other, (list, tuple)):
            raise ValueError(f"{name}: expected a list as in params, got {type(other).__name__}")
        cdef list values = list(other)
        if len(values) != self.n:  # not of `other`: the length of a subclass may be another
            raise ValueError(f"{name}: {len(values)} entries for {self.n} in params")
        return values

    cdef list values(self, str name, other):
        cdef Py_ssize_t at = 0
        cdef PyObject *value
        cdef list found = []
        if not isinstance(other, dict):
            raise ValueError(f"{name}: expected a dict as in params, got {type(other).__name__}")
        if len(other) == self.n:
            for key in self.keys:
                if type(other) is dict:
                    value = entry(other, key, &at)
                    if value == NULL:
                        break
                    found.append(<object>value)
                elif key in other:
                    found.append(other[key])
            if len(found) == self.n:
                return found
        missing = [f"no {key!r}" for key in self.keys if key not in other]
        foreign = [f"{key!r} is not in params" for key in other if key not in self.keys]
        raise ValueError(f"{name}: {', '.join(missing + foreign)}")


def find_none(values, grads):
    """Index of the first of some states that is None where the gradient is not; -1 if none."""
    cdef Py_ssize_t i = -1
    for value in values:
        i += 1
        if value is None and grads[i] is not None:
            return i
    return -1


cdef struct LeafRecord:
    # data of the binding for a leaf, beside fo_leaf
    Py_buffer views[2 * ARRAYS]  # of each place; exported while the record lives
    Py_buffer grad, copy         # exported during a step only
    Py_buffer values             # so are those of `Rows`, as given
    fo_rows by_rows              # what the leaf is during such a step
    ptrdiff_t n_rows             # how many rows that is
    int64_t *counts              # of each row of the array, steps that it has taken; or NULL
    bint noisy                   # whether a store rounds stochastically: then there is a key
    int64_t step                 # steps that this leaf has taken
    int group
    ptrdiff_t n                  # elements
    fo_shape *shape              # where state lies otherwise than the parameter, or NULL


cdef class ArrayList(LeafList):
    """The leaves of an optimizer on arrays, with what must be held so that they stay valid.

    Parameters
    ----------
    rule : str
        Name of a rule of the C table.
    state_names : tuple of str
        Names of the rule's state arrays, for messages. Behind the rule's own a leaf may have one
        more, its running average.
    """
    cdef readonly list names
    cdef readonly list params  # arrays as the caller sees them
    cdef readonly list stored  # the same, as arrays or `Stored`
    cdef readonly list states  # of each leaf, arrays or `Stored` or None
    cdef readonly list grad_names
    cdef LeafRecord *records
    cdef list plans           # of the groups, during a step
    cdef public object settler  # of a rule that sums: callable(first, second) -> plans, or None
    cdef list held            # during a step: of leaves of rows, their arrays
    cdef dict directions      # during a step of a matrix rule: by leaf, what it goes along
    cdef bint has_counts      # whether rows of a leaf may count their steps
    cdef readonly object count  # steps of the whole list, a Python int
    cdef bint swapped         # whether `Swap` has it

    def __cinit__(self, str rule, tuple state_names):
        self.set_rule(rule, state_names)
        self.names, self.grad_names, self.states = [], [], []
        self.params, self.stored, self.held = [], [], []
        self.directions = {}
        self.count = 0

    def __dealloc__(self):
        cdef ptrdiff_t i
        for i in range(self.n):
            release(&self.records[i])
        free(self.records)

    def __len__(self):
        return self.n

    cdef str leaf_name(self, ptrdiff_t i):
        return self.names[i]

    cdef str grad_name(self, ptrdiff_t i):
        return self.grad_names[i]

    cdef str copy_name(self, ptrdiff_t i):
        return "copy_out" + self.grad_names[i].removeprefix("grads")

    cdef str busy(self):
        if self.swapped:
            return (
                "the averages are in the place of the parameters: leave the block of swap_ema "
                "first, which puts the parameters back"
            )
        return LeafList.busy(self)

    def add(self, list names, list grad_names, list params, list states, list layouts, int group,
            bint zero, int threads, begin=None, origins=None):
        """Add leaves, all or none: check and export every array, then zero the state if asked.

        `layouts` are those of `Rule.layout`. `begin` is called without arguments afterwards and
        writes all other initial values of state. `origins` say, of parts of arrays, where each part
        begins.
        """
        cdef ptrdiff_t i, old = self.n, total = old + len(names)
        self.leaves = <fo_leaf *>grow(self.leaves, total, sizeof(fo_leaf))
        self.records = <LeafRecord *>grow(self.records, total, sizeof(LeafRecord))
        self.spans.of = <Span *>grow(self.spans.of, total * 2 * ARRAYS, sizeof(Span))
        memset(&self.leaves[old], 0, (total - old) * sizeof(fo_leaf))
        memset(&self.records[old], 0, (total - old) * sizeof(LeafRecord))
        try:
            for i in range(total - old):
                self.n += 1
                self.leaves[self.n - 1].grad_scale = 1
                self.names.append(names[i])
                self.grad_names.append(grad_names[i])
                self.states.append(list(states[i]))
                if origins is not None:
                    self.leaves[self.n - 1].origin = origins[i]
                self.export(self.n - 1, params[i], layouts[i], group)
            self.collect_spans()
            if zero and self.disk is None:  # a new file is zero
                with nogil:
                    zero_state(&self.leaves[old], total - old, threads)
            if begin is not None:
                begin()
        except BaseException:
            for i in range(old, self.n):
                release(&self.records[i])
            self.n = old
            for column in (self.names, self.grad_names, self.params, self.stored, self.states):
                del column[old:]
            self.collect_spans()
            raise

    cdef int export(self, ptrdiff_t i, object param, object layout, int group) except -1:
        """Export a leaf's parameter, and of its state what is there."""
        cdef LeafRecord *record = &self.records[i]
        cdef list states = self.states[i]
        cdef int k
        self.export_stored(i, PARAM, param)
        record.n = self.leaves[i].n = record.views[PARAM].len // record.views[PARAM].itemsize
        record.group = group
        if layout is not None:
            record.shape = <fo_shape *>grow(NULL, 1, sizeof(fo_shape))
            record.shape[0] = fo_shape(
                every=layout[2][0], matrices=layout[2][1], rows=layout[2][2], columns=layout[2][3],
                scratch=NULL)
        for k in range(len(states)):
            if states[k] is None:
                continue
            place = EMA if k == len(self.state_names) else 1 + k
            if place != EMA and layout is not None and layout[0][k] != FO_EACH:
                self.export_part(i, place, states[k], layout[0][k], layout[1][k])
            else:
                states[k] = self.export_stored(i, place, states[k])
        return 0

    cdef int export_part(self, ptrdiff_t i, int place, object value, int map, shape) except -1:
        """Export state of another shape than its parameter's."""
        cdef LeafRecord *record = &self.records[i]
        cdef fo_array *to = array_at(&self.leaves[i], place)
        if map == COUNTS:
            array = _check.counts(self.name(i, place), value, shape, self.params[i])
            self.export_array(i, place, array, &record.views[place])
            record.counts, self.has_counts = <int64_t *>record.views[place].buf, True
            # not for steps, which see no data, but so that its memory is known: 8 bytes for each
            to.format, to.map, to.extra = FO_F64, FO_ROWS, record.shape
            return 0
        array = _check.part(self.name(i, place), value, shape, self.params[i])
        self.export_array(i, place, array, &record.views[place])
        to.data, to.format = record.views[place].buf, <fo_format>checked_format(array)
        to.map, to.extra = <fo_map>map, record.shape
        return 0

    cdef object export_stored(self, ptrdiff_t i, int place, object value):
        """Export a parameter, or state of one; return it as kept: an array, or `Stored`."""
        cdef LeafRecord *record = &self.records[i]
        cdef Py_buffer *data = &record.views[place]
        cdef Py_buffer *extra = &record.views[ARRAYS + place]
        cdef fo_array *to = array_at(&self.leaves[i], place)
        cdef int format = format_of(value)
        if place != PARAM and (format == FO_F64) != (self.leaves[i].param.format == FO_F64):
            format = -1
        if format != FO_F32 and format != FO_F64:
            name = self.name(i, place)
            value = _check.parameter(name, value) if place == PARAM else (
                _check.state(name, value, self.params[i]))
            format = FORMAT_NAMES.index(value.format) if isinstance(value, Stored) else (
                checked_format(value))
        array = value.data if isinstance(value, Stored) else value
        if place == PARAM:
            self.params.append(array)
            self.stored.append(value)
        self.export_array(i, place, array, data)
        if place != PARAM and not same_layout(data, &record.views[PARAM]):
            _check.state(self.name(i, place), value, self.params[i])
        to.data, to.format = data.buf, <fo_format>format
        if isinstance(value, Stored) and value.extra is not None:
            self.export_array(i, place, value.extra, extra)
            to.extra = extra.buf
        record.noisy = record.noisy or FORMATS[format].stochastic
        return value

    cdef int export_array(self, ptrdiff_t i, int place, object array, Py_buffer *view) except -1:
        """Export an array that steps write to."""
        cdef Axes axes
        try:
            PyObject_GetBuffer(array, view, PyBUF_STRIDES | PyBUF_WRITABLE)
        except (BufferError, ValueError):  # NumPy raises the second for read-only
            _check.writable(self.name(i, place), array)
            raise
        axes = axes_of_buffer(view)
        if not is_dense(&axes):
            _check.writable(self.name(i, place), array)
        return 0

    cdef int collect_spans(self) except -1:
        """List the memory of all held arrays, of which no two may have a byte in common."""
        cdef ptrdiff_t i
        cdef int place
        cdef fo_leaf leaf
        self.spans.n = 0
        for i in range(self.n):
            leaf = self.leaves[i]
            for place in range(1, EMA):  # state that `use_states` hides too
                leaf.state[place - 1].data = self.records[i].views[place].buf
            for place in range(2 * ARRAYS):
                self.spans.n += locate(&leaf, i, place, &self.spans.of[self.spans.n])
        return self.refuse_overlap(&self.spans)

    # -------------------------------------------------------------- the step

    def step(self, prepare, grads, int threads, options=None, list copies=None, reduction=None,
             ArrayList source=None, owner=None):
        """One step of all leaves that have a gradient; either all of it happens or none.

        The list is claimed for the whole call, that of `prepare` included: here, where no signal's
        exception can fall between the claim and the block that ends it.

        Parameters
        ----------
        prepare : callable(grads) -> (list of array or None, list of tuple)
            A gradient for each leaf, None leaves it out; and of each group `Rule.plan`. May set
            `writes`, which are made together with the step's last writes, after all that can fail.
        grads
            What `prepare` gets.
        threads : int
        options : StepOptions, optional
            What the step does around the rule.
        copies : list of array or None, optional
            Arrays that get a rounded copy of each parameter; with `options`.
        reduction : Reduction, optional
            With `options`.
        source : ArrayList, optional
            Of an accumulator whose sums are the gradients: claimed as well, and empty afterwards.
        owner : Optimizer, optional
            Whose `_plans`, if it has any, are those that `prepare` would return, as long as its
            groups are settled: most steps need nothing else of it.

        Returns
        -------
        StepResult

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
                plans = None if owner is None or source is not None else owner._plans
                if plans is None or not are_settled(owner.param_groups, owner._groups):
                    gradients, plans = prepare(grads)
                else:
                    gradients = read_gradients(owner, grads)
                return self.step_prepared(
                    gradients, plans, threads, options, copies, reduction, source)
            finally:
                if source is not None:
                    source.release()
        finally:
            fo_leave_ieee(before)
            self.release()

    cdef object step_prepared(self, list grads, list plans, int threads, options, list copies,
                              reduction, ArrayList source):
        cdef ptrdiff_t i, n = self.n, updated = 0
        cdef Verdict verdict = None
        cdef fo_status status
        cdef fo_run how
        memset(&how, 0, sizeof(how))
        try:
            self.use_disk(&how)
            self.plans = plans
            updated = self.take(grads, plans, threads)
            options = self.prepare(options, &how)
            number = self.count + 1  # an object: made before the writes, as memory may run out
            if options is None:
                with nogil:
                    status = run_step(
                        self.rule, self.leaves, n, self.hypers.of, self.hypers.n, &how, threads)
                self.check_step(status)
            else:
                self.take_others(grads, options, copies)
                if source is not None and source.knows(grads):
                    how.has_grad = 1
                    for i in range(n):
                        if grads[i] is not None:
                            self.sums.stats[i] = source.kept[i]
                if reduction is not None:
                    reduction.begin()
                verdict = self.run(options, reduction, &how, threads)
                if options.zero_grads and self.held:
                    self.zero_values()
            if source is not None:
                source.forget()
            if verdict is not None and verdict.skipped:
                return step_result(
                    self.count, 0, True, verdict.grad_norm, verdict.clip_factor, None)
            for i in range(n):
                if self.leaves[i].grad.data != NULL:
                    self.records[i].step += 1
                    if self.records[i].counts != NULL:
                        add_counts(self.records[i].counts, self.records[i].by_rows.rows,
                                   self.records[i].n_rows)
                    if self.kept != NULL:
                        self.kept[i] = self.sums.stats[i]
            self.count = number
            self.make_writes()
            if verdict is None:
                return step_result(number, updated, False, None, 1.0, None)
            stats = None
            if options.measure == _options.LEAF:
                stats = self.statistics(options, reduction)
            return step_result(
                number, updated, False, verdict.grad_norm, verdict.clip_factor, stats)
        finally:
            self.let_go()

    def check(self, list grads, list plans, options, list copies):
        """Make all checks of a step on these gradients, and nothing else.

        The list must be claimed: see `__enter__`.
        """
        try:
            self.plans = plans
            self.take(grads, None, 1)
            self.take_others(grads, options, copies)
        finally:
            self.let_go()

    def advance(self, list grads):
        """Count a step that was taken by other means: of the list, and of leaves with a gradient.
        """
        cdef ptrdiff_t i
        self.count += 1
        for i in range(self.n):
            self.records[i].step += grads[i] is not None
        self.make_writes()

    cdef ptrdiff_t take(self, list grads, list plans, int threads) except -1:
        """Point the leaves at their gradients and, if asked, at constants; return how many have."""
        cdef ptrdiff_t i, updated = 0, index = 0
        cdef int group = -1
        cdef int64_t step = -1
        cdef dict seen = None
        if len(grads) != self.n:
            raise ValueError(f"grads: {len(grads)} arrays for {self.n} parameters")
        self.hypers.n = 0
        for i in range(self.n):
            grad = grads[i]
            if grad is None:
                self.leaves[i].grad.data = NULL
                continue
            self.take_gradient(i, grad, threads)
            if self.kind == FO_ROWWISE or self.records[i].counts != NULL:
                self.take_all_rows(i)
            updated += 1
            if plans is None:
                if self.records[i].counts != NULL:
                    self.take_counts(i, None)
                continue
            if self.records[i].group != group or self.records[i].step != step:
                if seen is None and group >= 0:
                    seen = {(group, step): index}
                group, step = self.records[i].group, self.records[i].step
                index = self.constants(seen, group, step, plans)
            self.leaves[i].hyper = index
            self.leaves[i].grad_scale = 1
            if self.records[i].counts != NULL:
                self.take_counts(i, (<tuple>plans[group])[0])
            if self.records[i].noisy:
                self.leaves[i].key = noise_key((<tuple>plans[group])[1], i, step + 1)
        return updated

    cdef int take_gradient(self, ptrdiff_t i, object grad, int threads=1) except -1:
        cdef LeafRecord *record = &self.records[i]
        cdef fo_leaf *leaf = &self.leaves[i]
        cdef int format = format_of(grad)
        if format >= 0:
            PyObject_GetBuffer(grad, &record.grad, PyBUF_STRIDES)
            if not same_layout(&record.grad, &record.views[PARAM]):
                PyBuffer_Release(&record.grad)
                format = -1
        if format < 0:
            if type(grad) is Rows:
                grad = self.take_rows(i, grad, threads)
            else:
                grad = _check.gradient(self.grad_names[i], grad, self.params[i])
            PyObject_GetBuffer(grad, &record.grad, PyBUF_STRIDES)
            format = checked_format(grad)
        leaf.grad.data = record.grad.buf
        leaf.grad.format = <fo_format>format
        return self.refuse_alias(&self.spans, i, GRAD)

    cdef object take_rows(self, ptrdiff_t i, object given, int threads):
        """Make a leaf of the rows that have a gradient, if the step writes no others.

        Return the gradient: values as they were given, or of all rows where the rule steps all.
        """
        cdef LeafRecord *record = &self.records[i]
        cdef fo_leaf *leaf = &self.leaves[i]
        cdef str name = self.grad_names[i]
        ordered = _rows.in_order(name, given, self.params[i])
        self.held.append(ordered)
        if ordered.values is given.values:  # else they have been copied
            PyObject_GetBuffer(given.values, &record.values, PyBUF_STRIDES)
            self.refuse_values(i, &self.spans)
        way = _rows.way(
            name, self.plans[record.group], self.kind < FO_LAYERWISE, leaf.ema.data != NULL)
        record.by_rows = fo_rows(
            length=_rows.row_length(self.params[i].shape),
            rows=<const int64_t *>address(ordered.rows),
            order=NULL, starts=NULL, hypers=NULL)
        record.n_rows = len(ordered.rows)
        if ordered.order is not None:
            record.by_rows.order = <const ptrdiff_t *>address(ordered.order)
            record.by_rows.starts = <const ptrdiff_t *>address(ordered.starts)
        leaf.by_rows = &record.by_rows
        leaf.n = record.n_rows * record.by_rows.length if record.n else 0
        if way == _rows.ALL:
            return self.all_rows(i, ordered, threads)
        self.check_blocks(i)
        return ordered.values

    cdef int refuse_values(self, ptrdiff_t i, Spans *spans) except -1:
        """Refuse values of rows that share a byte with what the step writes."""
        cdef uintptr_t low = <uintptr_t>self.records[i].values.buf
        return self.refuse_bytes(
            f"{self.grad_names[i]}.values", low, low + self.records[i].values.len, spans)

    cdef object all_rows(self, ptrdiff_t i, object ordered, int threads):
        """Return the gradient of all rows; the leaf is then of all rows too."""
        cdef fo_leaf leaf = self.leaves[i]
        cdef fo_status status
        dtype = _rows.compute_type(self.params[i])
        sums = numpy.empty((len(ordered.rows), *self.params[i].shape[1:]), dtype)
        leaf.grad.data = address(ordered.values)
        leaf.grad.format = <fo_format>checked_format(ordered.values)
        leaf.copy.data = address(sums)
        with nogil:
            status = sum_rows(&leaf, 1, threads)
        check(status)
        self.leaves[i].by_rows, self.leaves[i].n = NULL, self.records[i].n
        return _rows.dense(ordered.rows, sums, self.params[i])

    cdef int take_all_rows(self, ptrdiff_t i) except -1:
        """Make a leaf whose state is one number a row a leaf of all rows, unless it is of some."""
        cdef fo_leaf *leaf = &self.leaves[i]
        cdef LeafRecord *record = &self.records[i]
        cdef bint is_summed = leaf.state[0].map == FO_ROWS and leaf.state[0].data != NULL
        if leaf.by_rows == NULL and (is_summed or record.counts != NULL):
            if self.kind >= FO_LAYERWISE:
                _rows.refuse_counts(self.grad_names[i])
            memset(&record.by_rows, 0, sizeof(fo_rows))
            record.n_rows, record.by_rows.length = record.shape.rows, max(record.shape.columns, 1)
            leaf.by_rows = &record.by_rows
        return 0

    cdef int take_counts(self, ptrdiff_t i, object constants) except -1:
        """Give each row that a step has of a leaf the constants of its own next step.

        `constants` are those of the leaf's plan, and the leaf has its own set; None: check alone.
        """
        cdef LeafRecord *record = &self.records[i]
        cdef ptrdiff_t n, first
        cdef list values = []
        numbers = numpy.empty(record.n_rows, numpy.int32)
        n = number_counts(record.counts, record.by_rows.rows, record.n_rows, numbers, values)
        if n == FO_NO_COUNT:
            _rows.refuse_count(self.name(i, self.place_of_counts(i)), values[0][0])
        if constants is None or n == 0:
            return 0
        with numpy.errstate(all="ignore"):
            own = constants(values[0][:n] + 1, record.step + 1)
        first = add_row_constants(
            &self.hypers, self.leaves[i].hyper, self.scalar_names, own, n)
        if n == 1:
            self.leaves[i].hyper = first
            if record.by_rows.rows == NULL and self.kind != FO_ROWWISE:
                self.leaves[i].by_rows = NULL  # the leaf is stepped as any other
            return 0
        numbers += first
        self.held.append(numbers)
        record.by_rows.hypers = <const int32_t *>address(numbers)
        return 0

    cdef int place_of_counts(self, ptrdiff_t i) noexcept:
        cdef int place = 1
        while self.records[i].views[place].buf != self.records[i].counts:
            place += 1
        return place

    cdef int check_blocks(self, ptrdiff_t i) except -1:
        """Refuse rows that are not whole blocks, where an array is kept in blocks or with noise."""
        cdef fo_leaf *leaf = &self.leaves[i]
        cdef fo_array *array
        cdef int place
        for place in range(EMA):
            array = array_at(leaf, place)
            if (array.data != NULL and array.format != FO_F32 and array.format != FO_F64
                    and leaf.by_rows.length % FO_BLOCK):
                _rows.refuse_blocks(self.grad_names[i], self.name(i, place), leaf.by_rows.length)
        return 0

    cdef int zero_values(self) except -1:
        """Set to zero the values of rows, which the step may have read from a copy."""
        cdef ptrdiff_t i
        for i in range(self.n):
            if <void *>self.records[i].values.obj != NULL:
                memset(self.records[i].values.buf, 0, self.records[i].values.len)
        return 0

    cdef ptrdiff_t constants(self, dict seen, int group, int64_t step, list plans) except -1:
        """Index of the constants of a group after a number of steps.

        Computed once per step of the list: `seen` has the index of all but the first.
        """
        cdef ptrdiff_t added
        index = None if seen is None else seen.get((group, step))
        if index is not None:
            return index
        added = add_constants(
            &self.hypers, self.scalar_names, (<tuple>plans[group])[0], step + 1, step + 1)
        if seen is not None:
            seen[(group, step)] = added
        return added

    cdef int add_direction(self, ptrdiff_t i, fo_array *to) except -1:
        cdef Py_buffer view
        cdef bint is_double = self.leaves[i].param.format == FO_F64
        direction = numpy.empty_like(
            self.params[i], float64 if is_double else float32, subok=False)
        PyObject_GetBuffer(direction, &view, PyBUF_STRIDES | PyBUF_WRITABLE)
        to.data, to.format = view.buf, FO_F64 if is_double else FO_F32
        PyBuffer_Release(&view)  # the dict holds it
        self.directions[i] = direction
        return 0

    cdef int replace(self, ptrdiff_t i) except -1:
        (<tuple>self.plans[self.records[i].group])[2](self.directions[i])
        return 0

    cdef bint settle(self, double first, double second) except -1:
        cdef ptrdiff_t i
        plans = self.settler(first, second)
        if plans is None:
            return False
        self.hypers.n = 0
        seen = {}
        for i in range(self.n):
            if self.leaves[i].grad.data != NULL:
                self.leaves[i].hyper = self.constants(
                    seen, self.records[i].group, self.records[i].step, plans)
        return True

    cdef int take_others(self, list grads, options, list copies) except -1:
        """Export the copies; check them, and gradients that the step zeroes.

        Copies of leaves without a gradient too: those of a step that changes nothing are as good.
        """
        cdef ptrdiff_t i
        for i in range(self.n):
            if copies is not None and copies[i] is not None:
                if self.leaves[i].by_rows != NULL and self.leaves[i].by_rows.rows != NULL:
                    _rows.refuse_copy(self.grad_names[i], self.name(i, COPY))
                copy = _check.copy_target(self.name(i, COPY), copies[i], self.params[i])
                self.export_array(i, COPY, copy, &self.records[i].copy)
                self.leaves[i].copy.data = self.records[i].copy.buf
                self.leaves[i].copy.format = <fo_format>checked_format(copy)
            if options.zero_grads and grads[i] is not None:
                if type(grads[i]) is Rows:
                    _rows.zeroed(self.grad_names[i], grads[i].values)
                else:
                    _check.zeroed(self.grad_names[i], grads[i], self.params[i])
        self.check_others(options.zero_grads, copies is not None)
        for i in range(self.n):
            # of a leaf that is stepped whole; else its gradient is these, and among the others
            if <void *>self.records[i].values.obj != NULL and (
                    self.leaves[i].by_rows == NULL or self.leaves[i].by_rows.rows == NULL):
                self.refuse_values(i, &self.others)
        return 0

    cdef void let_go(self) noexcept:
        """Release what a step alone has exported, or made."""
        cdef ptrdiff_t i, slot = len(self.state_names)
        self.plans = self.settler = None
        if self.kind == FO_MATRIX:
            self.directions.clear()
            for i in range(self.n):
                self.leaves[i].state[slot].data = NULL
        for i in range(self.n):
            if <void *>self.records[i].grad.obj != NULL:
                PyBuffer_Release(&self.records[i].grad)
            if <void *>self.records[i].copy.obj != NULL:
                PyBuffer_Release(&self.records[i].copy)
                self.leaves[i].copy.data = NULL
        if self.held or self.has_counts or self.kind == FO_ROWWISE:
            for i in range(self.n):
                if <void *>self.records[i].values.obj != NULL:
                    PyBuffer_Release(&self.records[i].values)
                self.leaves[i].n, self.leaves[i].by_rows = self.records[i].n, NULL
            self.held.clear()

    def stream(self, list grads, int how, int threads):
        """Move the bytes of a step without its arithmetic, in one of STREAMS ways."""
        cdef ptrdiff_t i
        cdef fo_status status
        try:
            for i in range(self.n):
                self.take_gradient(i, grads[i])
            with nogil:
                status = run_stream(self.leaves, self.n, how, threads)
            check(status)
        finally:
            self.let_go()

    def knows(self, list grads):
        """Whether the sums of these gradients are kept: they are the leaves, in the same order."""
        cdef ptrdiff_t i
        if self.kept == NULL or self.n != len(grads):
            return False
        for i in range(self.n):
            if grads[i] is not None and grads[i] is not self.params[i]:
                return False
        return True

    def forget(self):
        """Start anew, on leaves that are zero."""
        cdef ptrdiff_t i
        self.count = 0
        for i in range(self.n):
            self.records[i].step = 0

    def clear(self):
        """Set the leaves to zero, and start anew."""
        cdef ptrdiff_t i
        self.claim()
        for i in range(self.n):
            memset(self.records[i].views[0].buf, 0, self.records[i].views[0].len)
        self.forget()
        self.release()

    def use_states(self, ptrdiff_t i, tuple used):
        """Hide from C the state arrays that the leaf's options do not ask for."""
        cdef LeafRecord *record = &self.records[i]
        cdef void *data
        cdef int k
        for k in range(len(self.state_names)):
            data = record.views[1 + k].buf
            self.leaves[i].state[k].data = data if used[k] and data != record.counts else NULL

    def get_step(self, ptrdiff_t i):
        """Steps that leaf i has taken."""
        return self.records[i].step

    def set_steps(self, count, list steps):
        """Set the number of steps of the list and of each leaf."""
        cdef ptrdiff_t i
        self.count = count
        for i in range(self.n):
            self.records[i].step = steps[i]

    def restore(self, list pairs, count, list steps, list groups, list options):
        """Take over a checkpoint: all of it or, where this raises, none.

        One call, so that neither a signal nor a lack of memory can come between its writes:
        all that can fail comes before them.

        Parameters
        ----------
        pairs : list of (array, array)
            One of the list's arrays, and one whose bytes it gets: as many, in the same order.
        count, steps
            See `set_steps`.
        groups, options : list of dict
            Each dict of the first list is updated by that in the same place of the second.
        Raises
        ------
        OSError
            If state on disk cannot be written: it is lost then.
        """
        cdef ptrdiff_t i, n = len(pairs)
        cdef int error = 0
        cdef fo_disk nothing = fo_disk(regions=NULL, n=0, error=0, has_written=0)
        cdef fo_disk *disk = &nothing
        cdef Py_buffer *views = <Py_buffer *>grow(NULL, 2 * n, sizeof(Py_buffer))
        cdef int64_t *numbers = NULL
        memset(views, 0, 2 * n * sizeof(Py_buffer))
        try:
            numbers = <int64_t *>grow(NULL, self.n, sizeof(int64_t))
            for i in range(self.n):
                numbers[i] = steps[i]
            for i in range(n):
                self.export_pair(pairs[i][0], pairs[i][1], &views[2 * i], &views[2 * i + 1])
            if self.disk is not None:
                disk = self.find_regions()
            for i in range(len(groups)):
                dict.update(groups[i], options[i])
            for i in range(n):
                if self.disk is None:
                    memmove(views[2 * i].buf, views[2 * i + 1].buf, views[2 * i].len)
                elif error == 0:
                    error = copy_bytes(
                        disk, views[2 * i].buf, views[2 * i + 1].buf, views[2 * i].len)
            self.count = count
            for i in range(self.n):
                self.records[i].step = numbers[i]
            if error != 0:
                raise self.disk.fault(error, True)
            if self.disk is not None:
                self.disk.lost = None
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
        Values that each parameter shows, in its layout and dtype; None leaves it as it is.
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
                    own = &leaves.records[i].views[0]
                    PyObject_GetBuffer(shown[i], &views[i], PyBUF_STRIDES)
                    if views[i].len != own.len or not same_layout(&views[i], own):
                        raise SystemError("fusedopt: an average does not fit; please report")
                    self.kept[i] = <char *>grow(NULL, own.len, 1)
            for i in range(n):  # from here on nothing fails
                if self.kept[i] != NULL:
                    own = &leaves.records[i].views[0]
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
                    memmove(self.leaves.records[i].views[0].buf, self.kept[i],
                            self.leaves.records[i].views[0].len)
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


cdef void release(LeafRecord *record) noexcept:
    cdef int place
    for place in range(2 * ARRAYS):
        if <void *>record.views[place].obj != NULL:
            PyBuffer_Release(&record.views[place])
    free(record.shape)
