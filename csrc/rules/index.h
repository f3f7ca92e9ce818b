/* The one list of rules. A new rule is its header here, one row below, and the two files of the
 * same name in src/fusedopt/optim and src/fusedopt/reference.
 *
 * An ELEMENTWISE rule is one function over a tile. A LAYERWISE one has a rate for each leaf, its
 * trust ratio. Before the step, <rule>_direction is called on every block; it writes the direction
 * in which the rule would go, and nothing else. <rule>_trust gets the sums of squares of the
 * parameter and of that direction over the leaf, and returns the ratio, which the rule reads from
 * h[FO_TRUST]. A COUNTING rule is a layer-wise rule whose direction is 1 or 0: <rule>_trust gets
 * how many elements the leaf has, and of how many the direction is 1.
 *
 * A ROWWISE rule may keep one number for each row in its first state, of leaves of rows (rows.inc).
 * Before its loop, <rule>_row gets the mean of the squares of a row's gradient and returns the new
 * number, which the loop reads and does not write.
 *
 * A FACTORED rule is a layer-wise one that keeps, of a leaf of matrices, the means of squares of
 * rows and of columns in its first two states (factors.inc), and of any other leaf a third state:
 * its loop gets either the factors of each element, or the third. <rule>_trust also gets the number
 * of the leaf's elements.
 *
 * A SUMMING rule has <rule>_terms in the place of a direction, which writes two terms for each
 * element. fo_direct sums them over each leaf, and the caller makes the constants of the step by
 * the sums. Some of its states may be samples (FO_EVERY). Its loop does not get the last state,
 * which is for the terms alone.
 *
 * A MATRIX rule has a direction too, but no ratio: its last state array, of the compute type, holds
 * the direction during a step, and the caller replaces it between fo_direct and fo_step. An
 * INTERNAL rule is elementwise, but no optimizer: the package uses it and has no class for it.
 *
 * With FO_SETS, each set of formats in kernels.c gets a loop of its own for the rule, which makes
 * the wheel larger: for rules where measurement shows that this matters. With FO_NO_SETS, one loop
 * takes all formats.
 *
 * In a loop, stores come last. A load after a store waits for it if the lower 12 bits of both
 * addresses agree, as is common among large arrays (Intel's optimization manual, "4-KByte
 * aliasing").
 *
 * Included by tile.inc once per compute type, so it has no guard. */
#include "adadelta.h"
#include "adafactor.h"
#include "adagrad.h"
#include "adam.h"
#include "adamax.h"
#include "add.h"
#include "ademamix.h"
#include "adopt.h"
#include "asgd.h"
#include "lamb.h"
#include "lars.h"
#include "lion.h"
#include "muon.h"
#include "nadam.h"
#include "prodigy.h"
#include "radam.h"
#include "rmsprop.h"
#include "rprop.h"
#include "schedulefree.h"
#include "sgd.h"
#include "signsgd.h"
#include "yogi.h"

/* these use some of the above */
#include "cautious_adam.h"
#include "cautious_lion.h"
#include "rowwise_adagrad.h"

#undef FO_RULES
#define FO_RULES(X) /* name, scalars, state arrays, how many of them are required, kind, sets */   \
    X(adam, ADAM_SCALARS, 3, 2, ELEMENTWISE, FO_SETS)                                              \
    X(sgd, SGD_SCALARS, 1, 0, ELEMENTWISE, FO_SETS)                                                \
    X(lamb, LAMB_SCALARS, 2, 2, LAYERWISE, FO_NO_SETS)                                             \
    X(lars, LARS_SCALARS, 1, 1, LAYERWISE, FO_NO_SETS)                                             \
    X(lion, LION_SCALARS, 1, 1, ELEMENTWISE, FO_SETS)                                              \
    X(rmsprop, RMSPROP_SCALARS, 3, 1, ELEMENTWISE, FO_SETS)                                        \
    X(rprop, RPROP_SCALARS, 2, 2, ELEMENTWISE, FO_NO_SETS)                                         \
    X(adopt, ADOPT_SCALARS, 2, 2, ELEMENTWISE, FO_NO_SETS)                                         \
    X(asgd, ASGD_SCALARS, 1, 1, ELEMENTWISE, FO_NO_SETS)                                           \
    X(signsgd, SIGNSGD_SCALARS, 1, 0, ELEMENTWISE, FO_NO_SETS)                                     \
    X(yogi, YOGI_SCALARS, 2, 2, ELEMENTWISE, FO_NO_SETS)                                           \
    X(muon, MUON_SCALARS, 2, 2, MATRIX, FO_NO_SETS)                                                \
    X(adafactor, ADAFACTOR_SCALARS, 3, 0, FACTORED, FO_NO_SETS)                                    \
    X(prodigy, PRODIGY_SCALARS, 4, 4, SUMMING, FO_NO_SETS)                                         \
    X(adagrad, ADAGRAD_SCALARS, 1, 1, ELEMENTWISE, FO_SETS)                                        \
    X(nadam, NADAM_SCALARS, 2, 2, ELEMENTWISE, FO_NO_SETS)                                         \
    X(radam, RADAM_SCALARS, 2, 2, ELEMENTWISE, FO_NO_SETS)                                         \
    X(adamax, ADAMAX_SCALARS, 2, 2, ELEMENTWISE, FO_NO_SETS)                                       \
    X(adadelta, ADADELTA_SCALARS, 2, 2, ELEMENTWISE, FO_NO_SETS)                                   \
    X(ademamix, ADEMAMIX_SCALARS, 3, 3, ELEMENTWISE, FO_NO_SETS)                                   \
    X(schedulefree, SCHEDULEFREE_SCALARS, 2, 1, ELEMENTWISE, FO_NO_SETS)                           \
    X(cautious_adam, CAUTIOUS_ADAM_SCALARS, 3, 2, COUNTING, FO_NO_SETS)                            \
    X(cautious_lion, CAUTIOUS_LION_SCALARS, 1, 1, COUNTING, FO_NO_SETS)                            \
    X(rowwise_adagrad, ROWWISE_ADAGRAD_SCALARS, 1, 1, ROWWISE, FO_NO_SETS)                         \
    X(add, ADD_SCALARS, 0, 0, INTERNAL, FO_NO_SETS)
