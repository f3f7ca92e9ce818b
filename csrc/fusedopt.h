/* fusedopt: optimizer steps over many arrays, in place, in one pass over memory.
 *
 * The whole interface of the C library, which is independent of Python. A step is a list of leaves
 * (one leaf = one parameter, its gradient and its state) and a list of sets of constants, to which
 * the leaves refer by index. The caller owns every array and every list. A step does not allocate,
 * print or abort, so it cannot fail after its first write, unless state is on a disk that fails. */
#ifndef FUSEDOPT_H
#define FUSEDOPT_H

#include <stddef.h>
#include <stdint.h>

enum {
    FO_TILE = 512, /* elements of the unit of work; a tile never crosses a tensor */
    FO_BLOCK = 64, /* elements that are decoded together and share an exponent in 8-bit formats */
    FO_MAX_STATES = 4,   /* state arrays of a rule; FO_EACH_STATE in sets.h lists them */
    FO_MAX_SCALARS = 12, /* constants of a rule */
    FO_LANES = 16        /* sums: element i of a tile, or tile i of a leaf, goes to lane i % 16 */
};

typedef enum fo_status {
    FO_OK = 0,
    FO_BAD_ARGUMENT, /* unknown rule, format, hyper index or a missing state; nothing was written */
    FO_DISK_FAILED,  /* see fo_disk.error: some leaves may have been stepped */
} fo_status;

/* How the elements of an array are stored. FO_F64 computes in double, all others in float.
 * "Stochastic" formats round up with the probability that keeps the mean; the noise depends on the
 * leaf's key and the element's index in the whole tensor alone. A bf16 with a residual is the bf16
 * nearest to a longer float (ties away from zero), and the difference of the two bit patterns.
 * 8-bit formats are block floats: see codec/block8.h. */
typedef enum fo_format {
    FO_F32,
    FO_F64,
    FO_BF16,            /* to nearest, ties to even */
    FO_F16,             /* to nearest, ties to even */
    FO_BF16_STOCHASTIC, /* as FO_BF16, rounded stochastically */
    FO_F16_STOCHASTIC,
    FO_BF16_LOW16, /* bf16 and 16 residual bits: a float32, exactly */
    FO_BF16_LOW8,  /* bf16 and 8 residual bits: a float cut to 24 bits; stochastic */
    FO_S8,         /* block float: sign, 4 exponent bits, 3 mantissa bits; stochastic */
    FO_U8,         /* block float without sign: 5 exponent bits, 3 mantissa bits; stochastic */
    FO_FORMATS
} fo_format;

typedef struct fo_format_info {
    const char *name;
    int size;       /* bytes of an element in fo_array.data */
    int extra;      /* bytes in fo_array.extra for every 2^shift elements; 0: extra is unused */
    int shift;      /* see `extra`; the last group may have fewer elements */
    int stochastic; /* whether a store depends on fo_leaf.key */
} fo_format_info;

/* The table of formats, FO_FORMATS rows by fo_format. Constant. */
const fo_format_info *fo_formats(void);

/* Which of the leaf's elements an array has a number for. Arrays other than state have FO_EACH. */
typedef enum fo_map {
    FO_EACH,
    FO_EVERY,  /* elements 0, every, 2 * every, ... */
    FO_ROWS,   /* one number for each row of the leaf's matrices */
    FO_COLUMNS /* one for each column of each matrix */
} fo_map;

/* What these maps depend on. The elements of such a leaf are in row-major order. */
typedef struct fo_shape {
    ptrdiff_t every;                   /* of FO_EVERY: > 0 */
    ptrdiff_t matrices, rows, columns; /* of FO_ROWS and FO_COLUMNS: a leaf of matrices of rows */
    void *scratch; /* the same, during a step: fo_scratch() bytes, aligned to 8 */
} fo_shape;

typedef struct fo_array {
    void *data;  /* any alignment; NULL: this leaf has no such array */
    void *extra; /* exponents of 8-bit blocks, or residual bits; any alignment. Of a map other than
                    FO_EACH the leaf's fo_shape; the format is then FO_F32 or FO_F64 */
    fo_format format;
    fo_map map;
} fo_array;

/* One set of constants, in double; a kernel rounds them once to the compute type. */
typedef struct fo_hyper {
    double grad_scale;              /* g = grad_scale * g; -1 maximizes; 1 leaves g alone */
    double l2;                      /* g = g + l2 * p, unless 0 */
    double l1;                      /* g = g + l1 * sign(p), unless 0 */
    double ema_weight;              /* ema = ema + ema_weight * (p - ema), where a leaf has one */
    double scalars[FO_MAX_SCALARS]; /* the rule's, in the order of fo_rule.scalars; `root`, by
                                       which it divides, is 0 or between 2^-60 and 2^60 */
} fo_hyper;

/* Of a leaf of rows: its elements are some rows of larger arrays, its parameter and its state; or
 * all of them. Some have no average, no copy and, unless a row is whole blocks, no format but
 * FO_F32 and FO_F64. */
typedef struct fo_rows {
    ptrdiff_t length;       /* of a row, > 0: the leaf has n / length rows */
    const int64_t *rows;    /* the number of each in the arrays, none twice; NULL: all of them */
    const ptrdiff_t *order; /* NULL: the rows of fo_leaf.grad are those of the leaf. Else those of
                               row j are order[starts[j]] to before order[starts[j + 1]], one at
                               least; they are added up in this order in the compute type */
    const ptrdiff_t *starts;
    const int32_t *hypers; /* NULL: the scalars of all rows are those of fo_leaf.hyper. Else those
                              of row j are in set hypers[j] of the call; all else is that leaf's */
} fo_rows;

/* One parameter with all arrays that a step reads or writes for it. The arrays of a leaf hold n
 * elements each (unless their fo_map says otherwise) in the same memory order. No array overlaps
 * another one of any leaf, except that leaves may share gradients, which are only read. If the
 * parameter is FO_F64, its state is too and the arithmetic is in double; else states have any
 * format but FO_F64 and the arithmetic is in float. */
typedef struct fo_leaf {
    ptrdiff_t n;
    fo_array param;
    fo_array grad; /* data NULL: the step leaves the leaf alone, but writes its copy */
    fo_array state[FO_MAX_STATES];
    fo_array ema;  /* running average of the parameter, or data NULL */
    fo_array copy; /* receives the parameter after the call, rounded to its format; or data NULL */
    double grad_scale; /* of this leaf (unscaling, clipping); multiplied by fo_hyper.grad_scale */
    uint64_t key;      /* of the noise, from fo_key; unused if no format is stochastic */
    ptrdiff_t origin;  /* of a shard: index in the whole tensor of its first element, for the noise.
                          If it is a multiple of FO_BLOCK, the bits are those of the whole */
    const fo_rows *by_rows; /* of a leaf of rows; else NULL */
    ptrdiff_t hyper;        /* index into the hyper list of the call */
    ptrdiff_t start;        /* scratch of the call: where the leaf begins on the line (split.c) */
    ptrdiff_t tile;         /* scratch of the call: index of its first tile in fo_run.tiles */
    double trust;           /* scratch of the call: the trust ratio of a layer-wise rule */
} fo_leaf;

/* The statistics of a leaf: the same bits for every thread count and instruction set, since lanes,
 * tiles and leaves are added in a fixed order, in double. `update` is what the step added to the
 * parameter. Gradients are measured as they are given, before any scale. */
typedef struct fo_stats {
    double grad, param, update;          /* sums of squares; `param` is after the step */
    double largest_grad, largest_update; /* magnitudes; NaN if an element is NaN */
    int64_t zeros, nonfinite;            /* numbers of elements of the gradient */
} fo_stats;

typedef enum fo_measures {
    FO_MEASURE_NOTHING,
    FO_MEASURE_LEAF,  /* all of fo_stats, but not those of the gradient if fo_run.has_grad */
    FO_MEASURE_PARAM, /* the gradient's sums, but of the parameter after the step */
} fo_measures;

/* A range of a mapped file. */
typedef struct fo_region {
    char *start;
    size_t bytes;
    int64_t offset; /* in the file, of `start`; a multiple of the page size */
    int file;       /* its descriptor */
    int is_read_only;
    int64_t process; /* that has mapped it, whose file it is */
} fo_region;

/* Where leaves have arrays on disk, of which a pass then has no more than FO_WINDOW bytes in
 * memory: see disk.c. Between calls the arrays can be used where they are mapped. The direction of
 * a matrix rule is in memory. */
enum { FO_WINDOW = 256 << 20 };
typedef struct fo_disk {
    const fo_region *regions; /* in the order of their addresses */
    ptrdiff_t n;
    int error;       /* written by calls, 0 before: errno of the first failure */
    int has_written; /* written by calls, 0 before: if not set, no leaf has changed */
} fo_disk;

/* What a call does beside the rule. The caller owns the lists; unused members are 0 or NULL. */
typedef struct fo_run {
    double clip_value; /* > 0: limits scaled gradients to [-clip_value, clip_value]; 0: no limit */
    int zero_grads;    /* sets gradients to 0, but those of some rows; then no two leaves may
                          share one */
    int has_grad;      /* set after fo_measure; the gradient sums in `stats` are already filled */
    int has_direction; /* set after fo_direct; the sums in `stats` are used for the trust ratios,
                          and factors in fo_shape.scratch */
    int norm_only;     /* fo_measure fills `grad` and `nonfinite` alone, which takes less time */
    fo_measures measure; /* what fo_step fills `stats` with */
    fo_stats *tiles;     /* scratch, fo_count_tiles() of them; NULL if nothing is measured */
    fo_stats *stats;     /* results, one for each leaf; 0 for a leaf without gradient */
    fo_disk *disk;       /* NULL: all arrays are in memory */
} fo_run;

/* Kinds of rules: see rules/index.h. Those from FO_LAYERWISE on need fo_direct before the step, of
 * which fo_run must have tiles and stats. */
typedef enum fo_kind {
    FO_ELEMENTWISE,
    FO_INTERNAL, /* used by the package itself; no optimizer has it */
    FO_ROWWISE,  /* it may keep a number for each row: then leaves are of rows, some or all */
    FO_LAYERWISE,
    FO_COUNTING,
    FO_FACTORED, /* of matrices it keeps factors, of rows and of columns */
    FO_SUMMING,  /* its constants follow from sums over all leaves; the caller computes them */
    FO_MATRIX    /* its last state array holds the direction during a step */
} fo_kind;

/* A rule of the table, as a binding needs it. */
typedef struct fo_rule {
    const char *name;
    const char *const *scalars; /* names, ended by NULL */
    int states;                 /* number of its state arrays, optional ones last */
    int required;               /* how many of them every leaf must have */
    fo_kind kind;
} fo_rule;

/* The rules, ended by a row whose name is NULL. Constant. */
const fo_rule *fo_rules(void);

/* One step of rule number `rule` on n leaves. The result is as if leaves were updated one after the
 * other; its bits depend neither on the number of threads nor on the instruction set nor on the
 * floating-point mode (rounding, subnormals) of the calling thread. `run` may be NULL: then the
 * step is the rule, the averages and the copies. Of the lists it writes the leaves' scratch alone.
 * Thread-safe as long as concurrent calls have no array and no list in common. */
fo_status fo_step(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                  ptrdiff_t n_hypers, const fo_run *run, int threads);

/* One read of the gradients: fills the members of run->stats that are of the gradient, and leaves
 * the others alone. */
fo_status fo_measure(fo_leaf *leaves, ptrdiff_t n, const fo_run *run, int threads);

/* One read of all that a layer-wise rule reads: fills `param` and `update` of run->stats with the
 * sums of squares of each leaf's parameter and of the direction in which the rule would go (0 for a
 * leaf without gradient; of a rule that counts, with numbers of elements; of one that sums, with
 * the sums of its two terms), and leaves all else alone. The arguments are those of the fo_step
 * that follows with run->has_direction set; in between the caller may add the sums of other parts
 * of the same tensors. Of a matrix rule it also writes the direction into the last state array,
 * which is FO_F64 where the parameter is, else FO_F32: the caller may replace it, and fo_step goes
 * along what it finds there. Of a factored one it writes the scratch. FO_BAD_ARGUMENT for a rule
 * that has no direction, and where fo_step returns it. */
fo_status fo_direct(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                    ptrdiff_t n_hypers, const fo_run *run, int threads);

/* The sums of n leaves' sums, added in lanes as those of tiles are. */
fo_stats fo_total(const fo_stats *stats, ptrdiff_t n);

/* How many tiles n leaves have: the length of fo_run.tiles. */
ptrdiff_t fo_count_tiles(const fo_leaf *leaves, ptrdiff_t n);

/* Bytes that fo_shape.scratch needs for a leaf with factors, a multiple of 8. */
size_t fo_scratch(const fo_leaf *leaf);

/* How many elements an array of a leaf of n elements has. */
static inline ptrdiff_t fo_count(const fo_array *array, ptrdiff_t n)
{
    const fo_shape *const shape = array->map == FO_EACH ? NULL : (const fo_shape *)array->extra;
    return array->map == FO_EVERY     ? (n > 0 ? (n - 1) / shape->every + 1 : 0)
           : array->map == FO_ROWS    ? shape->matrices * shape->rows
           : array->map == FO_COLUMNS ? shape->matrices * shape->columns
                                      : n;
}

/* Puts row numbers in order. Writes to `rows` the numbers that occur, ascending; to `order` the
 * places of each number in `indices`, as they follow one another there; and to `starts` where the
 * places of each number begin in `order`, and last k. Returns the number of rows. Each list holds k
 * numbers, `starts` k + 1, `scratch` 2 * k. All indices are from 0 to below `count`. */
ptrdiff_t fo_sort_rows(const int64_t *indices, ptrdiff_t k, int64_t count, int64_t *rows,
                       ptrdiff_t *starts, ptrdiff_t *order, int64_t *scratch);

/* Checks row numbers: finds the place of the first that is not from 0 to below `count`, or -1; and
 * whether each is larger than the one before. */
typedef struct fo_row_look {
    ptrdiff_t bad;
    int ascends;
} fo_row_look;

fo_row_look fo_look_at_rows(const int64_t *indices, ptrdiff_t k, int64_t count);

/* Numbers the different values of `counts` at some rows (NULL: the first k) as they occur: writes
 * them to `values`, and the number of that of each row to `numbers`. Returns how many there are, or
 * FO_NO_COUNT if one is not from 0 to below 2^62, and is `values[0]` then. `table` is scratch of
 * `slots`, a power of 2: FO_NO_ROOM if there are more values than half of that. `values` has room
 * for half of them, `numbers` for k. */
enum { FO_NO_COUNT = -1, FO_NO_ROOM = -2 };
ptrdiff_t fo_number_counts(const int64_t *counts, const int64_t *rows, ptrdiff_t k, int64_t *values,
                           int32_t *numbers, int32_t *table, ptrdiff_t slots);

/* Adds 1 to the counts of some rows (NULL: the first k). */
void fo_add_counts(int64_t *counts, const int64_t *rows, ptrdiff_t k);

/* Writes the gradient of leaves of rows, in the compute type, to the leaf's `copy`, an array of n
 * elements. */
fo_status fo_sum_rows(fo_leaf *leaves, ptrdiff_t n, int threads);

/* The key of the noise for leaf number `leaf` in a step, from 1. */
uint64_t fo_key(uint64_t seed, uint64_t leaf, uint64_t step);

/* Fills the state arrays of n leaves with zeros, except those with a map other than FO_EACH, which
 * are small. The work is split over threads as in fo_step: on first touch each page lands near the
 * thread that will use it. */
fo_status fo_zero_state(fo_leaf *leaves, ptrdiff_t n, int threads);

/* For measurements of the memory's limit: reads and writes the bytes that fo_step does, with next
 * to no arithmetic, and leaves every byte as it was. `how` is one of FO_STREAMS ways, with and
 * without prefetch, in registers of both widths: which is the fastest depends on the machine. */
enum { FO_STREAMS = 8 };
fo_status fo_stream(fo_leaf *leaves, ptrdiff_t n, int how, int threads);

/* Memory for state: 64-byte aligned, not yet touched, and not set to 0. Large blocks are on huge
 * pages if the system grants them. NULL if there is no memory. Release it by fo_release. */
void *fo_allocate(size_t bytes);
void fo_release(void *memory);

/* Maps a region, whose other members are given, and sets its `start` and `process`. Returns 0, or
 * the error number if the system refuses. fo_unmap_file undoes it and, unless the region is
 * read-only, releases the space in the file; call it in the same process, not in the child of a
 * fork. */
int fo_map_file(fo_region *region);
void fo_unmap_file(const fo_region *region);
void fo_close_file(int file);

/* Writes the pages of an array and drops them from memory, if it is in one of the regions. Returns
 * 0, or an errno. */
int fo_relieve(const fo_disk *disk, void *data, size_t bytes);

/* memmove of bytes; source and target may be in the regions. Works in pieces, and writes and drops
 * each as fo_relieve does. Returns 0, or the errno of the first piece that failed; the others are
 * copied. */
int fo_copy(const fo_disk *disk, void *to, const void *from, size_t bytes);

/* Instruction sets: the names of those that this CPU and system can run, best first, ended by NULL;
 * the name of the one in use, which is the best unless fo_select_isa chose another. fo_select_isa
 * returns FO_BAD_ARGUMENT for a name that is not in the list; do not call it during a step. */
const char *const *fo_isas(void);
const char *fo_isa(void);
fo_status fo_select_isa(const char *name);

/* How often other processes kept the threads of a call from its work, and what was done about it:
 * calls then run on the calling thread alone for a while (threads.c). Of the whole process. */
typedef struct fo_lateness {
    long late;    /* loops that waited for a thread longer than they saved by it */
    long alone;   /* loops that ran on the calling thread alone because of that */
    int is_alone; /* whether the next one will */
} fo_lateness;

fo_lateness fo_late(void);

/* For tests: whether to use threads in any case, asleep or late. */
void fo_force_threads(int yes);

/* The thread backend: "openmp", "pool" or "serial". This is the one symbol that a shared library
 * made of this code exports; threadpoolctl finds the library by it. */
#ifdef _WIN32
__declspec(dllexport)
#else
__attribute__((visibility("default")))
#endif
const char *fo_backend(void);

#endif
