/* The one list of rules. A new rule is its header here, one row below, and the two files of the
 * same name in src/fusedopt/optim and src/fusedopt/reference.
 *
 * Included by tile.h once per compute type, so it has no guard. */
#include "adam.h"
#include "sgd.h"

#undef FO_RULES
#define FO_RULES(X) /* name, scalars, state arrays, how many of them are required */               \
    X(adam, ADAM_SCALARS, 3, 2)                                                                    \
    X(sgd, SGD_SCALARS, 1, 0)
