/* A call's work and its split over threads: see split.c. Internal. */
#ifndef FUSEDOPT_SPLIT_H
#define FUSEDOPT_SPLIT_H

#include "kernels.h"
#include "threads.h"

/* The work of one call. Owned by the caller, like the lists that it points to. */
typedef struct fo_work {
    fo_leaf *leaves;
    ptrdiff_t n;
    ptrdiff_t length; /* of the line on which the leaves lie; set by fo_split */
    fo_task task;
    fo_range *const *range; /* what to do, by compute type */
    fo_disk *disk;          /* where arrays that the range uses are on disk; NULL if none is */
    int only_reads;         /* whether it leaves them as they are */
} fo_work;

/* Which leaves a call works on. */
typedef enum fo_choice { FO_ALL, FO_WITH_GRAD, FO_COPY_ALONE } fo_choice;

static inline int fo_is_chosen(const fo_leaf *leaf, fo_choice which)
{
    const int has_grad = leaf->grad.data != NULL;
    return leaf->n > 0 && (which == FO_WITH_GRAD    ? has_grad
                           : which == FO_COPY_ALONE ? !has_grad && leaf->copy.data != NULL
                                                    : 1);
}

static inline ptrdiff_t fo_tiles_of(const fo_leaf *leaf)
{
    return (leaf->n + FO_TILE - 1) / FO_TILE;
}

/* The last leaf that starts at or before a place on the line. */
ptrdiff_t fo_leaf_at(const fo_work *work, ptrdiff_t place);

/* How much work so many elements are for a parallel loop. */
fo_size fo_size_of(ptrdiff_t elements);

/* Finds the factors of all leaves that have some, and writes those that the rule keeps: factors.c.
 * Write the leaves' scratch (start). */
void fo_find_factors(fo_work *work, const fo_kernels *kernels, int threads);
void fo_keep_factors(fo_work *work, const fo_kernels *kernels, int threads);

/* Updates what a rule keeps of each row, of all leaves that have such state: factors.c. Writes the
 * leaves' scratch (start). */
void fo_update_rows(fo_work *work, const fo_kernels *kernels, int threads);

/* Calls work->range for all elements of the chosen leaves, on at most `threads` threads, and
 * returns when all is done. Writes the leaves' scratch (start, tile). Fails only as
 * work->disk says. */
void fo_split(fo_work *work, fo_choice which, int threads);

#endif
