/* Sums over leaves, from those of their tiles, and over a list, from those of its leaves.
 *
 * Doubles are added in lanes, which are folded in a fixed order: the bits depend on the tensors
 * alone, not on threads or instruction sets. */
#include "total.h"
#include "threads.h"

/* measured: on a shorter line of leaves (split.c), waking threads costs more than they save */
enum { SERIAL_LENGTH = 4 << 20 };

static double larger(double a, double b) { return b > a || b != b ? b : a; }

/* Writes parts of the sums of `count` sums, of which the other parts may never have been written.
 */
static __attribute__((noinline)) void total(const fo_stats *sums, ptrdiff_t count, int parts,
                                            fo_stats *to)
{
    double grad[FO_LANES] = {0}, param[FO_LANES] = {0}, update[FO_LANES] = {0};
    fo_stats all = {0};
    for (ptrdiff_t i = 0; i < count; i++, sums++) {
        if (parts & FO_PART_GRAD) {
            grad[i % FO_LANES] += sums->grad;
            all.largest_grad = larger(all.largest_grad, sums->largest_grad);
            all.zeros += sums->zeros;
            all.nonfinite += sums->nonfinite;
        }
        if (parts & FO_PART_SQUARES) {
            param[i % FO_LANES] += sums->param;
            update[i % FO_LANES] += sums->update;
        }
        if (parts & FO_PART_LARGEST_UPDATE)
            all.largest_update = larger(all.largest_update, sums->largest_update);
    }
    if (parts & FO_PART_GRAD) {
        to->grad = fo_fold(grad);
        to->largest_grad = all.largest_grad;
        to->zeros = all.zeros;
        to->nonfinite = all.nonfinite;
    }
    if (parts & FO_PART_SQUARES) {
        to->param = fo_fold(param);
        to->update = fo_fold(update);
    }
    if (parts & FO_PART_LARGEST_UPDATE)
        to->largest_update = all.largest_update;
}

typedef struct folding {
    const fo_work *w;
    int parts;
} folding;

static void fold_leaves(void *context, ptrdiff_t first, ptrdiff_t last)
{
    const folding *f = context;
    const fo_run *run = f->w->task.run;
    for (ptrdiff_t i = first; i < last; i++) {
        const fo_leaf *leaf = &f->w->leaves[i];
        const ptrdiff_t count = leaf->grad.data != NULL ? fo_tiles_of(leaf) : 0;
        total(run->tiles + leaf->tile, count, f->parts, &run->stats[i]);
    }
}

void fo_fold_tiles(const fo_work *w, int parts, int threads)
{
    folding f = {w, parts};
    fo_parallel(fold_leaves, &f, w->n, w->length < SERIAL_LENGTH ? FO_SMALL : FO_LARGE, threads);
}

fo_stats fo_total(const fo_stats *stats, ptrdiff_t n)
{
    fo_stats all = {0};
    const fo_mode before = fo_enter_ieee();
    total(stats, n, FO_PART_GRAD | FO_PART_STEP, &all);
    fo_leave_ieee(before);
    return all;
}
