/* Splits a list of leaves over threads: one parallel loop over chunks that depend on the list
 * alone.
 *
 * All leaves lie one after the other on a line on which a tile takes the room of its elements and
 * of its overhead. The line is cut into chunks of equal room, and a tile belongs to the chunk in
 * which it begins: chunks cost about the same whatever the mixture of sizes, and a tile is never
 * cut. */
#include "kernels.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

enum {
    TILE_ROOM = FO_TILE + 32, /* elements that cost as much as a tile: 32 is its overhead */
    CHUNK_ROOM = 8 *
        TILE_ROOM,           /* measured: large enough to hide the claim, small enough to balance */
    SERIAL_ROOM = 64 * 1024, /* measured: below, waking threads costs more than they bring */
    FOLD_ROOM = 4 << 20,     /* the same, for adding up the sums of tiles */
    CACHE_LINE = 64,
    HUGE_PAGE = 2 << 20,
};

typedef struct work {
    fo_leaf *leaves;
    ptrdiff_t n, room;
    fo_task task;
    fo_range *const *range; /* what to do, by compute type */
} work;

static ptrdiff_t tiles_of(const fo_leaf *leaf) { return (leaf->n + FO_TILE - 1) / FO_TILE; }

/* Which leaves a call works on. */
typedef enum choice { ALL, WITH_GRAD, COPY_ALONE } choice;

static int is_chosen(const fo_leaf *leaf, choice which)
{
    const int has_grad = leaf->grad.data != NULL;
    return leaf->n > 0 && (which == WITH_GRAD    ? has_grad
                           : which == COPY_ALONE ? !has_grad && leaf->copy.data != NULL
                                                 : 1);
}

/* Writes each leaf's start and tile; returns the room of all. A leaf without work has none. */
static ptrdiff_t lay_out(fo_leaf *leaves, ptrdiff_t n, choice which)
{
    ptrdiff_t room = 0, tile = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        fo_leaf *leaf = &leaves[i];
        leaf->start = room;
        leaf->tile = tile;
        tile += tiles_of(leaf);
        if (is_chosen(leaf, which)) {
            ptrdiff_t full = leaf->n / FO_TILE, rest = leaf->n % FO_TILE;
            room += full * TILE_ROOM + (rest > 0 ? rest + (TILE_ROOM - FO_TILE) : 0);
        }
    }
    return room;
}

/* The last leaf that starts at or before a place on the line. */
static ptrdiff_t leaf_at(const work *w, ptrdiff_t place)
{
    ptrdiff_t low = 0, high = w->n;
    while (high - low > 1) {
        ptrdiff_t middle = low + (high - low) / 2;
        if (w->leaves[middle].start <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void zero(char *bytes, ptrdiff_t begin, ptrdiff_t end)
{
    if (bytes != NULL)
        memset(bytes + begin, 0, (size_t)(end - begin));
}

/* Zeros are zero in every format. A fo_range. */
static void zero_state(const fo_task *task, const fo_leaf *leaf, ptrdiff_t begin, ptrdiff_t end)
{
    (void)task;
    for (int k = 0; k < FO_MAX_STATES; k++) {
        const fo_array *state = &leaf->state[k];
        zero(state->data, fo_data_bytes(state, begin), fo_data_bytes(state, end));
        zero(state->extra, fo_extra_bytes(state, begin), fo_extra_bytes(state, end));
    }
}

/* The first tile of a leaf that begins at or after a place on the line. */
static ptrdiff_t tile_from(const fo_leaf *leaf, ptrdiff_t place)
{
    return place <= leaf->start ? 0 : (place - leaf->start + TILE_ROOM - 1) / TILE_ROOM;
}

static void run_chunks(void *context, ptrdiff_t first, ptrdiff_t last)
{
    const work *w = context;
    const ptrdiff_t from = first * CHUNK_ROOM, to = last * CHUNK_ROOM;
    const ptrdiff_t line_end = to < w->room ? to : w->room;

    for (ptrdiff_t i = leaf_at(w, from); i < w->n && w->leaves[i].start < line_end; i++) {
        const fo_leaf *leaf = &w->leaves[i];
        const ptrdiff_t next = i + 1 < w->n ? w->leaves[i + 1].start : w->room;
        if (next == leaf->start)
            continue; /* nothing to do in this leaf */
        ptrdiff_t begin = tile_from(leaf, from) * FO_TILE, end = tile_from(leaf, to) * FO_TILE;
        if (end > leaf->n)
            end = leaf->n;
        if (begin >= end)
            continue;
        w->range[fo_compute_type(leaf)](&w->task, leaf, begin, end);
    }
}

static void run(work *w, choice which, int threads)
{
    w->room = lay_out(w->leaves, w->n, which);
    ptrdiff_t chunks = (w->room + CHUNK_ROOM - 1) / CHUNK_ROOM;
    fo_parallel(run_chunks, w, chunks, w->room < SERIAL_ROOM ? 1 : threads);
}

/* ---------------------------------------------------------------- sums */

static double larger(double a, double b) { return b > a || b != b ? b : a; }

/* Parts of fo_stats: of the gradient, and of the step. */
enum { GRAD = 1, SQUARES = 2, LARGEST_UPDATE = 4, STEP = SQUARES | LARGEST_UPDATE };

/* Writes parts of the sums of some sums, of which nobody may have made the others. */
static __attribute__((noinline)) void total(const fo_stats *sums, ptrdiff_t count, int parts,
                                            fo_stats *to)
{
    double grad[FO_LANES] = {0}, param[FO_LANES] = {0}, update[FO_LANES] = {0};
    fo_stats all = {0};
    for (ptrdiff_t i = 0; i < count; i++, sums++) {
        if (parts & GRAD) {
            grad[i % FO_LANES] += sums->grad;
            all.largest_grad = larger(all.largest_grad, sums->largest_grad);
            all.zeros += sums->zeros;
            all.nonfinite += sums->nonfinite;
        }
        if (parts & SQUARES) {
            param[i % FO_LANES] += sums->param;
            update[i % FO_LANES] += sums->update;
        }
        if (parts & LARGEST_UPDATE)
            all.largest_update = larger(all.largest_update, sums->largest_update);
    }
    if (parts & GRAD) {
        to->grad = fo_fold(grad);
        to->largest_grad = all.largest_grad;
        to->zeros = all.zeros;
        to->nonfinite = all.nonfinite;
    }
    if (parts & SQUARES) {
        to->param = fo_fold(param);
        to->update = fo_fold(update);
    }
    if (parts & LARGEST_UPDATE)
        to->largest_update = all.largest_update;
}

typedef struct folding {
    const work *w;
    int parts;
} folding;

static void fold_leaves(void *context, ptrdiff_t first, ptrdiff_t last)
{
    const folding *f = context;
    const fo_run *run = f->w->task.run;
    for (ptrdiff_t i = first; i < last; i++) {
        const fo_leaf *leaf = &f->w->leaves[i];
        const ptrdiff_t count = leaf->grad.data != NULL ? tiles_of(leaf) : 0;
        total(run->tiles + leaf->tile, count, f->parts, &run->stats[i]);
    }
}

/* Folds the sums of tiles into those of leaves. */
static void fold(const work *w, int parts, int threads)
{
    folding f = {w, parts};
    fo_parallel(fold_leaves, &f, w->n, w->room < FOLD_ROOM ? 1 : threads);
}

fo_stats fo_total(const fo_stats *stats, ptrdiff_t n)
{
    fo_stats all = {0};
    const fo_mode before = fo_enter_ieee();
    total(stats, n, GRAD | STEP, &all);
    fo_leave_ieee(before);
    return all;
}

ptrdiff_t fo_count_tiles(const fo_leaf *leaves, ptrdiff_t n)
{
    ptrdiff_t tiles = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        tiles += tiles_of(&leaves[i]);
    return tiles;
}

/* ---------------------------------------------------------------- the calls */

static int is_format(const fo_array *array)
{
    return (unsigned)array->format < FO_FORMATS &&
           (fo_formats()[array->format].extra == 0 || array->extra != NULL);
}

/* An array that steps write beside the parameter, if there is one. */
static int is_companion(const fo_array *array, int is_double)
{
    return array->data == NULL || (is_format(array) && (array->format == FO_F64) == is_double);
}

static int is_copy(const fo_array *array, int is_double)
{
    return array->data == NULL ||
           (is_format(array) && array->format != (is_double ? FO_F32 : FO_F64));
}

static int is_valid(const fo_leaf *leaf, const fo_rule *rule, ptrdiff_t n_hypers)
{
    const int is_double = leaf->param.format == FO_F64;
    if (leaf->n < 0 || (leaf->n > 0 && !is_format(&leaf->param)))
        return 0;
    for (int k = 0; k < FO_MAX_STATES; k++)
        if (!is_companion(&leaf->state[k], is_double) ||
            (leaf->state[k].data == NULL && k < rule->required && leaf->n > 0 &&
             leaf->grad.data != NULL))
            return 0;
    return is_companion(&leaf->ema, is_double) && is_copy(&leaf->copy, is_double) &&
           (leaf->grad.data == NULL ||
            (is_format(&leaf->grad) && leaf->hyper >= 0 && leaf->hyper < n_hypers));
}

/* Whether the rule exists, and the leaves and the lists have all that it needs of them. */
static int is_valid_call(const fo_rule *rules, int rule, const fo_leaf *leaves, ptrdiff_t n,
                         ptrdiff_t n_hypers, const fo_run *how)
{
    for (int i = 0; i <= rule; i++)
        if (rules[i].name == NULL)
            return 0;
    if (rule < 0)
        return 0;
    const int measures = how != NULL && how->measure != FO_MEASURE_NOTHING;
    if ((rules[rule].layerwise || measures) &&
        (how == NULL || how->tiles == NULL || how->stats == NULL))
        return 0;
    for (ptrdiff_t i = 0; i < n; i++)
        if (!is_valid(&leaves[i], &rules[rule], n_hypers))
            return 0;
    return 1;
}

/* The squares of every leaf's parameter and direction, from one read of all that the rule reads. */
static void direct(work *w, const fo_kernels *kernels, int threads)
{
    w->range = kernels->direct;
    run(w, WITH_GRAD, threads);
    fold(w, SQUARES, threads);
}

/* Writes the trust ratio of every leaf. */
static void set_trust(const work *w, const fo_kernels *kernels)
{
    fo_trust *const trust = kernels->trust[w->task.rule];
    const fo_stats *stats = w->task.run->stats;
    for (ptrdiff_t i = 0; i < w->n; i++) {
        fo_leaf *leaf = &w->leaves[i];
        if (leaf->grad.data != NULL)
            leaf->trust = trust(w->task.hypers[leaf->hyper].scalars, sqrt(stats[i].param),
                                sqrt(stats[i].update));
    }
}

/* Not inlined: no arithmetic may leave the mode that its caller entered. */
static __attribute__((noinline)) fo_status step(int rule, fo_leaf *leaves, ptrdiff_t n,
                                                const fo_hyper *hypers, ptrdiff_t n_hypers,
                                                const fo_run *how, int threads)
{
    const fo_kernels *kernels = fo_active_kernels();
    if (!is_valid_call(kernels->rules, rule, leaves, n, n_hypers, how))
        return FO_BAD_ARGUMENT;
    work w = {.leaves = leaves, .n = n, .task = {rule, hypers, how}};
    int copies_alone = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        copies_alone |= is_chosen(&leaves[i], COPY_ALONE);
    if (kernels->rules[rule].layerwise) {
        if (!how->has_direction)
            direct(&w, kernels, threads);
        set_trust(&w, kernels);
    }
    w.range = kernels->step;
    run(&w, WITH_GRAD, threads);
    if (how != NULL && how->measure != FO_MEASURE_NOTHING)
        fold(&w,
             how->measure == FO_MEASURE_PARAM ? GRAD
             : how->has_grad                  ? STEP
                                              : GRAD | STEP,
             threads);
    if (copies_alone) { /* last, as it lays out the list anew */
        w.range = kernels->copy;
        run(&w, COPY_ALONE, threads);
    }
    return FO_OK;
}

fo_status fo_step(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                  ptrdiff_t n_hypers, const fo_run *how, int threads)
{
    const fo_mode before = fo_enter_ieee();
    const fo_status status = step(rule, leaves, n, hypers, n_hypers, how, threads);
    fo_leave_ieee(before);
    return status;
}

fo_status fo_direct(int rule, fo_leaf *leaves, ptrdiff_t n, const fo_hyper *hypers,
                    ptrdiff_t n_hypers, const fo_run *how, int threads)
{
    const fo_kernels *kernels = fo_active_kernels();
    if (!is_valid_call(kernels->rules, rule, leaves, n, n_hypers, how) ||
        !kernels->rules[rule].layerwise)
        return FO_BAD_ARGUMENT;
    work w = {.leaves = leaves, .n = n, .task = {rule, hypers, how}};
    direct(&w, kernels, threads);
    return FO_OK;
}

fo_status fo_measure(fo_leaf *leaves, ptrdiff_t n, const fo_run *how, int threads)
{
    for (ptrdiff_t i = 0; i < n; i++)
        if (leaves[i].n < 0 || (leaves[i].grad.data != NULL && !is_format(&leaves[i].grad)))
            return FO_BAD_ARGUMENT;
    work w = {.leaves = leaves, .n = n, .task = {.run = how}};
    w.range = fo_active_kernels()->measure;
    run(&w, WITH_GRAD, threads);
    fold(&w, GRAD, threads);
    return FO_OK;
}

fo_status fo_stream(fo_leaf *leaves, ptrdiff_t n, int threads)
{
    fo_range *const stream = fo_active_kernels()->stream, *const range[] = {stream, stream};
    work w = {.leaves = leaves, .n = n, .range = range};
    run(&w, WITH_GRAD, threads);
    return FO_OK;
}

fo_status fo_zero_state(fo_leaf *leaves, ptrdiff_t n, int threads)
{
    fo_range *const range[] = {zero_state, zero_state};
    work w = {.leaves = leaves, .n = n, .range = range};
    run(&w, ALL, threads);
    return FO_OK;
}

void *fo_allocate(size_t bytes)
{
    const size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : CACHE_LINE;
    void *memory = NULL;
    if (bytes > SIZE_MAX - alignment)
        return NULL;
    bytes += bytes == 0;
#ifdef _WIN32
    memory = _aligned_malloc(bytes, alignment);
#else
    if (posix_memalign(&memory, alignment, bytes))
        return NULL;
#endif
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == HUGE_PAGE)
        (void)madvise(memory, bytes, MADV_HUGEPAGE); /* advice: without it the memory is as good */
#endif
    return memory;
}

void fo_release(void *memory)
{
#ifdef _WIN32
    _aligned_free(memory);
#else
    free(memory);
#endif
}
