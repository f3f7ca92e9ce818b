/* Where the means and factors of a factored rule lie during a step. Internal. */
#ifndef FUSEDOPT_FACTORS_H
#define FUSEDOPT_FACTORS_H

#include "kernels.h"

/* A leaf's matrices are summed in parts of that many rows and columns: whichever thread sums a
 * part, the order is the same. */
enum { FO_PART_ROWS = 128, FO_PART_COLUMNS = 2048 };
/* Rows that are summed at once: for these, sums of columns are loaded and stored once. */
enum { FO_ROWS_AT_ONCE = 4 };

typedef struct fo_factors {
    ptrdiff_t high, wide;           /* parts of a matrix: how many in a column, and in a row */
    double *row_sums, *column_sums; /* of squares: by row and part beside, where there are several;
                                       by part below and column, alike */
    /* in the compute type */
    void *row_means, *column_means; /* of the gradient's squares */
    void *rows, *columns;           /* factors: their product is 1 / root of the estimate */
} fo_factors;

static inline ptrdiff_t fo_parts_below(const fo_shape *shape)
{
    return (shape->rows + FO_PART_ROWS - 1) / FO_PART_ROWS;
}

static inline ptrdiff_t fo_parts_beside(const fo_shape *shape)
{
    return (shape->columns + FO_PART_COLUMNS - 1) / FO_PART_COLUMNS;
}

static inline ptrdiff_t fo_parts(const fo_shape *shape)
{
    return shape->matrices * fo_parts_below(shape) * fo_parts_beside(shape);
}

/* `size` is that of an element of the compute type. */
static inline fo_factors fo_factors_of(const fo_shape *shape, size_t size)
{
    const ptrdiff_t rows = shape->matrices * shape->rows;
    fo_factors it = {.high = fo_parts_below(shape), .wide = fo_parts_beside(shape)};
    it.row_sums = shape->scratch;
    it.column_sums = it.row_sums + (it.wide > 1 ? rows * it.wide : 0);
    it.row_means = it.column_sums + (it.high > 1 ? shape->matrices * it.high * shape->columns : 0);
    it.rows = (char *)it.row_means + (size_t)rows * size;
    it.column_means = (char *)it.rows + (size_t)rows * size;
    it.columns = (char *)it.column_means + (size_t)(shape->matrices * shape->columns) * size;
    return it;
}

/* Whether a leaf of a factored rule has a gradient, and factors. */
static inline int fo_is_factored(const fo_leaf *leaf)
{
    return leaf->n > 0 && leaf->grad.data != NULL && leaf->state[0].data != NULL;
}

#endif
