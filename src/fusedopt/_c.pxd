"""csrc/fusedopt.h as Cython sees it, nothing else."""

from libc.stdint cimport int32_t, int64_t, uint64_t

cdef extern from *:
    """
    /* With the stable ABI Cython begins a module by importing inspect, for flags of code objects
     * that only its functions in Python's manner have, and crashes where that import fails: it was
     * interrupted, or found another inspect.py. We have no such functions (binding=False). */
    #if CYTHON_COMPILING_IN_LIMITED_API
    #define __Pyx_init_co_variables() ((void)__Pyx_init_co_variables, 0)
    #endif
    """

cdef extern from "ieee.h" nogil:
    ctypedef struct fo_mode:  # a number, or more
        pass

    fo_mode fo_enter_ieee()
    void fo_leave_ieee(fo_mode before)

cdef extern from "fusedopt.h" nogil:
    enum:
        FO_TILE
        FO_BLOCK
        FO_MAX_STATES
        FO_MAX_SCALARS
        FO_STREAMS
        FO_WINDOW

    ctypedef enum fo_status:
        FO_OK
        FO_BAD_ARGUMENT
        FO_DISK_FAILED

    ctypedef enum fo_format:
        FO_F32
        FO_F64
        FO_BF16
        FO_F16
        FO_BF16_STOCHASTIC
        FO_F16_STOCHASTIC
        FO_BF16_LOW16
        FO_BF16_LOW8
        FO_S8
        FO_U8
        FO_FORMATS

    ctypedef struct fo_format_info:
        const char *name
        int size, extra, shift, stochastic

    ctypedef enum fo_map:
        FO_EACH
        FO_EVERY
        FO_ROWS
        FO_COLUMNS

    ctypedef struct fo_shape:
        ptrdiff_t every, matrices, rows, columns
        void *scratch

    ctypedef struct fo_array:
        void *data
        void *extra
        fo_format format
        fo_map map

    ctypedef struct fo_hyper:
        double grad_scale, l2, l1, ema_weight
        double *scalars

    ctypedef struct fo_rows:
        ptrdiff_t length
        const int64_t *rows
        const ptrdiff_t *order
        const ptrdiff_t *starts
        const int32_t *hypers

    ctypedef struct fo_leaf:
        ptrdiff_t n
        fo_array param, grad
        fo_array *state
        fo_array ema, copy
        double grad_scale
        uint64_t key
        ptrdiff_t origin
        const fo_rows *by_rows
        ptrdiff_t hyper

    ctypedef struct fo_stats:
        double grad, param, update, largest_grad, largest_update
        int64_t zeros, nonfinite

    ctypedef enum fo_measures:
        FO_MEASURE_NOTHING
        FO_MEASURE_LEAF
        FO_MEASURE_PARAM

    ctypedef struct fo_region:
        char *start
        size_t bytes
        int64_t offset
        int file, is_read_only
        int64_t process

    ctypedef struct fo_disk:
        const fo_region *regions
        ptrdiff_t n
        int error, has_written

    ctypedef struct fo_run:
        double clip_value
        int zero_grads, has_grad, has_direction, norm_only
        fo_measures measure
        fo_stats *tiles
        fo_stats *stats
        fo_disk *disk

    ctypedef enum fo_kind:
        FO_ELEMENTWISE
        FO_INTERNAL
        FO_ROWWISE
        FO_LAYERWISE
        FO_COUNTING
        FO_FACTORED
        FO_SUMMING
        FO_MATRIX

    ctypedef struct fo_rule:
        const char *name
        const char *const *scalars
        int states, required
        fo_kind kind

    ctypedef struct fo_row_look:
        ptrdiff_t bad
        int ascends

    const fo_rule *fo_rules()
    fo_status fo_step(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                      ptrdiff_t n_hypers, const fo_run *run, int threads)
    fo_status fo_direct(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                        ptrdiff_t n_hypers, const fo_run *run, int threads)
    fo_status fo_measure(fo_leaf *leaves, ptrdiff_t n, const fo_run *run, int threads)
    fo_stats fo_total(const fo_stats *stats, ptrdiff_t n)
    ptrdiff_t fo_count_tiles(const fo_leaf *leaves, ptrdiff_t n)
    size_t fo_scratch(const fo_leaf *leaf)
    ptrdiff_t fo_count(const fo_array *array, ptrdiff_t n)
    fo_row_look fo_look_at_rows(const int64_t *indices, ptrdiff_t k, int64_t count)
    ptrdiff_t fo_sort_rows(const int64_t *indices, ptrdiff_t k, int64_t count, int64_t *rows,
                           ptrdiff_t *starts, ptrdiff_t *order, int64_t *scratch)
    enum:
        FO_NO_COUNT
        FO_NO_ROOM

    ptrdiff_t fo_number_counts(const int64_t *counts, const int64_t *rows, ptrdiff_t k,
                               int64_t *values, int32_t *numbers, int32_t *table, ptrdiff_t slots)
    void fo_add_counts(int64_t *counts, const int64_t *rows, ptrdiff_t k)
    fo_status fo_sum_rows(fo_leaf *leaves, ptrdiff_t n, int threads)
    const fo_format_info *fo_formats()
    uint64_t fo_key(uint64_t seed, uint64_t leaf, uint64_t step)
    fo_status fo_zero_state(fo_leaf *leaves, ptrdiff_t n, int threads)
    fo_status fo_stream(fo_leaf *leaves, ptrdiff_t n, int how, int threads)
    void *fo_allocate(size_t bytes)
    void fo_release(void *memory)
    int fo_map_file(fo_region *region)
    void fo_unmap_file(const fo_region *region)
    void fo_close_file(int file)
    int fo_relieve(const fo_disk *disk, void *data, size_t bytes)
    int fo_copy(const fo_disk *disk, void *to, const void *source, size_t bytes)
    const char *const *fo_isas()
    const char *fo_isa()
    fo_status fo_select_isa(const char *name)
    const char *fo_backend()

    ctypedef struct fo_lateness:
        long late, alone
        int is_alone

    fo_lateness fo_late()
    void fo_force_threads(int yes)
