# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True, autotestdict=False
"""Copies between torch's tensors that no exception of a signal leaves half done, and undoing."""


def undone(list undo not None, function):
    """Return what a function returns, and undo what it did, however it ends.

    In C, because a signal could raise an exception between the bytecodes of a Python ``finally``. A
    call that such an exception interrupts is repeated; the exception is raised at the end.

    Parameters
    ----------
    undo : list of (name, callable, ...)
        What to call at the end, in this order, with the rest as arguments. Calling one twice has
        the same effect as calling it once.
    function : callable()

    Raises
    ------
    RuntimeError
        Naming what could not be undone; all else is.
    """
    fault = None
    try:
        return function()
    finally:
        for row in undo:
            fault = make_call(<tuple?>row) or fault
        if fault is not None:
            raise fault


cdef object make_call(tuple row):
    """Return the exception of a signal that came meanwhile, or of what failed, or None."""
    cdef int _
    first = None
    for _ in range(3):
        try:
            row[1](*row[2:])
            return first
        except BaseException as exc:
            first = first or exc
            last = exc
    fault = RuntimeError(f"{row[0]}: cannot be restored: {last}")
    fault.__cause__ = last
    return fault


cdef class Copier:
    """Copies tensors into plain ones, in one call in which no Python code runs.

    A signal's exception comes before or after it, never between two tensors.
    """
    def __cinit__(self):
        import torch

        self.copy, self.plainly = torch.Tensor.copy_, torch._C.DisableTorchFunction
        self.set_grad, self.is_grad = torch._C._set_grad_enabled, torch.is_grad_enabled
        self.count_modes = torch._C._len_torch_function_stack

    def call(self, bint grad, function, *args):
        """Call a function with autograd on or off; it is as before however the call ends.

        (A signal's exception in the `__exit__` of torch.no_grad, which is Python code, leaves it
        off.)
        """
        before = self.is_grad()
        try:
            self.enable_grad(grad)
            return function(*args)
        finally:
            self.enable_grad(before)

    cdef int enable_grad(self, grad) except -1:
        """Set autograd on or off without the modes in Python, which a signal could interrupt."""
        if not self.count_modes():
            self.set_grad(grad)
        else:
            with self.plainly():
                self.set_grad(grad)
        return 0

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

    def apply(self, list targets, list sources, list writes):
        """Copy tensors into others, and store (dict, key, value): all of it in this one call."""
        self.run(targets, sources)
        for write in writes:
            (<dict?>(<tuple>write)[0])[(<tuple>write)[1]] = (<tuple>write)[2]

    cdef int put_back(self, target, source) except -1:
        """Copy a tensor into one that had its shape."""
        with self.plainly():
            if target.shape != source.shape:  # copy_ would repeat the values
                raise ValueError(f"its shape was {tuple(source.shape)}, now {tuple(target.shape)}")
            self.set_grad(False)
            self.copy(target, source)
        return 0


cdef class Swap:
    """A context in which tensors hold other values; they get their own back however it ends.

    In C, because a signal could raise an exception between the bytecodes of a Python `__exit__`.
    (That can happen in torch.no_grad, which the owner uses; autograd is restored here.)

    Parameters
    ----------
    copier : Copier
    owner : optimizer
        Its ``_is_swapped`` says whether such a context is entered. ``_prepare_swap() -> (targets,
        sources, kept, names)`` returns lists: the tensors to exchange, their new values, copies of
        their values, and names for messages. ``_forget_weights()`` is called after each exchange,
        perhaps more than once.
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
            self.copier.enable_grad(grad)

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
        self.copier.enable_grad(grad)
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
