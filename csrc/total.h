/* Sums over leaves, from those of their tiles: see total.c. Internal. */
#ifndef FUSEDOPT_TOTAL_H
#define FUSEDOPT_TOTAL_H

#include "split.h"

/* Parts of fo_stats, of the gradient and of the step. */
enum {
    FO_PART_GRAD = 1,
    FO_PART_SQUARES = 2,
    FO_PART_LARGEST_UPDATE = 4,
    FO_PART_STEP = FO_PART_SQUARES | FO_PART_LARGEST_UPDATE
};

/* Folds parts of run->tiles, which ranges of the same work have written, into run->stats, and
 * leaves the other parts alone. Of a leaf without gradient they become 0. */
void fo_fold_tiles(const fo_work *work, int parts, int threads);

#endif
