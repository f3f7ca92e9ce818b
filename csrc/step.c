/* The calls that work on a list of leaves. Each checks the whole list before the first write, and
 * then makes one or several passes over it (split.c), whose sums it folds (total.c). */
#include "factors.h"
#include "ieee.h"
#include "total.h"

#include <string.h>

static int is_format(const fo_array *array)
{
    return (unsigned)array->format < FO_FORMATS &&
           (fo_formats()[array->format].extra == 0 || array->extra != NULL);
}

/* Whether a state array has a number for each element of the leaf, or is a sample of them. */
static int is_mapped(const fo_array *array)
{
    if (array->map == FO_EACH)
        return 1;
    const fo_shape *shape = array->extra;
    return array->map == FO_EVERY && shape != NULL && shape->every > 0 &&
           (array->format == FO_F32 || array->format == FO_F64);
}

/* Whether a leaf of a factored rule has either factors, of matrices that are the leaf, or one
 * number for each element. */
static int has_factors(const fo_leaf *leaf, ptrdiff_t n_states)
{
    const fo_array *rows = &leaf->state[0], *columns = &leaf->state[1];
    const int has_rest = leaf->state[n_states - 1].data != NULL;
    if (rows->data == NULL && columns->data == NULL)
        return has_rest && leaf->state[n_states - 1].map == FO_EACH;
    const fo_shape *shape = rows->extra;
    return !has_rest && rows->data != NULL && columns->data != NULL && rows->map == FO_ROWS &&
           columns->map == FO_COLUMNS && shape != NULL && columns->extra == shape &&
           shape->scratch != NULL && shape->matrices > 0 && shape->rows > 0 && shape->columns > 0 &&
           shape->matrices * shape->rows * shape->columns == leaf->n &&
           rows->format == columns->format;
}

/* Whether state is one number for each of a leaf's rows. */
static int is_by_row(const fo_array *state) { return state->data != NULL && state->map == FO_ROWS; }

/* Whether a leaf of rows is such that its tiles can be gathered, and nothing is written of rows
 * that it does not have. */
static int has_rows(const fo_leaf *leaf, const fo_rule *rule, ptrdiff_t n_hypers)
{
    const fo_rows *by = leaf->by_rows;
    const fo_format native = leaf->param.format == FO_F64 ? FO_F64 : FO_F32;
    if (by->length <= 0 || leaf->n % by->length != 0 || rule->kind >= FO_LAYERWISE)
        return 0;
    for (ptrdiff_t j = 0; by->hypers != NULL && j < leaf->n / by->length; j++)
        if (by->hypers[j] < 0 || by->hypers[j] >= n_hypers)
            return 0;
    int is_native = leaf->param.format == native;
    for (int k = 0; k < FO_MAX_STATES; k++) {
        const fo_array *state = &leaf->state[k];
        const fo_shape *shape = state->extra;
        if (is_by_row(state) && (k > 0 || rule->kind != FO_ROWWISE || state->format != native ||
                                 shape == NULL || (leaf->n > 0 && shape->columns != by->length)))
            return 0;
        is_native = is_native && (state->data == NULL || state->format == native);
    }
    return by->rows == NULL || ((is_native || by->length % FO_BLOCK == 0) &&
                                leaf->ema.data == NULL && leaf->copy.data == NULL);
}

/* Whether an array that a step writes beside the parameter may have this format, if it is there. */
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
    if (rule->kind == FO_FACTORED) {
        if (leaf->n > 0 && leaf->grad.data != NULL && !has_factors(leaf, rule->states))
            return 0;
    } else {
        for (int k = 0; k < FO_MAX_STATES; k++)
            if (leaf->state[k].data != NULL && !is_mapped(&leaf->state[k]) &&
                (leaf->by_rows == NULL || !is_by_row(&leaf->state[k])) && leaf->grad.data != NULL)
                return 0;
    }
    const fo_array *direction = rule->kind == FO_MATRIX ? &leaf->state[rule->states - 1] : NULL;
    if (direction != NULL && direction->data != NULL &&
        direction->format != (is_double ? FO_F64 : FO_F32))
        return 0;
    return (leaf->by_rows == NULL || has_rows(leaf, rule, n_hypers)) &&
           is_companion(&leaf->ema, is_double) && is_copy(&leaf->copy, is_double) &&
           (leaf->grad.data == NULL ||
            (is_format(&leaf->grad) && leaf->hyper >= 0 && leaf->hyper < n_hypers));
}

/* Whether the rule exists and has all that it needs of the leaves and of the lists. */
static int is_valid_call(const fo_rule *rules, int rule, const fo_leaf *leaves, ptrdiff_t n,
                         ptrdiff_t n_hypers, const fo_run *how)
{
    for (int i = 0; i <= rule; i++)
        if (rules[i].name == NULL)
            return 0;
    if (rule < 0)
        return 0;
    const int measures = how != NULL && how->measure != FO_MEASURE_NOTHING;
    if ((rules[rule].kind >= FO_LAYERWISE || measures) &&
        (how == NULL || how->tiles == NULL || how->stats == NULL))
        return 0;
    for (ptrdiff_t i = 0; i < n; i++)
        if (!is_valid(&leaves[i], &rules[rule], n_hypers))
            return 0;
    return 1;
}

/* From how many elements on loops prefetch: Adam in float32 then holds 64 MiB, more than caches do.
 * On less, the instructions cost 5 to 9% of a step. */
enum { FAR = 4 << 20 };

static int is_far(const fo_leaf *leaves, ptrdiff_t n)
{
    ptrdiff_t elements = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        elements += leaves[i].grad.data != NULL ? leaves[i].n : 0;
    return elements >= FAR;
}

/* The squares of every leaf's parameter and direction, from one read of all that the rule reads. */
static void direct(fo_work *w, const fo_kernels *kernels, int threads)
{
    if (kernels->rules[w->task.rule].kind == FO_FACTORED)
        fo_find_factors(w, kernels, threads);
    w->range = kernels->direct;
    w->only_reads = 1; /* of state on disk: directions are in memory */
    fo_split(w, FO_WITH_GRAD, threads);
    w->only_reads = 0;
    fo_fold_tiles(w, FO_PART_SQUARES, threads);
}

/* Writes the trust ratio of every leaf. */
static void set_trust(const fo_work *w, const fo_kernels *kernels)
{
    fo_trust *const trust = kernels->trust[w->task.rule];
    const fo_stats *stats = w->task.run->stats;
    for (ptrdiff_t i = 0; i < w->n; i++) {
        fo_leaf *leaf = &w->leaves[i];
        if (leaf->grad.data != NULL)
            leaf->trust = trust(w->task.hypers[leaf->hyper].scalars, (double)leaf->n,
                                stats[i].param, stats[i].update);
    }
}

static int has_failed(const fo_disk *disk) { return disk != NULL && disk->error != 0; }

/* Not inlined, so that compilers move no arithmetic out of the mode that the caller entered. */
static __attribute__((noinline)) fo_status step(int rule, fo_leaf *leaves, ptrdiff_t n,
                                                const fo_hyper *hypers, ptrdiff_t n_hypers,
                                                const fo_run *how, int threads)
{
    const fo_kernels *kernels = fo_active_kernels();
    if (!is_valid_call(kernels->rules, rule, leaves, n, n_hypers, how))
        return FO_BAD_ARGUMENT;
    const fo_task task = {.rule = rule,
                          .hypers = hypers,
                          .run = how,
                          .is_far = is_far(leaves, n),
                          .is_wide = kernels->is_wide};
    fo_disk *const disk = how != NULL ? how->disk : NULL;
    fo_work w = {.leaves = leaves, .n = n, .task = task, .disk = disk};
    int copies_alone = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        copies_alone |= fo_is_chosen(&leaves[i], FO_COPY_ALONE);
    const fo_kind kind = kernels->rules[rule].kind;
    if (kind >= FO_LAYERWISE) {
        if (!how->has_direction)
            direct(&w, kernels, threads);
        if (has_failed(disk))
            return FO_DISK_FAILED;
        if (kernels->trust[rule] != NULL)
            set_trust(&w, kernels);
    }
    if (kind == FO_ROWWISE)
        fo_update_rows(&w, kernels, threads);
    w.range = kernels->step;
    fo_split(&w, FO_WITH_GRAD, threads);
    if (has_failed(disk))
        return FO_DISK_FAILED;
    if (how != NULL && how->measure != FO_MEASURE_NOTHING)
        fo_fold_tiles(&w,
                      how->measure == FO_MEASURE_PARAM ? FO_PART_GRAD
                      : how->has_grad                  ? FO_PART_STEP
                                                       : FO_PART_GRAD | FO_PART_STEP,
                      threads);
    if (kind == FO_FACTORED)
        fo_keep_factors(&w, kernels, threads);
    if (copies_alone) { /* last, because it writes the leaves' start and tile anew */
        w.range = kernels->copy;
        w.disk = NULL; /* it has no use for state */
        fo_split(&w, FO_COPY_ALONE, threads);
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
        kernels->rules[rule].kind < FO_LAYERWISE)
        return FO_BAD_ARGUMENT;
    const fo_task task = {.rule = rule, .hypers = hypers, .run = how, .is_far = is_far(leaves, n)};
    fo_work w = {.leaves = leaves, .n = n, .task = task, .disk = how->disk};
    direct(&w, kernels, threads);
    return has_failed(how->disk) ? FO_DISK_FAILED : FO_OK;
}

fo_status fo_measure(fo_leaf *leaves, ptrdiff_t n, const fo_run *how, int threads)
{
    for (ptrdiff_t i = 0; i < n; i++)
        if (leaves[i].n < 0 || (leaves[i].grad.data != NULL && !is_format(&leaves[i].grad)))
            return FO_BAD_ARGUMENT;
    fo_work w = {.leaves = leaves, .n = n, .task = {.run = how, .is_far = is_far(leaves, n)}};
    w.range = fo_active_kernels()->measure;
    fo_split(&w, FO_WITH_GRAD, threads);
    fo_fold_tiles(&w, FO_PART_GRAD, threads);
    return FO_OK;
}

fo_status fo_sum_rows(fo_leaf *leaves, ptrdiff_t n, int threads)
{
    for (ptrdiff_t i = 0; i < n; i++)
        if (leaves[i].n < 0 || leaves[i].by_rows == NULL || !is_format(&leaves[i].grad))
            return FO_BAD_ARGUMENT;
    fo_work w = {.leaves = leaves, .n = n, .range = fo_active_kernels()->sum_rows};
    fo_split(&w, FO_WITH_GRAD, threads);
    return FO_OK;
}

fo_status fo_stream(fo_leaf *leaves, ptrdiff_t n, int how, int threads)
{
    if (how < 0 || how >= FO_STREAMS)
        return FO_BAD_ARGUMENT;
    fo_work w = {.leaves = leaves, .n = n, .range = fo_active_kernels()->stream};
    w.task = (fo_task){.stream = how};
    fo_split(&w, FO_WITH_GRAD, threads);
    return FO_OK;
}

static void zero(char *bytes, ptrdiff_t begin, ptrdiff_t end)
{
    if (bytes != NULL)
        memset(bytes + begin, 0, (size_t)(end - begin));
}

/* A fo_range. Bytes of 0 are the number 0 in every format. */
static void zero_state(const fo_task *task, const fo_leaf *leaf, ptrdiff_t begin, ptrdiff_t end)
{
    (void)task;
    for (int k = 0; k < FO_MAX_STATES; k++) {
        const fo_array *state = &leaf->state[k];
        if (state->map != FO_EACH)
            continue;
        zero(state->data, fo_data_bytes(state, begin), fo_data_bytes(state, end));
        zero(state->extra, fo_extra_bytes(state, begin), fo_extra_bytes(state, end));
    }
}

fo_status fo_zero_state(fo_leaf *leaves, ptrdiff_t n, int threads)
{
    fo_range *const range[] = {zero_state, zero_state};
    fo_work w = {.leaves = leaves, .n = n, .range = range};
    fo_split(&w, FO_ALL, threads);
    return FO_OK;
}
