/* The passes over parts of leaves that are not tiles. For a factored rule one parallel loop sums
 * parts of matrices, and another finishes the matrices; for a row-wise rule a loop updates rows. No
 * bit depends on which thread takes which part. */
#include "factors.h"
#include "split.h"
#include "threads.h"

enum { MOST_CHUNKS = 4096 }; /* enough to balance; matrices may be tiny, and many */

typedef struct pass {
    const fo_work *w;
    fo_range *const *range;
    ptrdiff_t (*count)(const fo_leaf *leaf); /* of what a range is of; 0 for leaves without that */
    ptrdiff_t total, chunk;                  /* of all leaves; in a chunk */
} pass;

static ptrdiff_t matrices(const fo_leaf *leaf)
{
    return fo_is_factored(leaf) ? ((const fo_shape *)leaf->state[0].extra)->matrices : 0;
}

static ptrdiff_t parts(const fo_leaf *leaf)
{
    return fo_is_factored(leaf) ? fo_parts(leaf->state[0].extra) : 0;
}

static ptrdiff_t rows(const fo_leaf *leaf)
{
    const int has_rows = leaf->grad.data != NULL && leaf->state[0].map == FO_ROWS;
    return has_rows ? leaf->n / leaf->by_rows->length : 0;
}

static void run_chunks(void *context, ptrdiff_t first, ptrdiff_t last)
{
    const pass *it = context;
    const ptrdiff_t from = first * it->chunk;
    const ptrdiff_t to = last * it->chunk < it->total ? last * it->chunk : it->total;
    for (ptrdiff_t i = fo_leaf_at(it->w, from); i < it->w->n; i++) {
        const fo_leaf *leaf = &it->w->leaves[i];
        if (leaf->start >= to)
            break;
        const ptrdiff_t count = it->count(leaf);
        const ptrdiff_t begin = from > leaf->start ? from - leaf->start : 0;
        const ptrdiff_t end = to - leaf->start < count ? to - leaf->start : count;
        if (begin < end)
            it->range[fo_compute_type(leaf)](&it->w->task, leaf, begin, end);
    }
}

/* The pass works on one in `weight` elements of a leaf. */
static void run(fo_work *w, fo_range *const *range, ptrdiff_t (*count)(const fo_leaf *leaf),
                ptrdiff_t weight, int threads)
{
    pass it = {.w = w, .range = range, .count = count};
    ptrdiff_t elements = 0;
    for (ptrdiff_t i = 0; i < w->n; i++) {
        fo_leaf *leaf = &w->leaves[i];
        leaf->start = it.total;
        const ptrdiff_t more = count(leaf);
        it.total += more;
        elements += more > 0 ? leaf->n : 0;
    }
    it.chunk = it.total / MOST_CHUNKS + 1;
    fo_parallel(run_chunks, &it, (it.total + it.chunk - 1) / it.chunk,
                fo_size_of(elements / weight), threads);
}

void fo_find_factors(fo_work *w, const fo_kernels *kernels, int threads)
{
    run(w, kernels->sum_factors, parts, 1, threads);
    run(w, kernels->fold_factors, matrices, 64, threads);
}

void fo_keep_factors(fo_work *w, const fo_kernels *kernels, int threads)
{
    run(w, kernels->keep_factors, matrices, 64, threads);
}

void fo_update_rows(fo_work *w, const fo_kernels *kernels, int threads)
{
    run(w, kernels->update_rows, rows, 1, threads);
}

size_t fo_scratch(const fo_leaf *leaf)
{
    const size_t size = fo_compute_type(leaf) == FO_COMPUTE_F64 ? sizeof(double) : sizeof(float);
    const fo_shape *shape = leaf->state[0].extra;
    const ptrdiff_t rows = shape->matrices * shape->rows;
    const ptrdiff_t columns = shape->matrices * shape->columns;
    const ptrdiff_t wide = fo_parts_beside(shape), high = fo_parts_below(shape);
    const ptrdiff_t sums = (wide > 1 ? rows * wide : 0) + (high > 1 ? columns * high : 0);
    const size_t means_and_factors = (size_t)(2 * rows + 2 * columns) * size;
    return (size_t)sums * sizeof(double) + (means_and_factors + 7) / 8 * 8;
}
