# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True, autotestdict=False
"""The border for torch's tensors: what `_arrays.ArrayList` is for arrays.

Tensors are read anew in each step, through DLPack's C exchange API: no pointer outlives the call,
because load_state_dict, FSDP and DeepSpeed exchange the buffers under a tensor. A leaf of plain
tensors is resolved here, in C, and copies stand in for those that are not in its one dense memory
order; any other leaf is handed, whole, to the optimizer's `_stand_in` (see `fusedopt.torch`), which
explains the fault or returns plain tensors.
"""
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memset

from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next, PyDict_Size
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF, Py_INCREF

from fusedopt._c cimport *
from fusedopt._core cimport *
from fusedopt._dlpack cimport *
from fusedopt._spans cimport Span, Spans, alias, overlap

import threading

from fusedopt import _check, _core

cdef extern from "Python.h":
    ctypedef PyObject *(*PyCFunction)(PyObject *, PyObject *)
    enum:
        METH_NOARGS
    void PyErr_Clear()
    PyCFunction PyCFunction_GetFunction(PyObject *) except NULL
    int PyCFunction_GetFlags(PyObject *) except -1


cdef enum:
    EMA = 5      # slot of a leaf's average
    EXTRA = 6    # slots of what belongs to the codes of the parameter and of each state array
    SLOTS = 11   # of what a step writes of a leaf: parameter, FO_MAX_STATES states, average, extras


cdef struct More:
    # what the binding knows of a leaf beside fo_leaf
    ptrdiff_t group, i     # its place in the optimizer
    bint noisy             # whether a store rounds by chance
    int held               # how many tensors are held until the step is over
    PyObject *extras[8]    # what belongs to the codes of each: residual bits, block exponents
    unsigned int coded     # bit k: tensor k is 8-bit codes, by its name in the state
    unsigned int elsewhere  # bit k: tensor k lies in another memory order; 8 + k: its extra does
    PyObject *count        # the tensor that counts its steps, held too, or NULL
    int n_extras           # of the written arrays, how many have one that C takes
    void *counter          # where that is, or NULL if torch shall count
    int counter_format
    int ema                # which of the tensors is the average, or 0
    # of those that are held, the others are undefined:
    PyObject *tensors[8]   # parameter, gradient, state, average
    ptrdiff_t bytes[8]     # of each tensor


cdef struct Asked:
    # state, its extras and the count of a leaf in the last step, if their sign is plus
    PyObject *tensors[17]
    void *addresses[17]


cdef enum:
    FITS, ELSEWHERE, NOT_PLAIN  # what `TensorList.take` finds
    MAX_AXES = 64               # of a tensor that is copied, as in torch


cdef double MAX_COUNT = 2.0**62  # steps, with room to go on in 64 bits


cdef bint choose_order(const More *more, const DLTensor *param, int64_t *strides) noexcept:
    """The memory order in which a leaf is stepped: its parameter's if that is dense.

    8-bit codes are row-major, whatever the parameter is: a block is of neighbours by index, so that
    a copy in another order, as torch.distributed.checkpoint makes, keeps its meaning.
    """
    cdef int k
    cdef int64_t size = 1
    if param.ndim > MAX_AXES:
        return False
    if not more.coded and is_dense(param):
        for k in range(param.ndim):
            strides[k] = param.strides[k]
        return True
    for k in range(param.ndim - 1, -1, -1):
        strides[k] = size
        size *= max(param.shape[k], 1)
    return True


cdef inline int slot_of(const More *more, int k) noexcept:
    """The slot of a tensor (k) or of its extra (8 + k)."""
    if k >= 8:
        return EXTRA + (k - 8 and k - 9)
    return EMA if more.ema and k == more.ema else k and k - 1


cdef inline void hold(More *more, tensor) noexcept:
    Py_INCREF(tensor)
    more.tensors[more.held] = <PyObject *>tensor
    more.held += 1


cdef inline void exchange(PyObject **held, tensor) noexcept:
    Py_INCREF(tensor)
    if held[0] != NULL:
        Py_DECREF(<object>held[0])
    held[0] = <PyObject *>tensor


cdef inline void let_go(More *more, int left) noexcept:
    """Drop the count, and all but the first tensors of a leaf."""
    while more.held > left:
        more.held -= 1
        Py_DECREF(<object>more.tensors[more.held])
        if more.extras[more.held] != NULL:
            Py_DECREF(<object>more.extras[more.held])
            more.extras[more.held] = NULL
    if more.count != NULL:
        Py_DECREF(<object>more.count)
        more.count = NULL


cdef inline PyObject *entry(own, name, Py_ssize_t *at) except? NULL:
    """The value of a key: of the next entry, if it is that one's, which saves the search."""
    cdef Py_ssize_t after = at[0]
    cdef PyObject *key
    cdef PyObject *value
    if PyDict_Next(own, &after, &key, &value) and key == <PyObject *>name:
        at[0] = after
        return value
    return PyDict_GetItemWithError(own, name)


cdef class Copier:
    """Copies tensors into others, plain ones, in one call in which no Python code runs.

    A signal's exception comes before or after it, never between two tensors.
    """
    cdef object copy, set_grad, is_grad, plainly

    def __cinit__(self):
        import torch

        self.copy, self.plainly = torch.Tensor.copy_, torch._C.DisableTorchFunction
        self.set_grad, self.is_grad = torch._C._set_grad_enabled, torch.is_grad_enabled

    def call(self, bint grad, function, *args):
        """Call a function with autograd on or off; it is as before however the call ends.

        (A signal's exception in the `__exit__` of torch.no_grad, which is Python code, leaves it
        off.)
        """
        before = self.is_grad()
        self.set_grad(grad)
        try:
            return function(*args)
        finally:
            self.set_grad(before)

    cdef int run(self, list targets, list sources) except -1:
        cdef Py_ssize_t i
        if not targets:
            return 0
        grad = self.is_grad()
        with self.plainly():  # a default device, say, is a mode written in Python
            self.set_grad(False)
            try:
                for i in range(len(targets)):
                    self.copy(targets[i], sources[i])
            finally:
                self.set_grad(grad)
        return 0

    cdef int put_back(self, target, source) except -1:
        """Copy a tensor into one that had its shape."""
        with self.plainly():
            if target.shape != source.shape:  # copy_ would repeat the values
                raise ValueError(f"its shape was {tuple(source.shape)}, now {tuple(target.shape)}")
            self.set_grad(False)
            self.copy(target, source)
        return 0


cdef class Swap:
    """A context in which tensors hold other values; they are themselves again however it ends.

    In C, as between the bytecodes of a Python `__exit__` a signal could raise an exception. (So it
    can in that of torch.no_grad, used by the owner; autograd is left as it was found.)

    Parameters
    ----------
    copier : Copier
    owner : optimizer
        Its ``_is_swapped`` says whether such a context is entered; asked to
        ``_prepare_swap() -> (targets, sources, kept, names)``: lists of tensors, those to exchange,
        what they shall hold, copies of what they do hold, and what to call them; and to
        ``_forget_weights()`` after each exchange, maybe more than once.
    """
    cdef Copier copier
    cdef object owner
    cdef list targets, kept, names

    def __cinit__(self, Copier copier not None, owner):
        self.copier, self.owner = copier, owner

    def __enter__(self):
        if self.kept is not None:
            raise RuntimeError("this context is entered already; make another")
        refuse_within_swap(self.owner)
        grad = self.copier.is_grad()
        try:
            targets, sources, kept, names = self.owner._prepare_swap()
            self.targets, self.kept, self.names = targets, kept, names
            self.owner._is_swapped = True
            try:
                self.copier.run(targets, sources)
                self.owner._forget_weights()
            except BaseException:
                self.restore()
                raise
        finally:
            self.copier.set_grad(grad)

    def __exit__(self, *exc):
        fault = self.restore()
        if fault is not None:
            raise fault

    cdef object restore(self):
        """Return the exception of a signal that came meanwhile, or of what is not back, or None."""
        cdef int _
        cdef Py_ssize_t i
        fault, grad = None, self.copier.is_grad()
        for i in range(len(self.targets)):
            for _ in range(3):
                try:
                    self.copier.put_back(self.targets[i], self.kept[i])
                    break
                except BaseException as exc:
                    last = exc
            else:
                fault = RuntimeError(
                    f"{self.names[i]}: cannot take back the values that it had before swap_ema: "
                    f"{last}")
                fault.__cause__ = last
        for _ in range(3):
            try:
                self.owner._forget_weights()
                break
            except BaseException as exc:
                fault = fault or exc
        self.copier.set_grad(grad)
        self.targets = self.kept = self.names = None
        self.owner._is_swapped = False
        return fault


def refuse_within_swap(owner):
    """Raise RuntimeError if the averages of an optimizer are in the place of its parameters."""
    if owner._is_swapped:
        raise RuntimeError(
            "the averages are in the place of the parameters: leave the block of swap_ema first, "
            "which puts the parameters back"
        )


cdef class TensorList:
    """The leaves of one step of a torch optimizer, as C sees them.

    Parameters
    ----------
    rule : str
        Name of a rule of the C table.
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
    copier : Copier
        Writes back what was stepped on copies.
    """
    cdef int rule
    cdef list scalar_names
    cdef object tensor, parameter, export, is_plain_type
    cdef dict types           # of other types: whether they are plain
    cdef Copier copier
    cdef object claim         # a lock, held during a step
    cdef const DLPackExchangeAPI *api
    cdef PyCFunction is_neg   # called per leaf: as a C function it takes a third of the time
    cdef fo_leaf *leaves
    cdef More *more
    cdef Asked *asked
    cdef void *places[17]     # of those that `is_known` does not know
    cdef Hypers hypers
    cdef Spans spans          # of all arrays that the step writes
    cdef Spans others         # of the tensors that copies are written back to
    cdef list apart           # such tensors, and their neighbours, that were found to be apart
    cdef ptrdiff_t n, room, n_arrays
    cdef ptrdiff_t n_done     # leaves of the last step; 0 if it raised
    cdef ptrdiff_t n_asked    # the same, of the step before
    cdef tuple squares        # of the group: whether each state array holds squares
    cdef int bits             # of the group: of master weights
    cdef bint averages        # of the group: whether the last state array is an average
    cdef Sums sums            # of the leaves, where a step measures
    cdef ptrdiff_t number     # of the parameter, in all groups
    cdef Py_ssize_t at        # of the entry of the state that is tried first
    # of one step
    cdef list capsules        # what must live until the step is over
    cdef list written         # parameters
    cdef list targets, copies  # tensors, and what was stepped in the place of each
    cdef list labels           # of the former: names, or (leaf, slot)
    cdef list made            # (parameter, its new state)
    cdef bint rule_counts     # whether the rule asks for the number of the step
    cdef dict seen            # (group, step, count) -> index of its constants

    def __cinit__(self, str rule, tuple kinds, is_plain, is_neg, exchange, export,
                  Copier copier not None):
        self.rule, self.scalar_names, _, _ = _core.RULES[rule]
        self.tensor, self.parameter = kinds
        self.export, self.is_plain_type, self.copier = export, is_plain, copier
        self.types = {}
        self.claim = threading.Lock()
        if PyCFunction_GetFlags(<PyObject *>is_neg) != METH_NOARGS:
            raise TypeError("is_neg: expected a builtin method without arguments")
        self.is_neg = PyCFunction_GetFunction(<PyObject *>is_neg)
        if exchange is not None:
            self.api = <const DLPackExchangeAPI *>PyCapsule_GetPointer(
                exchange, b"dlpack_exchange_api")
            if (self.api.header.version.major != DLPACK_MAJOR_VERSION
                    or self.api.dltensor_from_py_object_no_sync == NULL):
                self.api = NULL

    def __dealloc__(self):
        free(self.leaves)
        free(self.more)
        free(self.asked)
        free(self.hypers.of)
        free(self.spans.of)
        free(self.others.of)
        free(self.sums.stats)
        free(self.sums.tiles)

    def step(self, owner, list groups, bint counted, state, int threads, around=None):
        """One step of all tensors that have a gradient; either all of it happens or none.

        Parameters
        ----------
        owner : optimizer
            Asked, where needed, to ``_make_state``, ``_stand_in``, ``_copy``, ``_count``,
            ``_refuse_both``, ``_shared``, ``_constants`` and ``_name``: see `fusedopt.torch`.
        groups : list of tuple
            Of each group: its parameters, a list; of the state arrays that its options use the
            names, those in 8-bit codes, those of what belongs to the codes, and whether each
            holds squares; the bits of master weights, the seed of the noise, and whether the last
            state array is an average.
        counted : bool
            Whether the state of a leaf has its number of steps.
        state : dict of dict
            The optimizer's state; of a new leaf it is added when the step has succeeded.
        threads : int
        around : Around, optional
            What the step shall do around the rule: clip by the norm, measure.

        Returns
        -------
        list of tensor
            The parameters that were written, for their version counters.
        tuple or None
            With `around`: the gradients' norm or None, the factor of the clip, and None or names,
            sizes and statistics of the leaves.
        """
        cdef fo_status status
        cdef fo_run how
        cdef ptrdiff_t i
        cdef fo_mode before
        if not self.claim.acquire(False):
            raise RuntimeError(
                f"{type(owner).__name__}.step: another thread is in a step of this optimizer; "
                "use one optimizer for each thread, or a lock"
            )
        before = fo_enter_ieee()
        grad = self.copier.is_grad()
        try:
            self.copier.set_grad(False)
            self.n = self.n_arrays = self.hypers.n = self.at = 0
            self.number = -1
            self.n_asked, self.n_done = self.n_done, 0
            self.rule_counts = owner._counts
            self.capsules, self.written, self.seen = [], [], {}
            self.targets, self.copies, self.labels, self.made = [], [], [], []
            for number, plan in enumerate(groups):
                self.gather(owner, number, plan, counted, state)
            self.refuse_overlap(owner)
            memset(&how, 0, sizeof(how))
            outcome = None
            if around is not None:
                outcome = self.judge(around, &how, threads)
            with nogil:
                status = run_step(
                    self.rule, self.leaves, self.n, self.hypers.of, self.hypers.n, &how, threads)
            check(status)
            self.n_done = self.n
            self.finish(owner, state)
            if around is not None:
                outcome = (*outcome, self.measured(owner) if around.measure else None)
            return self.written, outcome
        finally:
            for i in range(self.n):
                let_go(&self.more[i], 0)
            self.capsules = self.targets = self.copies = self.labels = self.made = None
            self.copier.set_grad(grad)
            fo_leave_ieee(before)
            self.claim.release()

    cdef tuple judge(self, around, fo_run *how, int threads):
        """Measure the gradients where a clip must know their norm; set the leaves' scales."""
        cdef fo_status status
        cdef fo_stats total
        cdef double factor = 1
        cdef ptrdiff_t i
        make_room(&self.sums, self.leaves, self.n, how)
        how.measure = <fo_measures><int>around.measure
        norm = None
        if around.max_grad_norm is not None:
            how.norm_only = around.norm_only
            with nogil:
                status = run_measure(self.leaves, self.n, how, threads)
            check(status)
            how.has_grad = 1
            total = sum_stats(self.sums.stats, self.n)
            norm = around.norm(total.grad, total.largest_grad)
            factor = around.factor(norm)
            for i in range(self.n):
                self.leaves[i].grad_scale = factor
        return norm, factor

    cdef tuple measured(self, owner):
        cdef ptrdiff_t i
        names = [self.name(owner, i) for i in range(self.n)]
        sizes = [self.leaves[i].n for i in range(self.n)]
        return names, sizes, stats_table(&self.sums, self.n)

    cdef int finish(self, owner, state) except -1:
        """Count the step, write what was done on copies, and take over new state."""
        cdef ptrdiff_t i
        cdef int _
        cdef More *more
        fault = None
        for i in range(self.n):
            more = &self.more[i]
            if more.counter == NULL:
                if more.count != NULL:
                    count = <object>more.count
                    count += 1
            elif more.counter_format == FO_F32:
                (<float *>more.counter)[0] += 1
            else:
                (<double *>more.counter)[0] += 1
        # backwards: a copy may have been copied again
        self.copier.run(self.targets[::-1], self.copies[::-1])
        for param, own in self.made:
            for _ in range(3):
                try:
                    state.setdefault(param, {}).update(own)
                    break
                except BaseException as exc:  # of a signal: Tensor.__hash__ is Python code
                    fault = exc
        if fault is not None:
            raise fault
        return 0

    # -------------------------------------------------------------- leaves

    cdef int gather(self, owner, ptrdiff_t group, tuple plan, bint counted, state) except -1:
        """Add the leaves of a group that have a gradient."""
        cdef ptrdiff_t i = -1, step, count, last = -1, last_count = -1, index = -1
        cdef More *more
        cdef list params
        cdef tuple names, codes, extras
        cdef uint64_t seed
        params, names, codes, extras, self.squares, self.bits, seed, self.averages = plan
        for param in params:
            i += 1
            self.number += 1
            own = self.state_of(state, param)
            grad = param.grad
            if grad is None:
                continue
            more = self.new_leaf(group, i)
            hold(more, param)
            hold(more, grad)
            step = 2  # of a rule that does not count: its first, or another
            if not self.read_state(owner, more, own, names, codes, extras, counted):
                let_go(more, 2)
                made, begins = owner._make_state(group, i, param, own)
                self.made.append((param, made))
                own = {**own, **made} if own else made
                step = 1 if begins else 2
                if not self.read_state(owner, more, own, names, codes, extras, counted):
                    raise SystemError("fusedopt: incomplete state; please report")
            self.fill(owner, more, names, codes)
            count = 1 + self.read_count(owner, more) if more.count != NULL else step
            if more.noisy:
                self.leaves[self.n - 1].key = noise_key(seed, self.number, count)
            if self.rule_counts:
                step = count
            if not counted:
                count = 0
            if step != last or count != last_count:
                index, last, last_count = self.hyper(owner, group, step, count), step, count
            self.leaves[self.n - 1].hyper = index
        return 0

    cdef object state_of(self, state, param):
        """The state of a parameter, or None.

        Entries usually follow one another as the parameters do, and to find one by its key means
        to run Tensor.__hash__ in Python: the next entry is tried first.
        """
        cdef Py_ssize_t at = self.at
        cdef PyObject *key
        cdef PyObject *value
        if PyDict_Next(state, &at, &key, &value) and key == <PyObject *>param:
            self.at = at
            return <object>value
        return state.get(param)

    cdef bint read_state(self, owner, More *more, own, tuple names, tuple codes, tuple extras,
                         bint counted) except -1:
        """Hold the tensor that counts steps, and the state arrays in use; False if one is missing.
        """
        cdef Py_ssize_t at = 0
        cdef PyObject *value
        cdef Py_ssize_t i
        cdef int k = 0
        more.coded = 0
        if own is None:
            return not names and not counted
        if counted or PyDict_Size(own) > len(names):
            value = entry(own, "step", &at)
            if value != NULL:
                Py_INCREF(<object>value)
                more.count = value
            elif counted:
                return False
        for i in range(len(names)):
            value = entry(own, names[i], &at)
            if (value == NULL or <object>value is None) and codes[i] is not None:
                value = entry(own, codes[i], &at)
                more.coded |= 1 << more.held
            if value == NULL or <object>value is None:
                return False
            hold(more, <object>value)
        if PyDict_Size(own) > len(names) + counted:
            for i in range(len(names)):
                if codes[i] is not None and not more.coded >> (i + 2) & 1:
                    value = entry(own, codes[i], &at)
                    if value != NULL and <object>value is not None:
                        owner._refuse_both(more.group, more.i, names[i])
            for name in extras:  # of the parameter, then of each state array
                value = entry(own, name, &at)
                if value != NULL and <object>value is not None:
                    Py_INCREF(<object>value)
                    more.extras[k] = value
                k += 1 + (k == 0)
        return True

    cdef More *new_leaf(self, ptrdiff_t group, ptrdiff_t i) except NULL:
        cdef ptrdiff_t room = 2 * self.room + 8
        cdef More *more
        if self.n == self.room:
            self.leaves = <fo_leaf *>grow(self.leaves, room, sizeof(fo_leaf))
            self.more = <More *>grow(self.more, room, sizeof(More))
            self.asked = <Asked *>grow(self.asked, room, sizeof(Asked))
            self.room = room
        memset(&self.leaves[self.n], 0, sizeof(fo_leaf))
        self.leaves[self.n].grad_scale = 1
        more = &self.more[self.n]
        memset(more, 0, <char *>&more.tensors - <char *>more)
        more.group, more.i = group, i
        if self.n >= self.n_asked:
            memset(&self.asked[self.n], 0, sizeof(Asked))
        self.n += 1
        return more

    cdef ptrdiff_t read_count(self, owner, More *more) except -1:
        """Steps that a leaf has taken; where they are counted is noted for `finish`."""
        cdef DLTensor t
        cdef double taken
        cdef int format
        cdef void *at
        count = <object>more.count
        if self.resolve(count, &t) and size_of(&t) == 1 and (
                dtype_of(&t) == FO_F32 or dtype_of(&t) == FO_F64) and (
                self.is_known(16, more.count, <char *>t.data + t.byte_offset)
                or (self.is_positive(16, more.count) and self.resolve(count, &t))):
            at, format = <char *>t.data + t.byte_offset, dtype_of(&t)
            taken = (<float *>at)[0] if format == FO_F32 else (<double *>at)[0]
            if 0 <= taken < MAX_COUNT and taken == <double><ptrdiff_t>taken:
                more.counter, more.counter_format = at, format
                return <ptrdiff_t>taken
        return owner._count(more.group, more.i, count)

    cdef int fill(self, owner, More *more, tuple names, tuple codes) except -1:
        """Point the last leaf at its tensors, or at stand-ins."""
        cdef int k, result
        cdef list tensors, extras
        param = <object>more.tensors[0]
        result = self.take(more)
        if result == NOT_PLAIN:
            memset(&self.asked[self.n - 1], 0, sizeof(Asked))
            tensors, extras = [], [None] * more.held
            for k in range(more.held):
                tensors.append(<object>more.tensors[k])
                if more.extras[k] != NULL:
                    extras[k] = <object>more.extras[k]
            names = tuple(
                [codes[k] if more.coded >> (k + 2) & 1 else names[k] for k in range(len(names))])
            tensors, extras, back, made = owner._stand_in(
                more.group, more.i, names, tensors, extras, more.count != NULL)
            for tensor, copy, name in back:
                self.targets.append(tensor)
                self.copies.append(copy)
                self.labels.append(name)
            if made:
                self.made.append((param, made))
                if "step" in made:
                    Py_INCREF(made["step"])
                    more.count = <PyObject *>made["step"]
            for k in range(more.held):
                exchange(&more.tensors[k], tensors[k])
                if extras[k] is not None:
                    exchange(&more.extras[k], extras[k])
            result = self.point(more, NULL)
        if result == ELSEWHERE:
            self.lay(owner, more)
            result = self.point(more, NULL)
        if result != FITS:
            raise SystemError("fusedopt: a stand-in does not fit; please report")
        self.written.append(param)
        if self.leaves[self.n - 1].n > 0:
            self.n_arrays += more.held - 1 + more.n_extras
        return 0

    cdef int lay(self, owner, More *more) except -1:
        """Put copies in the place of tensors that are `elsewhere`."""
        cdef DLTensor t
        cdef int64_t strides[MAX_AXES]
        cdef int k
        cdef PyObject **held
        if not self.resolve(<object>more.tensors[0], &t) or not choose_order(more, &t, strides):
            raise SystemError("fusedopt: a tensor changed meanwhile; please report")
        order = tuple([strides[k] for k in range(t.ndim)])
        for k in range(16):
            if more.elsewhere >> k & 1:
                held = &more.tensors[k] if k < 8 else &more.extras[k - 8]
                tensor = <object>held[0]
                copy = owner._copy(tensor, order)
                if k != 1:
                    self.targets.append(tensor)
                    self.copies.append(copy)
                    self.labels.append((self.n - 1, slot_of(more, k)))
                exchange(held, copy)
        return 0

    cdef int take(self, More *more) except -1:
        """Point the last leaf at [parameter, gradient, *state], if they are as C wants.

        DLPack does not tell the sign of a tensor. Parameters and gradients, which others exchange,
        are asked for theirs each time; state where it is another tensor, or in another place.
        """
        cdef int k, result
        cdef unsigned int strange = 0
        for k in range(2):
            if not self.is_plain(<object>more.tensors[k]) or self.has_sign(more.tensors[k]):
                return NOT_PLAIN
        result = self.point(more, &strange)
        if result == NOT_PLAIN or not strange:
            return result
        for k in range(16):
            if strange >> k & 1 and not self.is_positive(
                    k, more.tensors[k] if k < 8 else more.extras[k - 8]):
                return NOT_PLAIN
        return self.point(more, NULL)  # again, as to ask lets other threads in

    cdef int point(self, More *more, unsigned int *strange) except -1:
        """Do so, but for the signs; note which tensors must be asked, unless NULL.

        All are resolved in one go, in which no Python code runs: the first one's shape is still
        the one that the others are compared with.
        """
        cdef fo_leaf *leaf = &self.leaves[self.n - 1]
        cdef DLTensor param, other
        cdef int64_t strides[MAX_AXES]
        cdef int k, format
        cdef fo_array *array
        more.elsewhere = 0
        more.n_extras = 0
        if not self.resolve(<object>more.tensors[0], &param):
            return NOT_PLAIN
        other = param
        if more.coded or not is_dense(&param):
            if not choose_order(more, &param, strides):
                return NOT_PLAIN
            param.strides = strides
        leaf.n = size_of(&param)
        for k in range(more.held):
            if k == 0:
                array = &leaf.param
            else:
                if not self.resolve(<object>more.tensors[k], &other):
                    return NOT_PLAIN
                if not same_shape(&other, &param):
                    return NOT_PLAIN
                array = &leaf.grad if k == 1 else &leaf.state[k - 2]
                if self.averages and k > 1 and k == more.held - 1:
                    array, more.ema = &leaf.ema, k
            if not same_order(&other, &param):
                if k != 1 and repeats(&other):
                    return NOT_PLAIN
                more.elsewhere |= 1 << k
            format = self.format_of(k, &other)
            if format < 0 or (k > 1 and (format == FO_F64) != (leaf.param.format == FO_F64)):
                return NOT_PLAIN
            if (format == FO_S8 or format == FO_U8) != (more.coded >> k & 1):
                return NOT_PLAIN
            array.data = <char *>other.data + other.byte_offset
            array.format = <fo_format>format
            if strange != NULL and k > 1 and not self.is_known(k, more.tensors[k], array.data):
                strange[0] |= 1 << k
            more.bytes[k] = leaf.n * (other.dtype.bits // 8)
            if format >= FO_BF16_LOW16:
                if not self.take_extra(more, k, array, &param):
                    return NOT_PLAIN
                more.n_extras += 1
                if strange != NULL and not self.is_known(8 + k, more.extras[k], array.extra):
                    strange[0] |= 1 << (8 + k)
            if k != 1 and is_stochastic(format):
                more.noisy = True
                if more.count == NULL:
                    return NOT_PLAIN  # the noise of a step is keyed by its number
        return ELSEWHERE if more.elsewhere else FITS

    cdef int format_of(self, int k, const DLTensor *t) except -2:
        """The format of a parameter (k = 0), a gradient (1) or a state array, by its dtype."""
        cdef int format = dtype_of(t)
        if k == 1 or format == FO_F32 or format == FO_F64:
            return format
        if k == 0 and format == FO_F16:
            return FO_F16_STOCHASTIC
        if k == 0 and format == FO_BF16:
            return (FO_BF16_LOW16 if self.bits == 32 else
                    FO_BF16_LOW8 if self.bits == 24 else FO_BF16_STOCHASTIC)
        if format == FO_BF16:
            return FO_BF16_STOCHASTIC
        if k > 1 and is_int(t, kDLUInt, 8):
            return FO_U8 if self.squares[k - 2] else FO_S8
        return -1

    cdef bint take_extra(self, More *more, int k, fo_array *array, const DLTensor *param) except -1:
        """Point an array at its residual bits, or at the exponents of its blocks."""
        cdef DLTensor t
        if more.extras[k] == NULL or not self.resolve(<object>more.extras[k], &t):
            return False
        if array.format == FO_S8 or array.format == FO_U8:
            if (not is_int(&t, kDLUInt, 8) or t.ndim != 1 or not is_dense(&t)
                    or t.shape[0] != (size_of(param) + FO_BLOCK - 1) // FO_BLOCK):
                return False
        else:
            if (not is_int(&t, kDLInt, 16 if array.format == FO_BF16_LOW16 else 8)
                    or not same_shape(&t, param)):
                return False
            if not same_order(&t, param):
                if repeats(&t):
                    return False
                more.elsewhere |= 1 << (8 + k)
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

    cdef inline bint is_known(self, int k, PyObject *tensor, void *address) noexcept:
        """Whether a tensor of the last leaf has been asked for its sign, in the same place."""
        cdef Asked *asked = &self.asked[self.n - 1]
        if asked.tensors[k] == tensor and asked.addresses[k] == address:
            return True
        self.places[k] = address
        asked.tensors[k] = NULL
        return False

    cdef bint is_positive(self, int k, PyObject *tensor) except -1:
        """Ask a tensor that is not known; from now on it is."""
        cdef Asked *asked = &self.asked[self.n - 1]
        if self.has_sign(tensor):
            return False
        asked.tensors[k], asked.addresses[k] = tensor, self.places[k]
        return True

    cdef bint has_sign(self, PyObject *tensor) except -1:
        """Whether the values are those in memory times -1, as of the imaginary part of a conj()."""
        cdef PyObject *answer = self.is_neg(tensor, NULL)
        if answer == NULL:
            PyErr_Clear()
            return True
        negative = <object>answer
        Py_DECREF(negative)
        return negative is True

    cdef bint resolve(self, tensor, DLTensor *out) except -1:
        """Describe a tensor of plain kind in the memory of the CPU; False if it is not that."""
        if not self.is_plain(tensor):
            return False
        if self.api == NULL:
            if not self.resolve_by_capsule(tensor, out):
                return False
        elif self.api.dltensor_from_py_object_no_sync(<void *>tensor, out) != 0:
            PyErr_Clear()  # `_stand_in` says why
            return False
        return out.device.device_type == kDLCPU and (out.data != NULL or size_of(out) == 0)

    cdef bint resolve_by_capsule(self, tensor, DLTensor *out) except -1:
        try:
            capsule = self.export(tensor)
        except Exception:
            return False  # as above
        out[0] = (<DLManagedTensor *>PyCapsule_GetPointer(capsule, b"dltensor")).dl_tensor
        self.capsules.append(capsule)
        return True

    cdef ptrdiff_t hyper(self, owner, ptrdiff_t group, ptrdiff_t step,
                         ptrdiff_t count) except -1:
        """Index of the constants of a group at a step, computed once: see `_constants`."""
        index = self.seen.get((group, step, count))
        if index is None:
            index = self.seen[(group, step, count)] = add_constants(
                &self.hypers, self.scalar_names, owner._constants(group, step, count))
        return index

    # -------------------------------------------------------------- overlap

    cdef int refuse_overlap(self, owner) except -1:
        """Let no two arrays that the step writes, and no gradient and one of them, share a byte."""
        cdef ptrdiff_t i, found
        cdef uintptr_t low
        if not self.refresh():
            self.collect()
        i = overlap(&self.spans)
        if i > 0:
            a, b = self.span_name(owner, i - 1), self.span_name(owner, i)
            _check.overlap(min(a, b), max(a, b))
        for i in range(self.n):
            low = <uintptr_t>self.leaves[i].grad.data
            found = alias(&self.spans, low, low + self.more[i].bytes[1])
            if found >= 0:
                _check.alias(self.name(owner, i) + ".grad", self.span_name(owner, found))
        if self.targets:
            self.refuse_shared(owner)
        return 0

    cdef int refuse_shared(self, owner) except -1:
        """The same for tensors that were stepped on copies, which are written back.

        They may have gaps, in which others lie: where their ranges of memory have a byte in common,
        `_torch_plain.shared` looks at each element, once for the same tensors in the same place.
        """
        cdef DLTensor t
        cdef ptrdiff_t i, n = len(self.targets)
        cdef int k
        cdef int64_t size
        cdef uintptr_t low, high, first = <uintptr_t>-1, last = 0
        cdef bint suspect = False
        cdef Spans *others = &self.others
        if others.room < n:
            others.of = <Span *>grow(others.of, n, sizeof(Span))
            others.room = n
        others.n = 0
        members, names = [], []
        for i in range(n):
            if not self.resolve(self.targets[i], &t):
                raise SystemError("fusedopt: a tensor changed meanwhile; please report")
            if size_of(&t) == 0:
                continue
            size = t.dtype.bits // 8
            low = high = <uintptr_t>t.data + t.byte_offset
            high += size
            for k in range(t.ndim):
                high += (t.shape[k] - 1) * t.strides[k] * size
            first, last = min(first, low), max(last, high)
            others.of[others.n] = Span(low=low, high=high, leaf=i, slot=0)
            others.n += 1
            suspect |= alias(&self.spans, low, high) >= 0
            members.append((
                low, tuple([t.shape[k] for k in range(t.ndim)]),
                tuple([t.strides[k] * size for k in range(t.ndim)]), size))
            names.append(self.labels[i])
        suspect |= overlap(others) > 0
        for i in range(self.n):
            low = <uintptr_t>self.leaves[i].grad.data
            suspect |= alias(others, low, low + self.more[i].bytes[1]) >= 0
        if not suspect:
            return 0
        for i in range(self.spans.n):
            low, high = self.spans.of[i].low, self.spans.of[i].high
            if low < last and first < high:
                members.append((low, (high - low,), (1,), 1))
                names.append((self.spans.of[i].leaf, self.spans.of[i].slot))
        n = len(members)
        for i in range(self.n):
            low = <uintptr_t>self.leaves[i].grad.data
            high = low + self.more[i].bytes[1]
            if low < last and first < high:
                members.append((low, (high - low,), (1,), 1))
                names.append((i, -1))
        if members == self.apart:
            return 0
        self.apart = None
        pair = owner._shared(members, n)
        if pair is None:
            self.apart = members
            return 0
        a, b = [
            label if isinstance(label, str)
            else self.name(owner, label[0]) + ".grad" if label[1] < 0
            else self.slot_name(owner, label[0], label[1])
            for label in (names[pair[0]], names[pair[1]])
        ]
        if pair[1] >= n:
            _check.alias(b, a)
        _check.overlap(min(a, b), max(a, b))

    cdef bint refresh(self) noexcept nogil:
        """Give the spans of the last step the addresses of this one; False if they do not fit."""
        cdef ptrdiff_t i
        cdef Span *span
        if self.spans.n != self.n_arrays:
            return False
        for i in range(self.spans.n):
            span = &self.spans.of[i]
            if span.leaf >= self.n or not self.locate(span.leaf, span.slot, span):
                return False
        return True

    cdef int collect(self) except -1:
        cdef ptrdiff_t i
        cdef int slot
        if self.spans.room < self.room * SLOTS:
            self.spans.room = self.room * SLOTS
            self.spans.of = <Span *>grow(self.spans.of, self.spans.room, sizeof(Span))
        self.spans.n = 0
        for i in range(self.n):
            for slot in range(SLOTS):
                self.spans.n += self.locate(i, slot, &self.spans.of[self.spans.n])
        return 0

    cdef bint locate(self, ptrdiff_t leaf, int slot, Span *span) noexcept nogil:
        cdef fo_leaf *own = &self.leaves[leaf]
        cdef More *more = &self.more[leaf]
        cdef fo_array *array
        if slot == EMA:
            span.low = <uintptr_t>own.ema.data
            span.high = span.low + (more.bytes[more.ema] if more.ema else 0)
        elif slot >= EXTRA:
            array = &own.param if slot == EXTRA else &own.state[slot - EXTRA - 1]
            span.low = <uintptr_t>array.extra
            span.high = span.low + (
                (own.n + FO_BLOCK - 1) // FO_BLOCK
                if array.format == FO_S8 or array.format == FO_U8
                else 2 * own.n if array.format == FO_BF16_LOW16 else own.n)
        else:
            span.low = <uintptr_t>(own.param.data if slot == 0 else own.state[slot - 1].data)
            span.high = span.low + more.bytes[slot and slot + 1]
        span.leaf, span.slot = leaf, slot
        return 0 < span.low < span.high  # an unused state array is at no address

    cdef str name(self, owner, ptrdiff_t leaf):
        return owner._name(self.more[leaf].group, self.more[leaf].i)

    cdef str span_name(self, owner, ptrdiff_t i):
        return self.slot_name(owner, self.spans.of[i].leaf, self.spans.of[i].slot)

    cdef str slot_name(self, owner, ptrdiff_t leaf, int slot):
        name = self.name(owner, leaf)
        if slot == 0:
            return name
        if slot == EMA:
            return f"{name}.ema"
        if slot == EXTRA:
            return f"{name}.residual"
        if slot > EXTRA:
            return f"{name}.{owner._rule.state_names[slot - EXTRA - 1]}_blocks"
        return f"{name}.{owner._rule.state_names[slot - 1]}"
