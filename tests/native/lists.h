/* Random work lists for the tests of the C library, made from the tables of rules and formats
 * alone: a new rule or format is tested without a change here.
 *
 * All choices come from a `source`: first from the bytes that it was given (a fuzzer's input), then
 * from a generator seeded by them. The same source gives the same list, so that two implementations
 * can step equal lists, which are then compared. */
#ifndef FUSEDOPT_TEST_LISTS_H
#define FUSEDOPT_TEST_LISTS_H

#include "kernels.h"

typedef struct source {
    const uint8_t *bytes;
    size_t left;
    uint64_t random;
} source;

source source_from(const uint8_t *bytes, size_t size);
source source_seeded(uint64_t seed);
uint64_t random_bits(source *s);          /* never from the bytes */
ptrdiff_t choose(source *s, ptrdiff_t n); /* one of 0 ... n - 1 */

/* A list and the memory that it points to: arrays at odd addresses, between guard bytes. */
typedef struct list {
    int rule;
    ptrdiff_t n, n_hypers;
    fo_leaf *leaves;
    fo_hyper *hypers;
    fo_shape *shapes; /* of each leaf */
    fo_run run;
    struct block *blocks;
} list;

/* What a list is to contain; -1: chosen at random. */
typedef struct wish {
    int rule, param, grad, state; /* the row of the rule; formats */
    ptrdiff_t leaves, elements;   /* upper limits; exactly `leaves` if `param` is given */
    int hostile;                  /* infinities and the like as values; any bytes as state */
} wish;

list make_list(source *s, wish w);
void next_step(source *s, list *l, int hostile); /* other gradients, constants and keys */
int states_are_zero(const list *l);
void free_list(list *l);

int rule_count(void);

/* The instruction sets to test: all of this machine, or the one in FUSEDOPT_ISA. Ended by NULL. */
const char *const *tested_isas(void);

/* A hash of all arrays and statistics, in which all NaNs are made the same. */
uint64_t digest(const list *l, uint64_t hash);

/* A text that says where two lists made from the same source differ, or which array was written
 * outside its bounds; NULL if none. Makes all NaNs in the lists the same. */
const char *difference(const list *ours, const list *theirs);

#endif
