# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True, autotestdict=False
"""The border for torch's tensors: how they become the leaves of a step.

Tensors are read anew in each step, through DLPack's C exchange API: no pointer outlives the call,
because load_state_dict, FSDP and DeepSpeed exchange the buffers under a tensor. A leaf of plain
tensors is resolved here, in C, with copies for those that are not in its one dense memory order;
any other leaf goes as a whole to the optimizer's `_stand_in` (see `fusedopt.torch`), which explains
the fault or returns plain tensors.
"""
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memset

from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next, PyDict_Size
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF, Py_INCREF

from fusedopt._c cimport *
from fusedopt._copies cimport Copier
from fusedopt._core cimport *
from fusedopt._dlpack cimport *
from fusedopt._layout cimport (
    MAX_AXES, Axes, count_elements, is_dense, repeats, same_order, same_shape,
)
from fusedopt._leaves cimport (
    ARRAYS, COPY, EMA, FORMATS, GRAD, PARAM, LeafList, Verdict, array_at, locate, step_result,
)
from fusedopt._spans cimport Span, Spans, alias, overlap

import dataclasses

from fusedopt import _check, _options, _rows, formats as _formats

cdef extern from "Python.h":
    ctypedef PyObject *(*PyCFunction)(PyObject *, PyObject *)
    enum:
        METH_NOARGS
    void PyErr_Clear()
    PyCFunction PyCFunction_GetFunction(PyObject *) except NULL
    int PyCFunction_GetFlags(PyObject *) except -1


cdef enum:
    COUNT = COPY + 1   # place of the tensor that counts a leaf's steps
    PLACES = COPY + 2

cdef struct LeafRecord:
    # data of the binding for a leaf, beside fo_leaf
    ptrdiff_t group, i         # its place in the optimizer
    ptrdiff_t number           # of its parameter, in all groups
    bint noisy                 # whether a store rounds stochastically: then there is a key
    unsigned int coded         # bit of a place: 8-bit codes, by its name in the state
    unsigned int elsewhere     # bit of a place: a tensor that lies in another memory order
    bint row_major             # whether it is always stepped in that order
    bint is_matrix             # whether it has two or more axes; of a rule with factors
    fo_shape shape             # of mapped state
    int n_arrays               # arrays that steps write
    void *counter              # the number in the tensor that counts, or NULL if torch counts
    int counter_format
    fo_rows by_rows            # of a sparse gradient: length > 0
    ptrdiff_t n_rows, n_values  # how many there are, and elements that are given for them
    fo_array values
    PyObject *tensors[PLACES]  # held until the step is over, or NULL

cdef struct Asked:
    # tensors of a leaf in the last step, if their sign is plus
    PyObject *tensors[PLACES]
    void *addresses[PLACES]


cdef enum:
    FITS, ELSEWHERE, LACKS, NOT_PLAIN  # what `TensorList.take` finds


cdef double MAX_COUNT = 2.0**62  # steps, with margin to go on in 64 bits


cdef class GroupPlan:
    """What a step must know of a group; replaced when its options change.

    Parameters
    ----------
    states : list of (int, str, str or None, str)
        Of the state arrays that the options use, the average included: number among the rule's
        (that of the average follows the last), name in the state of numbers, of 8-bit codes and
        of the codes' blocks.
    squares : tuple of bool
        Whether each of the rule's states holds squares.
    maps : tuple of int
        The fo_map of each of the rule's states.
    rest : tuple of bool or None
        Of a rule with factors, whether each of its states is kept for tensors of less than two
        axes; the others are for those of more.
    every : int
        Of which elements samples are.
    bfloat16 : str
        The format of bfloat16 parameters.
    seed : int
        Of the noise.
    """
    cdef int n                   # state arrays in use
    cdef int places[ARRAYS]      # of each
    cdef readonly tuple names
    cdef tuple codes, blocks
    cdef unsigned int squares    # bit of a place
    cdef int bfloat16            # the format of bfloat16 parameters
    cdef uint64_t seed
    cdef fo_map maps[ARRAYS]     # by place
    cdef bint has_maps
    cdef unsigned int rest       # bit of a place
    cdef bint has_rest
    cdef ptrdiff_t every

    def __cinit__(self, list states, tuple squares, str bfloat16, seed, tuple maps, rest, every):
        cdef int k
        self.n, self.seed, self.every = len(states), seed, every
        self.has_maps, self.has_rest = any(maps), rest is not None
        for k in range(len(maps)):
            self.maps[1 + k] = <fo_map><int>maps[k]
            self.rest |= (self.has_rest and rest[k]) << (1 + k)
        self.bfloat16 = list(_formats.FORMATS).index(bfloat16)
        for k in range(self.n):
            number = states[k][0]
            self.places[k] = EMA if number == len(squares) else 1 + number
        self.names, self.codes, self.blocks = [
            tuple([state[column] for state in states]) for column in (1, 2, 3)]
        for k in range(len(squares)):
            self.squares |= squares[k] << (1 + k)


cdef inline bint is_used(GroupPlan plan, const LeafRecord *record, int place) noexcept:
    """Whether a rule keeps a state for a tensor of so many axes."""
    return (not plan.has_rest or place == EMA
            or (plan.rest >> place & 1) != record.is_matrix)


cpdef bint is_same(dict seen, dict now) except -1:
    """Whether a dict has the same objects as when `seen` was copied from it.

    "params" of a group is left out.
    """
    cdef Py_ssize_t at = 0, then = 0
    cdef PyObject *key
    cdef PyObject *value
    cdef PyObject *its_key
    cdef PyObject *its_value
    while PyDict_Next(now, &at, &key, &value):
        if not PyDict_Next(seen, &then, &its_key, &its_value) or key != its_key:
            return False
        if value != its_value and <object>key != "params":
            return False
    return not PyDict_Next(seen, &then, &its_key, &its_value)


cpdef bint is_known(dict checked, ptrdiff_t i, group) except -1:
    """Whether a group is as when it was checked: see `_torch_fused._Group`."""
    known = checked.get(i)
    return (known is not None and known.seen is not None and isinstance(group, dict)
            and is_same(known.seen, <dict>group))


cdef ptrdiff_t count_params(list groups, ptrdiff_t n) except -1:
    """Parameters of the first groups."""
    cdef ptrdiff_t g, count = 0
    for g in range(n):
        count += len((<dict>groups[g])["params"])
    return count


cdef bint is_at(list groups, tuple place, param) except -1:
    """Whether a parameter is at a place in a group."""
    cdef ptrdiff_t g = place[0], i = place[1]
    if g >= len(groups):
        return False
    params = groups[g]["params"]
    return i < len(params) and params[i] is param


cdef bint choose_order(const LeafRecord *record, const Axes *param, int64_t *strides) noexcept:
    """The memory order in which a leaf is stepped: its parameter's if that is dense.

    8-bit codes are always row-major: a block holds neighbours by index, so that a copy in another
    order, which torch.distributed.checkpoint makes, keeps its meaning.
    """
    cdef int k
    cdef int64_t size = 1
    if param.ndim > MAX_AXES:
        return False
    if not record.row_major and is_dense(param):
        for k in range(param.ndim):
            strides[k] = param.strides[k]
        return True
    for k in range(param.ndim - 1, -1, -1):
        strides[k] = size
        size *= max(param.shape[k], 1)
    return True


cdef inline bint is_row_major(const Axes *axes) noexcept nogil:
    cdef int k
    cdef int64_t size = 1
    for k in range(axes.ndim - 1, -1, -1):
        if axes.shape[k] > 1 and axes.strides[k] != size:
            return count_elements(axes) == 0
        size *= axes.shape[k]
    return True


cdef inline void hold(LeafRecord *record, int place, tensor) noexcept:
    """Hold a tensor in the place of another, if there is one."""
    Py_INCREF(tensor)
    if record.tensors[place] != NULL:
        Py_DECREF(<object>record.tensors[place])
    record.tensors[place] = <PyObject *>tensor


cdef inline void let_go(LeafRecord *record) noexcept:
    cdef int place
    for place in range(PLACES):
        if record.tensors[place] != NULL:
            Py_DECREF(<object>record.tensors[place])
            record.tensors[place] = NULL


cdef inline object held(const LeafRecord *record, int place):
    return None if record.tensors[place] == NULL else <object>record.tensors[place]


cdef class TensorList(LeafList):
    """The leaves of one step of a torch optimizer.

    Parameters
    ----------
    rule : str
        Name of a rule of the C table.
    state_names : tuple of str
        Names of the rule's state arrays, for messages.
    kinds : tuple of type
        The exact types of tensors that need no closer look.
    is_plain : callable(type) -> bool
        Whether objects of a type are tensors with memory of their own; asked once for each.
    is_neg : builtin method
        Tensor.is_neg, bound to any tensor.
    exchange : capsule or None
        DLPack's C exchange API of those types; without it each tensor is exported through `export`.
    export : callable(tensor) -> capsule
        torch.utils.dlpack.to_dlpack, or the like.
    mark : callable(list of tensor)
        Raises their version counters; a builtin function.
    copier : Copier
        Writes back what was stepped on copies.
    counts : bool
        Whether the rule asks for the number of the step.
    needs_rows : bool
        Whether each gradient must be sparse.
    """
    cdef object mark
    cdef object tensor, parameter, export, is_plain_type
    cdef dict types           # of other types: whether they are plain
    cdef Copier copier
    cdef const DLPackExchangeAPI *api
    cdef PyCFunction is_neg   # called per leaf: as a C function it takes a third of the time
    cdef LeafRecord *records
    cdef Asked *asked
    cdef void *addresses[PLACES]  # of those that `is_known` does not know
    cdef Spans targets_spans  # of the tensors that copies are written back to
    cdef list apart           # such tensors, and their neighbours, that were found to be apart
    cdef ptrdiff_t capacity, n_arrays
    cdef ptrdiff_t n_asked    # how many, by the number of the parameter
    cdef bint done            # whether the last step succeeded
    cdef public bint counted  # whether the state of a leaf has its number of steps
    cdef bint rule_counts     # whether the rule asks for the number of the step
    cdef bint needs_rows      # whether each gradient must be sparse
    cdef readonly dict filled  # of an accumulator: buffers that hold gradients, by number; or None
    cdef void **kept_at       # and where the buffer was that `kept` is of
    # of one step
    cdef object owner
    cdef readonly dict grads  # gradients by the number of a parameter; None: those in `.grad`
    cdef list sources         # tensors that have them, by the same number; None: the parameters
    cdef GroupPlan plan       # of the group
    cdef ptrdiff_t number     # of the parameter, in all groups
    cdef Py_ssize_t at        # of the entry of the state that is tried first
    cdef bint zeroes          # whether gradients are set to zero
    cdef bint has_rows        # whether some gradient is sparse
    cdef bint has_others      # whether a parameter, with a gradient or not, is of another type
    cdef list capsules        # what must live until the step is over
    cdef list written         # parameters
    cdef list touched         # what is written beside them: gradients set to zero, copies
    cdef list targets, copies  # tensors, and what was stepped in the place of each
    cdef list labels           # of the former: names, or (leaf, place)
    cdef list directions       # of a matrix rule: by leaf, what it goes along, or None
    cdef dict fresh           # new state by parameter, of those that had none
    cdef list made            # (state of a parameter, what is new in it)
    cdef dict own             # state of the last leaf's parameter, or None
    cdef list elsewhere       # (group, place in it, number) of parameters that torch steps
    cdef ptrdiff_t index, last, last_count  # of the constants of the leaf before; -1: none
    # of more than one, while some parameters are stepped at a time
    cdef dict seen            # (plan, step, count) -> index of its constants
    cdef dict places          # (group, place in it) of each parameter by id, or of others
    cdef set turn             # numbers of the parameters that have taken this step

    def __cinit__(self, str rule, tuple state_names, tuple kinds, is_plain, is_neg, exchange,
                  export, mark, Copier copier not None, bint counts, bint needs_rows):
        self.set_rule(rule, state_names)
        self.tensor, self.parameter = kinds
        self.export, self.is_plain_type, self.copier = export, is_plain, copier
        self.mark, self.rule_counts, self.needs_rows = mark, counts, needs_rows
        self.types, self.places, self.turn = {}, {}, set()
        self.capsules, self.written, self.touched, self.made = [], [], [], []
        self.fresh = {}
        self.targets, self.copies, self.labels, self.directions = [], [], [], []
        self.elsewhere = []
        if PyCFunction_GetFlags(<PyObject *>is_neg) != METH_NOARGS:
            raise TypeError("is_neg: expected a builtin method without arguments")
        self.is_neg = PyCFunction_GetFunction(<PyObject *>is_neg)
        if exchange is not None:
            self.api = <const DLPackExchangeAPI *>PyCapsule_GetPointer(
                exchange, b"dlpack_exchange_api")
            if (self.api.header.version.major != DLPACK_MAJOR_VERSION
                    or self.api.dltensor_from_py_object_no_sync == NULL):
                self.api = NULL

    def use_row(self, str rule):
        """Do so, with new constants."""
        LeafList.use_row(self, rule)
        self.hypers.n, self.seen = 0, {}

    def __dealloc__(self):
        free(self.records)
        free(self.asked)
        free(self.kept_at)
        free(self.targets_spans.of)

    cdef str leaf_name(self, ptrdiff_t i):
        return self.owner._name(self.records[i].group, self.records[i].i)

    cdef str grad_name(self, ptrdiff_t i):
        return f"{self.leaf_name(i)}.grad"

    cdef str copy_name(self, ptrdiff_t i):
        return f"copy_out of {self.leaf_name(i)}"

    cdef str extra_name(self, ptrdiff_t i, int place):
        name = self.name(i, place)
        return f"{name}.residual" if place == PARAM else f"{name}_blocks"

    cdef bint has_grad(self, ptrdiff_t i) noexcept:
        return self.records[i].tensors[GRAD] != NULL  # an empty tensor is at no address

    cdef ptrdiff_t row(self, ptrdiff_t i) noexcept:
        return self.records[i].number

    cdef ptrdiff_t count_rows(self) noexcept:
        return self.number + 1

    def step(self, owner, state, int threads, options=None, dict copies=None, chosen=None,
             dict grads=None, list sources=None, bint drops=False, accumulator=None):
        """One step of all tensors that have a gradient; either all of it happens or none.

        Parameters
        ----------
        owner : optimizer
            Called where needed are its ``_is_elsewhere``, ``_check_elsewhere``,
            ``_step_elsewhere``, ``_make_state``, ``_make_extras``, ``_stand_in``, ``_copy``,
            ``_count``, ``_refuse_both``, ``_refuse_state``, ``_shared``, ``_origin``,
            ``_constants``, ``_name``, ``_reduction``, ``_move_rest``, ``_prepare``, ``_sums_of``,
            ``_new_direction`` and ``_replace``: see `fusedopt.torch`. For sparse gradients
            ``_rows``, ``_refuse_dense``, ``_refuse_strange`` and ``_refuse_all_rows``.
        state : dict of dict
            The optimizer's state; of a new leaf it is added when the step has succeeded.
        threads : int
        options : StepOptions, optional
            What the step does around the rule.
        copies : dict of int -> tensor, optional
            By the number of a parameter, a tensor that gets a rounded copy of it; with `options`.
        chosen : list of tensor, optional
            Some parameters, if only these are stepped; then the owner's ``_renew`` is called.
        grads : dict of int -> tensor, optional
            Gradients by the number of a parameter, in the place of those in ``.grad``.
        sources : list of tensor, optional
            Whose ``.grad`` are the gradients, by the number of a parameter; None after a step that
            succeeds if `drops`.
        accumulator : optimizer, optional
            Whose sums are the gradients, see the owner's ``_sums_of``: its list is claimed as well,
            and empty afterwards.

        With `chosen` this also sets the owner's ``last_step``, together with the version counters,
        because a signal's exception may come as soon as this returns.
        """
        cdef Verdict verdict = None
        cdef fo_status status
        cdef fo_run how
        cdef ptrdiff_t i
        cdef fo_mode before
        cdef bint of_all = chosen is None, is_claimed = False
        cdef TensorList source = None if accumulator is None else accumulator._leaves
        self.claim()
        before = fo_enter_ieee()
        grad = self.copier.is_grad()
        try:
            if grad:
                self.copier.enable_grad(False)
            self.owner, number = owner, owner.last_step.step
            self.grads, self.sources = grads, sources
            if of_all:
                groups = owner._prepare(
                    source is not None or (options is not None and options.concerns_ranks))
            self.n = self.n_arrays = self.at = 0
            if of_all or self.hypers.n > 64:
                self.hypers.n, self.seen = 0, {}
            self.number = -1
            if not self.done and self.n_asked:
                memset(self.asked, 0, self.n_asked * sizeof(Asked))
            self.done = False
            self.has_rows = False
            if self.has_others:
                owner._moved = 0
            self.has_others = False
            self.zeroes = options is not None and options.zero_grads
            reduction = stats = fault = None
            process_group = owner._process_group if of_all else None  # whose ranks have others
            memset(&how, 0, sizeof(how))
            try:
                if self.disk is not None:
                    self.disk.refuse_lost()
                if source is not None:
                    source.claim()
                    is_claimed = True
                    self.grads, numbers = owner._sums_of(accumulator)
                if of_all:
                    for group, (params, plan) in enumerate(groups):
                        self.gather(group, params, plan, state, copies)
                else:
                    self.choose(owner.param_groups, chosen, state, copies)
                if self.kind in (FO_ROWWISE, FO_FACTORED, FO_SUMMING):
                    for i in range(self.n):  # records have their place in memory now
                        self.join_shape(i)
                self.check_memory(copies is not None)
                if self.has_rows or self.kind == FO_ROWWISE:
                    self.place_rows()
                if self.elsewhere:
                    owner._check_elsewhere(self.elsewhere, options is not None)
                self.use_disk(&how)  # that of new state too
                options = self.prepare(options, &how)
                if source is not None:
                    self.take_sums(source, numbers, &how)
            except Exception as exc:
                fault = exc
                owner._move_rest(chosen)
            if (fault is not None or self.has_others or process_group is not None) and (
                    self.kind >= FO_LAYERWISE or source is not None
                    or (options is not None and options.concerns_ranks)):
                reduction = owner._reduction(process_group)
            if reduction is not None:
                options = options or _options.PLAIN
                if reduction.agree(len(owner._all_params()), fault, bool(options.skip)):
                    options = dataclasses.replace(options, skip=True)
            elif fault is not None:
                raise fault
            if self.elsewhere:
                owner._step_elsewhere(self.elsewhere)
            if options is not None:
                verdict = self.run(options, reduction, &how, threads)
                if self.zeroes and self.has_rows:
                    self.zero_values()
                if verdict.skipped:
                    self.write_back()
                    if source is not None:
                        source.forget(accumulator)
                    self.mark(self.touched)
                    owner.last_step = step_result(
                        number, 0, True, verdict.grad_norm, verdict.clip_factor, None)
                    return
            else:
                with nogil:
                    status = run_step(
                        self.rule, self.leaves, self.n, self.hypers.of, self.hypers.n, &how,
                        threads)
                self.check_step(status)
            self.done = True
            self.finish(state)
            if self.filled is not None:
                self.keep()
            if source is not None:
                source.forget(accumulator)
            if drops:
                with self.copier.plainly():  # modes and subclasses are Python code
                    for param in sources:
                        param.grad = None
            updated = len(self.written) + len(self.elsewhere)
            number += self.begins(of_all)
            self.mark(self.written + self.touched if self.touched else self.written)
            if verdict is None:
                owner.last_step = step_result(number, updated, False, None, 1.0, None)
                return
            owner.last_step = step_result(
                number, updated, False, verdict.grad_norm, verdict.clip_factor, None)
            if options.measure == _options.LEAF:  # which may ask other ranks, and fail
                stats = self.statistics(options, reduction)
                owner.last_step = step_result(
                    number, updated, False, verdict.grad_norm, verdict.clip_factor, stats)
        finally:
            for i in range(self.n):
                let_go(&self.records[i])
            self.clear_lists()
            self.owner = self.plan = self.grads = self.sources = None
            fo_leave_ieee(before)
            if is_claimed:
                source.release()
            self.release()
            if grad:
                self.copier.enable_grad(True)

    cdef int take_sums(self, TensorList source, list numbers, fo_run *how) except -1:
        """Take over what an accumulator has measured, if it is what this step would measure.

        That is the case if the step reads each buffer in its own memory order. `numbers` are those
        of its buffers by the numbers here, None if they are the same.
        """
        cdef ptrdiff_t i, k
        cdef fo_leaf *leaf
        if source.kept == NULL:
            return 0
        for i in range(self.n):
            if self.has_grad(i):
                leaf = &self.leaves[i]
                k = self.records[i].number
                if numbers is not None:
                    k = numbers[k]
                if leaf.n > 0 and (leaf.grad.data != source.kept_at[k] or leaf.by_rows != NULL):
                    return 0
                self.sums.stats[i] = source.kept[k]
        how.has_grad = 1
        return 0

    def keep_sums(self, ptrdiff_t n):
        """Make this the list of an accumulator of n buffers, see `LeafList`."""
        LeafList.keep_sums(self, n)
        self.kept_at = <void **>grow(self.kept_at, n, sizeof(void *))
        self.filled = {}

    cdef int keep(self) except -1:
        """Keep what was measured of the buffers that a step has written, and which these are."""
        cdef ptrdiff_t i, k = 0
        for i in range(self.n):
            if self.has_grad(i):
                if self.kept != NULL:
                    self.kept[self.records[i].number] = self.sums.stats[i]
                    self.kept_at[self.records[i].number] = self.leaves[i].param.data
                self.filled[self.records[i].number] = self.written[k]
                k += 1
        return 0

    cdef int forget(self, owner) except -1:
        """Start anew with the buffers of an accumulator, which are zero."""
        self.filled.clear()
        self.turn = set()
        owner.last_step = step_result(0, 0, False, None, 1.0, None)
        return 0

    def zero(self, owner, list buffers, value):
        """Do so, after a copy of a value into each."""
        self.claim()
        try:
            self.copier.run(buffers, [value] * len(buffers))
            self.forget(owner)
        finally:
            self.release()

    cdef int clear_lists(self) except -1:
        """Empty the lists of one step: making new ones would take a tenth of a step of one
        tensor."""
        if self.capsules:
            self.capsules = []
        if self.written:
            self.written = []
        if self.touched:
            self.touched = []
        self.own = None
        if self.fresh:
            self.fresh = {}
        if self.made:
            self.made = []
        if self.targets:
            self.targets, self.copies, self.labels = [], [], []
        if self.directions:
            self.directions = []
        if self.elsewhere:
            self.elsewhere = []
        return 0

    cdef bint begins(self, bint of_all) except -1:
        """Whether this is a new step, not a part of one that has begun; record the parameters
        stepped."""
        cdef ptrdiff_t i
        cdef bint new
        if of_all:
            if self.turn:
                self.turn = set()
            return True
        if not self.written and not self.elsewhere:
            return False
        new = not self.turn
        for i in range(self.n):
            new = new or (self.has_grad(i) and self.records[i].number in self.turn)
        for place in self.elsewhere:
            new = new or place[2] in self.turn
        if new:
            self.turn = set()
        for i in range(self.n):
            if self.has_grad(i):
                self.turn.add(self.records[i].number)
        for place in self.elsewhere:
            self.turn.add(place[2])
        return new

    cdef inline void join_shape(self, ptrdiff_t i) noexcept:
        cdef int k
        for k in range(FO_MAX_STATES):
            if self.leaves[i].state[k].map != FO_EACH:
                self.leaves[i].state[k].extra = &self.records[i].shape

    cdef bint settle(self, double first, double second) except -1:
        cdef ptrdiff_t i
        if not self.owner._settle(first, second):
            return False
        groups = {self.leaves[i].hyper: self.records[i].group for i in range(self.n)}
        for (_, step, count), index in self.seen.items():
            set_constants(&self.hypers.of[<ptrdiff_t>index], self.scalar_names,
                          self.owner._constants(groups[index]), step, count)
        return True

    cdef int add_direction(self, ptrdiff_t i, fo_array *to) except -1:
        cdef LeafRecord *record = &self.records[i]
        cdef DLTensor t
        cdef bint is_double = self.leaves[i].param.format == FO_F64
        direction = self.owner._new_direction(
            <object>record.tensors[PARAM], self.order(record), is_double)
        if not self.resolve(direction, &t):
            raise SystemError("fusedopt: a new tensor is not plain; please report")
        to.data, to.format = <char *>t.data + t.byte_offset, FO_F64 if is_double else FO_F32
        self.directions += [None] * (i - len(self.directions)) + [direction]
        return 0

    cdef int replace(self, ptrdiff_t i) except -1:
        self.owner._replace(self.records[i].group, self.directions[i])
        return 0

    cdef tuple order(self, LeafRecord *record):
        """The strides in which a leaf is stepped; None if they are row-major."""
        cdef DLTensor t
        cdef Axes axes
        cdef int64_t strides[MAX_AXES]
        cdef int k
        cdef bint found = self.resolve(<object>record.tensors[PARAM], &t)
        if found:
            axes = axes_of(&t)
        if not found or not choose_order(record, &axes, strides):
            raise SystemError("fusedopt: a tensor changed meanwhile; please report")
        axes.strides = <const Py_ssize_t *>strides
        return None if is_row_major(&axes) else tuple([strides[k] for k in range(t.ndim)])

    cdef int finish(self, state) except -1:
        """Count the step, write what was done on copies, and take over new state.

        No Python code runs here, in which a signal could raise an exception: a dict takes over
        another's keys without asking for their hash, which of a tensor is a function in Python.
        """
        cdef ptrdiff_t i
        cdef LeafRecord *record
        for i in range(self.n):
            record = &self.records[i]
            if record.counter == NULL:
                if record.tensors[COUNT] != NULL:
                    count = <object>record.tensors[COUNT]
                    count += 1
            elif record.counter_format == FO_F32:
                (<float *>record.counter)[0] += 1
            else:
                (<double *>record.counter)[0] += 1
        self.write_back()
        self.make_writes()
        if self.fresh:
            state.update(self.fresh)
        for own, made in self.made:
            own.update(made)
        return 0

    cdef int add_state(self, param, dict made) except -1:
        """Note new state of the last leaf's parameter."""
        if self.own is None:
            self.fresh.setdefault(param, {}).update(made)
        else:
            self.made.append((self.own, made))
        return 0

    cdef int write_back(self) except -1:
        """Copy what was done on copies; backwards, as a copy may have been copied again."""
        return self.copier.run(self.targets[::-1], self.copies[::-1]) if self.targets else 0

    # -------------------------------------------------------------- leaves

    cdef int gather(self, ptrdiff_t group, list params, GroupPlan plan, state,
                    dict copies) except -1:
        """Add the leaves of a group that have a gradient, or a copy to be written."""
        cdef ptrdiff_t i = -1
        self.plan = plan
        self.index = -1
        for param in params:
            i += 1
            self.number += 1
            self.add(group, i, param, state, copies)
        return 0

    cdef int choose(self, list groups, chosen, state, dict copies) except -1:
        """Do so for some parameters, each of which is in a group."""
        cdef ptrdiff_t n, g, i
        cdef list places = []
        if type(chosen) is not list and type(chosen) is not tuple:
            raise TypeError(
                f"step_params: expected a list of parameters, got {type(chosen).__name__}")
        for param in chosen:
            place = self.places.get(id(param))
            if place is None or not is_at(groups, place, param):
                self.places = {
                    id(known): (g, i)
                    for g, group in enumerate(groups) for i, known in enumerate(group["params"])}
                place = self.places.get(id(param))
            if place is None:
                raise ValueError(
                    f"step_params: params[{len(places)}] is no parameter of this optimizer")
            places.append(place)
        checked = self.owner._groups
        for place in places:
            g = (<tuple>place)[0]
            if self.owner._has_new_options or not is_known(checked, g, groups[g]):
                self.owner._renew()
                break
        for n in range(len(places)):
            g, i = places[n]
            self.number = count_params(groups, g) + i
            self.plan, self.index = checked[g].plan, -1
            self.add(g, i, chosen[n], state, copies)
        self.number = count_params(groups, len(groups)) - 1
        return 0

    cdef inline int add(self, ptrdiff_t group, ptrdiff_t i, param, state, dict copies) except -1:
        """Add a leaf, if it is one of those."""
        cdef ptrdiff_t step, count
        cdef LeafRecord *record
        self.has_others |= type(param) is not self.parameter
        own = self.state_of(state, param)
        if own is not None and not isinstance(own, dict):
            self.owner._refuse_state(group, i, own)
        self.own = own
        if self.grads is not None:
            grad = self.grads.get(self.number)
        else:
            grad = param.grad if self.sources is None else self.sources[self.number].grad
        if grad is None and (copies is None or self.number not in copies):
            return 0
        record = self.new_leaf(group, i)
        hold(record, PARAM, param)
        if copies is not None and self.number in copies:
            hold(record, COPY, copies[self.number])
            self.touched.append(copies[self.number])
        if grad is None:
            self.read_residual(record, own)
            self.fill(record)
            return 0
        hold(record, GRAD, grad)
        if self.plan.has_rest:
            record.is_matrix = param.dim() > 1
            record.row_major = record.is_matrix
        elif self.plan.has_maps:
            record.row_major = True
        step = 2  # of a rule that does not count: its first, or another
        if not self.read_state(record, own):
            if self.leave(record):
                return 0
            if own is None and param in state:
                self.owner._refuse_state(group, i, own)
            made, begins = self.owner._make_state(group, i, param, own)
            self.add_state(param, made)
            own = {**own, **made} if own else made
            step = 1 if begins else 2
            if not self.read_state(record, own):
                raise SystemError("fusedopt: incomplete state; please report")
        if self.fill(record):
            return 0
        self.written.append(param)
        if self.zeroes:
            self.touched.append(grad)
        count = step
        if record.tensors[COUNT] != NULL:
            count = 1 + self.read_count(record)
        if record.noisy:
            self.leaves[self.n - 1].key = noise_key(self.plan.seed, self.number, count)
            if not self.is_plain(param):
                self.leaves[self.n - 1].origin = self.owner._origin(param)
        if self.rule_counts:
            step = count
        if not self.counted:
            count = 0
        if self.index < 0 or step != self.last or count != self.last_count:
            self.index, self.last, self.last_count = (
                self.constants(group, step, count), step, count)
        self.leaves[self.n - 1].hyper = self.index
        return 0

    cdef object state_of(self, state, param):
        """The state of a parameter, or None.

        Entries usually follow one another as the parameters do. The next entry is tried first,
        because finding one by its key runs Tensor.__hash__ in Python.
        """
        cdef Py_ssize_t at = self.at
        cdef PyObject *key
        cdef PyObject *value
        if PyDict_Next(state, &at, &key, &value) and key == <PyObject *>param:
            self.at = at
            return <object>value
        return state.get(param) if PyDict_Size(state) > 0 else None

    cdef bint read_state(self, LeafRecord *record, own) except -1:
        """Hold the tensor that counts steps, and the state arrays in use; False if one is missing.
        """
        cdef GroupPlan plan = self.plan
        cdef Py_ssize_t at = 0
        cdef PyObject *value
        cdef int k, used = plan.n
        record.coded = 0
        if own is None:
            return not plan.n and not self.counted
        if plan.has_rest:
            for k in range(plan.n):
                used -= not is_used(plan, record, plan.places[k])
        if self.counted or PyDict_Size(own) > used:
            value = entry(own, "step", &at)
            if value != NULL:
                hold(record, COUNT, <object>value)
            elif self.counted:
                return False
        for k in range(plan.n):
            if not is_used(plan, record, plan.places[k]):
                continue
            value = entry(own, plan.names[k], &at)
            if (value == NULL or <object>value is None) and plan.codes[k] is not None:
                value = entry(own, plan.codes[k], &at)
                record.coded |= 1 << plan.places[k]
            if value == NULL or <object>value is None:
                return False
            hold(record, plan.places[k], <object>value)
        if PyDict_Size(own) > used + self.counted:
            for k in range(plan.n):
                if plan.codes[k] is not None and not record.coded >> plan.places[k] & 1:
                    value = entry(own, plan.codes[k], &at)
                    if value != NULL and <object>value is not None:
                        self.owner._refuse_both(record.group, record.i, plan.names[k])
            self.read_residual(record, own)
            for k in range(plan.n):
                value = entry(own, plan.blocks[k], &at)
                if value != NULL and <object>value is not None:
                    hold(record, ARRAYS + plan.places[k], <object>value)
        return True

    cdef int read_residual(self, LeafRecord *record, own) except -1:
        """Hold the bits that a parameter does not show, if there are any."""
        cdef PyObject *value
        if own is not None:
            value = PyDict_GetItemWithError(own, "residual")
            if value != NULL and <object>value is not None:
                hold(record, ARRAYS + PARAM, <object>value)
        return 0

    cdef LeafRecord *new_leaf(self, ptrdiff_t group, ptrdiff_t i) except NULL:
        cdef ptrdiff_t capacity = 2 * self.capacity + 8
        cdef LeafRecord *record
        if self.n == self.capacity:
            self.leaves = <fo_leaf *>grow(self.leaves, capacity, sizeof(fo_leaf))
            self.records = <LeafRecord *>grow(self.records, capacity, sizeof(LeafRecord))
            self.capacity = capacity
        memset(&self.leaves[self.n], 0, sizeof(fo_leaf))
        self.leaves[self.n].grad_scale = 1
        record = &self.records[self.n]
        memset(record, 0, sizeof(LeafRecord))
        record.group, record.i, record.number = group, i, self.number
        if self.number >= self.n_asked:
            capacity = 2 * self.number + 8
            self.asked = <Asked *>grow(self.asked, capacity, sizeof(Asked))
            memset(&self.asked[self.n_asked], 0, (capacity - self.n_asked) * sizeof(Asked))
            self.n_asked = capacity
        self.n += 1
        return record

    cdef ptrdiff_t read_count(self, LeafRecord *record) except -1:
        """Steps that a leaf has taken; where they are counted is noted for `finish`."""
        cdef DLTensor t
        cdef Axes axes
        cdef double taken
        cdef int format
        cdef void *at
        count = <object>record.tensors[COUNT]
        if self.resolve(count, &t):
            axes = axes_of(&t)
            format = dtype_of(&t)
            at = <char *>t.data + t.byte_offset
            if count_elements(&axes) == 1 and (format == FO_F32 or format == FO_F64) and (
                    self.is_known(COUNT, record.tensors[COUNT], at)
                    or (self.is_positive(COUNT, record.tensors[COUNT])
                        and self.resolve(count, &t))):
                at, format = <char *>t.data + t.byte_offset, dtype_of(&t)
                taken = (<float *>at)[0] if format == FO_F32 else (<double *>at)[0]
                if 0 <= taken < MAX_COUNT and taken == <double><ptrdiff_t>taken:
                    record.counter, record.counter_format = at, format
                    return <ptrdiff_t>taken
        return self.owner._count(record.group, record.i, count)

    cdef bint leave(self, LeafRecord *record) except -1:
        """Leave the last leaf to torch's own step, if it is on another device."""
        if record.tensors[GRAD] == NULL or not self.owner._is_elsewhere(
                <object>record.tensors[PARAM]):
            return False
        self.elsewhere.append((record.group, record.i, record.number))
        let_go(record)
        self.n -= 1
        return True

    cdef bint fill(self, LeafRecord *record) except -1:
        """Point the last leaf at its tensors, or at stand-ins; True if it is left to torch."""
        cdef int result = self.take(record)
        if result == NOT_PLAIN and self.leave(record):
            return True
        if result == LACKS or result == NOT_PLAIN:
            self.take_rows(record)
            self.make_extras(record)
            result = self.take(record)
        if self.needs_rows and record.by_rows.length == 0 and record.tensors[GRAD] != NULL:
            self.owner._refuse_dense()
        if result == NOT_PLAIN and record.by_rows.length > 0:
            self.owner._refuse_strange(record.group, record.i)
        if result == NOT_PLAIN:
            memset(&self.asked[self.number], 0, sizeof(Asked))
            self.put_stand_ins(record)
            result = self.point(record, NULL)
        if result == ELSEWHERE:
            self.lay(record)
            result = self.point(record, NULL)
        if result != FITS:
            raise SystemError("fusedopt: a stand-in does not fit; please report")
        self.n_arrays += record.n_arrays
        return False

    cdef int take_rows(self, LeafRecord *record) except -1:
        """Make a leaf of the rows of its gradient, if that is sparse."""
        cdef fo_rows *by = &record.by_rows
        grad = held(record, GRAD)
        if grad is None or not getattr(grad, "is_sparse", False):
            return 0
        if record.tensors[EMA] != NULL or record.tensors[COPY] != NULL:
            self.owner._refuse_all_rows(
                record.group, record.i, "ema" if record.tensors[EMA] != NULL else "copy_out")
        ordered = self.owner._rows(record.group, record.i, self.zeroes)
        self.capsules.append(ordered)
        record.n_values = ordered.values.numel()
        record.n_rows = len(ordered.rows)
        by.length = _rows.row_length(ordered.values.shape)
        by.rows = <const int64_t *>address(ordered.rows)
        if ordered.order is not None:
            by.order = <const ptrdiff_t *>address(ordered.order)
            by.starts = <const ptrdiff_t *>address(ordered.starts)
        hold(record, GRAD, ordered.values)
        record.row_major = self.has_rows = True
        return 0

    cdef int place_rows(self) except -1:
        """Make leaves of rows, those of sparse gradients or all, after the checks for shared
        memory."""
        cdef ptrdiff_t i
        cdef int place
        cdef uintptr_t low, high
        cdef LeafRecord *record
        cdef fo_leaf *leaf
        cdef fo_array *array
        for i in range(self.n):
            record, leaf = &self.records[i], &self.leaves[i]
            if record.by_rows.length == 0:
                if (self.has_grad(i) and leaf.state[0].data != NULL
                        and leaf.state[0].map == FO_ROWS and self.kind == FO_ROWWISE):
                    record.by_rows.length = max(record.shape.columns, 1)
                    leaf.by_rows = &record.by_rows  # all of them
                continue
            for place in range(EMA):
                array = array_at(leaf, place)
                if (array.data != NULL and array.format != FO_F32 and array.format != FO_F64
                        and record.by_rows.length % FO_BLOCK):
                    _rows.refuse_blocks(
                        self.grad_name(i), self.name(i, place), record.by_rows.length)
            low = <uintptr_t>record.values.data
            high = low + record.n_values * FORMATS[<int>record.values.format].size
            self.refuse_bytes(self.grad_name(i), low, high, &self.spans)
            self.refuse_bytes(self.grad_name(i), low, high, &self.others)
            leaf.grad, leaf.by_rows = record.values, &record.by_rows
            leaf.n = record.n_rows * record.by_rows.length if record.n_values else 0
        return 0

    cdef void zero_values(self) noexcept:
        cdef ptrdiff_t i
        cdef fo_array *values
        for i in range(self.n):
            values = &self.records[i].values
            if self.records[i].n_values:
                memset(values.data, 0, self.records[i].n_values * FORMATS[<int>values.format].size)

    cdef int make_extras(self, LeafRecord *record) except -1:
        """Make what the storage of a leaf needs beside its state and does not exist yet."""
        if record.tensors[GRAD] == NULL:  # of a leaf that is copied, not stepped
            return 0
        param = <object>record.tensors[PARAM]
        states = [
            <object>record.tensors[place]
            for place in self.plan.places[:self.plan.n] if record.tensors[place] != NULL]
        made = self.owner._make_extras(
            record.group, record.i, param, states, record.tensors[ARRAYS + PARAM] != NULL,
            record.tensors[COUNT] != NULL)
        if made:
            self.add_state(param, made)
            if "residual" in made:
                hold(record, ARRAYS + PARAM, made["residual"])
            if "step" in made:
                hold(record, COUNT, made["step"])
        return 0

    cdef int put_stand_ins(self, LeafRecord *record) except -1:
        """Put plain tensors in the place of a leaf's."""
        cdef GroupPlan plan = self.plan
        cdef int k
        cdef list names = [], places = [PARAM, GRAD, COPY]
        for k in range(plan.n):
            if record.tensors[plan.places[k]] != NULL:
                places.append(plan.places[k])
                names.append(
                    plan.codes[k] if record.coded >> plan.places[k] & 1 else plan.names[k])
        tensors, extras, back = self.owner._stand_in(
            record.group, record.i, names, [held(record, place) for place in places],
            [held(record, ARRAYS + place) if place < ARRAYS else None for place in places],
            self.zeroes)
        for tensor, copy, name in back:
            self.targets.append(tensor)
            self.copies.append(copy)
            self.labels.append(name)
        for k in range(len(places)):
            if tensors[k] is not None:
                hold(record, places[k], tensors[k])
            if extras[k] is not None:
                hold(record, ARRAYS + places[k], extras[k])
        return 0

    cdef int lay(self, LeafRecord *record) except -1:
        """Put copies in the place of tensors that are `elsewhere`."""
        cdef int place
        cdef tuple order = self.order(record)
        for place in range(PLACES):
            if record.elsewhere >> place & 1:
                tensor = <object>record.tensors[place]
                copy = self.owner._copy(tensor, order)
                if place != GRAD or self.zeroes:
                    self.targets.append(tensor)
                    self.copies.append(copy)
                    self.labels.append((self.n - 1, place))
                hold(record, place, copy)
        return 0

    cdef int take(self, LeafRecord *record) except -1:
        """Point the last leaf at its tensors, if they are as C wants.

        DLPack does not show the sign of a tensor. That of parameters, gradients and copies, which
        users exchange, is checked in each step; that of state if it is another tensor or at another
        address.
        """
        cdef int place, result
        cdef unsigned int strange = 0
        if not (self.is_positive_now(record.tensors[PARAM])
                and self.is_positive_now(record.tensors[GRAD])
                and self.is_positive_now(record.tensors[COPY])):
            return NOT_PLAIN
        result = self.point(record, &strange)
        if result == NOT_PLAIN or result == LACKS or not strange:
            return result
        for place in range(GRAD):
            if strange >> place & 1 and not self.is_positive(place, record.tensors[place]):
                return NOT_PLAIN
        return self.point(record, NULL)  # again: the check of signs may run other threads

    cdef int point(self, LeafRecord *record, unsigned int *strange) except -1:
        """Do so without the signs; record the tensors whose sign must be checked, unless NULL.

        All are resolved in one pass without Python code, so that the parameter's shape cannot
        change before the others are compared with it.
        """
        cdef fo_leaf *leaf = &self.leaves[self.n - 1]
        cdef DLTensor t
        cdef Axes param, other
        cdef int64_t strides[MAX_AXES]
        cdef int k, place, format
        cdef fo_array *array
        record.elsewhere = 0
        record.n_arrays = 0
        record.noisy = False
        if not self.resolve(<object>record.tensors[PARAM], &t):
            return NOT_PLAIN
        param = other = axes_of(&t)
        record.row_major = record.row_major or record.coded
        if record.row_major or not is_dense(&param):
            if not choose_order(record, &param, strides):
                return NOT_PLAIN
            param.strides = <const Py_ssize_t *>strides
        leaf.n = count_elements(&param)
        for k in range(ARRAYS + 2):
            place = k if k < ARRAYS else GRAD + k - ARRAYS  # GRAD, COPY
            if record.tensors[place] == NULL:
                continue
            array = array_at(leaf, place)
            if place != PARAM:
                if not self.resolve(<object>record.tensors[place], &t):
                    return NOT_PLAIN
                other = axes_of(&t)
                if place < ARRAYS and self.plan.maps[place] != FO_EACH:
                    if not self.point_part(record, place, &t, &param, strange):
                        return NOT_PLAIN
                    continue
                if place == GRAD and record.by_rows.length > 0:
                    format = self.format_of(place, &t)
                    if format < 0 or not is_row_major(&other):
                        return NOT_PLAIN
                    record.values = fo_array(
                        data=<char *>t.data + t.byte_offset, extra=NULL, format=<fo_format>format,
                        map=FO_EACH)
                    continue
                if not same_shape(&other, &param):
                    return NOT_PLAIN
            if not same_order(&other, &param):
                if (place != GRAD or self.zeroes) and repeats(&other):
                    return NOT_PLAIN
                record.elsewhere |= 1 << place
            format = self.format_of(place, &t)
            if format < 0 or not self.fits(leaf, place, format):
                return NOT_PLAIN
            if (format == FO_S8 or format == FO_U8) != (record.coded >> place & 1):
                return NOT_PLAIN
            array.data = <char *>t.data + t.byte_offset
            array.format = <fo_format>format
            if place >= ARRAYS:
                continue
            record.n_arrays += leaf.n > 0
            if strange != NULL and place != PARAM and not self.is_known(
                    place, record.tensors[place], array.data):
                strange[0] |= 1 << place
            if FORMATS[format].extra:
                if record.tensors[ARRAYS + place] == NULL:
                    if place != PARAM:
                        return NOT_PLAIN
                    if record.tensors[GRAD] != NULL:
                        return LACKS
                    array.format = FO_BF16  # of a parameter that was never stepped: all there is
                    continue
                if not self.take_extra(record, place, array, &param):
                    return NOT_PLAIN
                record.n_arrays += leaf.n > 0
                if strange != NULL and not self.is_known(
                        ARRAYS + place, record.tensors[ARRAYS + place], array.extra):
                    strange[0] |= 1 << (ARRAYS + place)
            if FORMATS[format].stochastic:
                record.noisy = True
                if record.tensors[COUNT] == NULL and record.tensors[GRAD] != NULL:
                    return LACKS  # the noise of a step is keyed by its number
        return ELSEWHERE if record.elsewhere else FITS

    cdef bint point_part(self, LeafRecord *record, int place, const DLTensor *t,
                         const Axes *param, unsigned int *strange) except -1:
        """Point the last leaf at state that lies otherwise than the parameter."""
        cdef fo_leaf *leaf = &self.leaves[self.n - 1]
        cdef fo_array *array = array_at(leaf, place)
        cdef fo_shape *shape = &record.shape
        cdef Axes axes = axes_of(t)
        cdef int format = dtype_of(t), k
        shape.every, shape.matrices = self.plan.every, 1
        if self.kind == FO_ROWWISE:
            shape.rows, shape.columns = 1, 1
            for k in range(param.ndim):
                if k == 0:
                    shape.rows = param.shape[0]
                else:
                    shape.columns *= param.shape[k]
        elif param.ndim > 1:
            shape.rows, shape.columns = param.shape[param.ndim - 2], param.shape[param.ndim - 1]
            for k in range(param.ndim - 2):
                shape.matrices *= param.shape[k]
        array.map, array.extra = self.plan.maps[place], shape
        if (not is_row_major(&axes) or count_elements(&axes) != fo_count(array, leaf.n)
                or format != (FO_F64 if leaf.param.format == FO_F64 else FO_F32)
                or axes.ndim != (1 if array.map == FO_EVERY else param.ndim)):
            return False
        for k in range(axes.ndim):
            if self.kind == FO_ROWWISE:
                if axes.shape[k] != (1 if k > 0 else param.shape[0]):
                    return False
            elif array.map != FO_EVERY and axes.shape[k] != param.shape[k] and (
                    axes.shape[k] != 1 or k != param.ndim - (1 if array.map == FO_ROWS else 2)):
                return False
        array.data = <char *>t.data + t.byte_offset
        array.format = <fo_format>format
        record.n_arrays += fo_count(array, leaf.n) > 0
        if strange != NULL and not self.is_known(place, record.tensors[place], array.data):
            strange[0] |= 1 << place
        return True

    cdef bint fits(self, const fo_leaf *leaf, int place, int format) noexcept:
        """Whether a step of the parameter's compute type takes a format."""
        cdef bint is_double = leaf.param.format == FO_F64
        if place == PARAM or place == GRAD:
            return True
        if place == COPY:
            return format != (FO_F32 if is_double else FO_F64)
        return (format == FO_F64) == is_double

    cdef int format_of(self, int place, const DLTensor *t) except -2:
        """The format of a tensor by its place and dtype; -1 if there is none."""
        cdef int format = dtype_of(t)
        if place >= ARRAYS or format == FO_F32 or format == FO_F64:
            return format
        if place == PARAM and format == FO_F16:
            return FO_F16_STOCHASTIC
        if place == PARAM and format == FO_BF16:
            return self.plan.bfloat16
        if format == FO_BF16:
            return FO_BF16_STOCHASTIC
        if place != PARAM and is_int(t, kDLUInt, 8):
            return FO_U8 if self.plan.squares >> place & 1 else FO_S8
        return -1

    cdef bint take_extra(self, LeafRecord *record, int place, fo_array *array,
                         const Axes *param) except -1:
        """Point an array at its residual bits, or at the exponents of its blocks."""
        cdef DLTensor t
        cdef Axes axes
        if not self.resolve(<object>record.tensors[ARRAYS + place], &t):
            return False
        axes = axes_of(&t)
        if array.format == FO_S8 or array.format == FO_U8:
            if (not is_int(&t, kDLUInt, 8) or not is_row_major(&axes) or count_elements(&axes)
                    != (count_elements(param) + FO_BLOCK - 1) // FO_BLOCK):
                return False
        else:
            if (not is_int(&t, kDLInt, 16 if array.format == FO_BF16_LOW16 else 8)
                    or not same_shape(&axes, param)):
                return False
            if not same_order(&axes, param):
                if repeats(&axes):
                    return False
                record.elsewhere |= 1 << (ARRAYS + place)
        array.extra = <char *>t.data + t.byte_offset
        return True

    cdef inline bint is_plain(self, tensor) except -1:
        return (type(tensor) is self.parameter or type(tensor) is self.tensor
                or self.is_other_plain(type(tensor)))

    cdef bint is_other_plain(self, kind) except -1:
        known = self.types.get(kind)
        if known is None:
            known = self.types[kind] = bool(self.is_plain_type(kind))
        return known

    cdef inline bint is_known(self, int place, PyObject *tensor, void *address) noexcept:
        """Whether the sign of a tensor of the last leaf has been checked, at the same address."""
        cdef Asked *asked = &self.asked[self.number]
        if asked.tensors[place] == tensor and asked.addresses[place] == address:
            return True
        self.addresses[place] = address
        asked.tensors[place] = NULL
        return False

    cdef bint is_positive(self, int place, PyObject *tensor) except -1:
        """Check the sign of a tensor that is not known; from now on it is known."""
        cdef Asked *asked = &self.asked[self.number]
        if self.has_sign(tensor):
            return False
        asked.tensors[place], asked.addresses[place] = tensor, self.addresses[place]
        return True

    cdef inline bint is_positive_now(self, PyObject *tensor) except -1:
        """Whether a tensor, if there is one, is plain and without a sign."""
        return tensor == NULL or (
            self.is_plain(<object>tensor) and not self.has_sign(tensor))

    cdef bint has_sign(self, PyObject *tensor) except -1:
        """Whether the values are those in memory times -1, as of the imaginary part of a conj()."""
        kind = type(<object>tensor)
        if kind is self.parameter or kind is self.tensor:
            return self.tell_sign(tensor)
        with self.copier.plainly():  # else it asks __torch_function__, in Python
            return self.tell_sign(tensor)

    cdef inline bint tell_sign(self, PyObject *tensor) noexcept:
        cdef PyObject *answer = self.is_neg(tensor, NULL)
        if answer == NULL:
            PyErr_Clear()
            return True
        negative = <object>answer
        Py_DECREF(negative)
        return negative is True

    cdef bint resolve(self, tensor, DLTensor *out) except -1:
        """Describe a tensor of plain kind in the memory of the CPU; False if it is not that."""
        cdef Axes axes
        if not self.is_plain(tensor):
            return False
        if self.api == NULL:
            if not self.resolve_by_capsule(tensor, out):
                return False
        elif self.api.dltensor_from_py_object_no_sync(<void *>tensor, out) != 0:
            PyErr_Clear()  # `_stand_in` says why
            return False
        if out.device.device_type != kDLCPU:
            return False
        axes = axes_of(out)
        return out.data != NULL or count_elements(&axes) == 0

    cdef bint resolve_by_capsule(self, tensor, DLTensor *out) except -1:
        try:
            capsule = self.export(tensor)
        except Exception:
            return False  # as above
        out[0] = (<DLManagedTensor *>PyCapsule_GetPointer(capsule, b"dltensor")).dl_tensor
        self.capsules.append(capsule)
        return True

    cdef ptrdiff_t constants(self, ptrdiff_t group, ptrdiff_t step, ptrdiff_t count) except -1:
        """Index of the constants of a group at a step, computed once: see `_constants`."""
        key = (self.plan, step, count)
        index = self.seen.get(key)
        if index is None:
            index = self.seen[key] = add_constants(
                &self.hypers, self.scalar_names, self.owner._constants(group), step, count)
        return index

    # -------------------------------------------------------------- memory

    cdef int check_memory(self, bint copies) except -1:
        """Refuse two arrays that the step writes, or a gradient and one of them, that share a
        byte."""
        cdef ptrdiff_t i
        if not self.refresh():
            self.collect()
        self.refuse_overlap(&self.spans)
        for i in range(self.n):
            self.refuse_alias(&self.spans, i, GRAD)
        self.check_others(self.zeroes, copies)
        if self.targets:
            self.refuse_shared()
        return 0

    cdef int refuse_shared(self) except -1:
        """The same for tensors that were stepped on copies, which are written back.

        They may have gaps, which hold other tensors: where their ranges of memory have a byte in
        common, `_torch_plain.shared` looks at each element, once for the same tensors in the same
        place.
        """
        cdef DLTensor t
        cdef Axes axes
        cdef Span own
        cdef ptrdiff_t i, n = len(self.targets)
        cdef int k
        cdef int64_t size
        cdef uintptr_t low, high, first = <uintptr_t>-1, last = 0
        cdef bint suspect = False
        cdef Spans *targets = &self.targets_spans
        if targets.capacity < n:
            targets.of = <Span *>grow(targets.of, n, sizeof(Span))
            targets.capacity = n
        targets.n = 0
        for i in range(n):
            size = self.target(i, &t)
            axes = axes_of(&t)
            if count_elements(&axes) == 0:
                continue
            low = high = <uintptr_t>t.data + t.byte_offset
            high += size
            for k in range(t.ndim):
                high += (t.shape[k] - 1) * t.strides[k] * size
            first, last = min(first, low), max(last, high)
            targets.of[targets.n] = Span(low=low, high=high, leaf=i, place=0)
            targets.n += 1
            suspect |= alias(&self.spans, low, high) >= 0
            suspect |= alias(&self.others, low, high) >= 0
        suspect |= overlap(targets) > 0
        for i in range(self.n):
            if locate(&self.leaves[i], i, GRAD, &own):
                suspect |= alias(targets, own.low, own.high) >= 0
        if not suspect:
            return 0
        members, names = [], []
        for i in range(n):
            size = self.target(i, &t)
            axes = axes_of(&t)
            if count_elements(&axes) > 0:
                members.append((
                    <uintptr_t>t.data + t.byte_offset, tuple([t.shape[k] for k in range(t.ndim)]),
                    tuple([t.strides[k] * size for k in range(t.ndim)]), size))
                names.append(self.labels[i])
        for spans in range(2):
            for i in range(self.others.n if spans else self.spans.n):
                own = self.others.of[i] if spans else self.spans.of[i]
                if own.low < last and first < own.high:
                    members.append((own.low, (own.high - own.low,), (1,), 1))
                    names.append((own.leaf, own.place))
        n = len(members)
        if not self.zeroes:  # else they are among the others
            for i in range(self.n):
                if (locate(&self.leaves[i], i, GRAD, &own)
                        and own.low < last and first < own.high):
                    members.append((own.low, (own.high - own.low,), (1,), 1))
                    names.append((i, GRAD))
        if members == self.apart:
            return 0
        self.apart = None
        pair = self.owner._shared(members, n)
        if pair is None:
            self.apart = members
            return 0
        a, b = [
            label if isinstance(label, str) else self.name(label[0], label[1])
            for label in (names[pair[0]], names[pair[1]])
        ]
        if pair[1] >= n:
            _check.alias(b, a)
        _check.overlap(min(a, b), max(a, b))

    cdef int target(self, ptrdiff_t i, DLTensor *t) except -1:
        """Describe a tensor that is written back; return the bytes of its elements."""
        if not self.resolve(self.targets[i], t):
            raise SystemError("fusedopt: a tensor changed meanwhile; please report")
        return t.dtype.bits // 8

    cdef bint refresh(self) noexcept:
        """Give the spans of the last step the addresses of this one; False if they do not fit."""
        cdef ptrdiff_t i, leaf
        cdef Span *span
        if self.spans.n != self.n_arrays:
            return False
        for i in range(self.spans.n):
            span = &self.spans.of[i]
            leaf = span.leaf
            if leaf >= self.n or not locate(&self.leaves[leaf], leaf, span.place, span):
                return False
        return True

    cdef int collect(self) except -1:
        cdef ptrdiff_t i
        cdef int place
        if self.spans.capacity < self.capacity * GRAD:
            self.spans.capacity = self.capacity * GRAD
            self.spans.of = <Span *>grow(self.spans.of, self.spans.capacity, sizeof(Span))
        self.spans.n = 0
        for i in range(self.n):
            for place in range(GRAD):
                self.spans.n += locate(
                    &self.leaves[i], i, place, &self.spans.of[self.spans.n])
        return 0
