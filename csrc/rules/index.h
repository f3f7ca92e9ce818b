/* The one list of rules. A new rule is its header here, one row below, and the two files of the
 * same name in src/fusedopt/optim and src/fusedopt/reference.
 *
 * A PLAIN rule is one function over a tile. A LAYERWISE one has a rate for each leaf, its trust
 * ratio: before the step, <rule>_direction is called on every tile, writes where the rule would go,
 * and changes nothing; <rule>_trust gets the norms of the parameter and of that direction over the
 * leaf; what it returns the rule finds behind its constants, in h[FO_TRUST].
 *
 * In a loop stores come last: a load after them whose address agrees with theirs in the lower 12
 * bits, as is common among large arrays, would wait for them (Intel's optimization manual, "4-KByte
 * aliasing").
 *
 * Included by tile.h once per compute type, so it has no guard. */
#include "adagrad.h"
#include "adam.h"
#include "lamb.h"
#include "lars.h"
#include "lion.h"
#include "rmsprop.h"
#include "sgd.h"

#undef FO_RULES
#define FO_RULES(X) /* name, scalars, state arrays, how many of them are required, kind */         \
    X(adam, ADAM_SCALARS, 3, 2, PLAIN)                                                             \
    X(sgd, SGD_SCALARS, 1, 0, PLAIN)                                                               \
    X(lamb, LAMB_SCALARS, 2, 2, LAYERWISE)                                                         \
    X(lars, LARS_SCALARS, 1, 1, LAYERWISE)                                                         \
    X(lion, LION_SCALARS, 1, 1, PLAIN)                                                             \
    X(rmsprop, RMSPROP_SCALARS, 3, 1, PLAIN)                                                       \
    X(adagrad, ADAGRAD_SCALARS, 1, 1, PLAIN)
