/* See lists.h. */
#include "lists.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FO_ASAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(FO_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, n) ((void)(at), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(at, n) ((void)(at), (void)(n))
#endif

enum { GUARD = 64 };

/* The memory of one array of a list: GUARD bytes, `size` bytes at an odd address, GUARD bytes. */
typedef struct block {
    struct block *next;
    char *memory, *data;
    size_t size;
    fo_array *array; /* this memory is its data, or its extra */
    int is_extra;
    ptrdiff_t leaf;
    int slot; /* 0: parameter, 1: gradient, then states, EMA, COPY */
} block;

enum { EMA = 2 + FO_MAX_STATES, COPY };

/* ---------------------------------------------------------------- choices */

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

source source_from(const uint8_t *bytes, size_t size)
{
    source s = {.bytes = bytes, .left = size, .random = size};
    for (size_t i = 0; i < size; i++)
        s.random = mix(s.random ^ bytes[i]);
    return s;
}

source source_seeded(uint64_t seed) { return (source){.random = mix(seed)}; }

uint64_t random_bits(source *s) { return s->random = mix(s->random); }

ptrdiff_t choose(source *s, ptrdiff_t n)
{
    uint64_t x = 0;
    if (s->left == 0)
        return (ptrdiff_t)(random_bits(s) % (uint64_t)n);
    for (ptrdiff_t reach = 1; reach < n && s->left > 0; reach *= 256, s->left--)
        x = x * 256 + *s->bytes++;
    return (ptrdiff_t)(x % (uint64_t)n);
}

/* ---------------------------------------------------------------- values */

/* A float of moderate size, or sometimes one of the edge cases of arithmetic. */
static float value(source *s, int hostile)
{
    static const uint32_t odd[] = {0,          0x80000000, 1,          0x007fffff,
                                   0x00800000, 0x7f7fffff, 0xff7fffff, 0x7f800000,
                                   0xff800000, 0x7fc00000, 0x3f800000};
    uint64_t x = random_bits(s);
    uint32_t bits = (uint32_t)x & 0x807fffff;
    bits |= (uint32_t)(127 - 24 + (x >> 32) % 36) << 23; /* 2^-24 ... 2^11 */
    if (hostile && (x >> 40) % 16 == 0)
        bits = odd[(x >> 48) % (sizeof odd / sizeof *odd)];
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Elements of any format, by size: doubles, floats, the upper halves of floats (moderate as bf16,
 * anything as f16), bytes. */
static void fill(source *s, block *b, int hostile)
{
    const size_t size = b->is_extra ? 1 : (size_t)fo_formats()[b->array->format].size;
    for (char *to = b->data; to < b->data + b->size; to += size) {
        const float x = value(s, hostile);
        const double wide = x * (1 + 0x1p-30 * (double)(s->random >> 50));
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        if (size == 8)
            memcpy(to, &wide, 8);
        else if (size == 4)
            memcpy(to, &bits, 4);
        else {
            bits >>= 16;
            memcpy(to, &bits, size == 2 ? 2 : 1); /* all supported machines are little-endian */
        }
    }
}

/* NaNs of the formats whose names begin so: without their sign they are greater than `infinity`. */
static const struct {
    const char *name;
    uint64_t infinity, nan;
} nans[] = {
    {"float32", 0x7f800000, 0x7fc00000},
    {"float64", 0x7ff0000000000000, 0x7ff8000000000000},
    {"float16", 0x7c00, 0x7e00},
    {"bfloat16", 0x7f80, 0x7fc0},
};

/* Replaces all NaNs by the same one: payloads and signs are not promised. */
static void one_nan(const block *b, char *data)
{
    const fo_format_info *about = &fo_formats()[b->array->format];
    const size_t size = (size_t)about->size;
    const uint64_t sign = (uint64_t)1 << (8 * size - 1);
    for (size_t k = 0; k < sizeof nans / sizeof *nans && !b->is_extra; k++)
        if (strncmp(about->name, nans[k].name, strlen(nans[k].name)) == 0)
            for (char *at = data; at < data + b->size; at += size) {
                uint64_t bits = 0;
                memcpy(&bits, at, size);
                if ((bits & (sign - 1)) > nans[k].infinity)
                    memcpy(at, &nans[k].nan, size);
            }
}

/* ---------------------------------------------------------------- lists */

static block *add_block(source *s, list *l, ptrdiff_t leaf, int slot, fo_array *array,
                        ptrdiff_t bytes)
{
    block *b = malloc(sizeof *b);
    const size_t offset = (size_t)choose(s, 17), size = (size_t)bytes;
    char *memory = malloc(offset + size + 2 * GUARD);
    if (b == NULL || memory == NULL)
        abort();
    memset(memory, 0xa5, offset + size + 2 * GUARD);
    *b = (block){l->blocks, memory, memory + GUARD + offset, size, array, 0, leaf, slot};
    memset(b->data, 0, size);
    ASAN_POISON_MEMORY_REGION(memory, GUARD + offset);
    ASAN_POISON_MEMORY_REGION(b->data + size, GUARD);
    return l->blocks = b;
}

static void add_array(source *s, list *l, ptrdiff_t leaf, int slot, fo_array *array, int format,
                      int hostile)
{
    const ptrdiff_t n = fo_count(array, l->leaves[leaf].n);
    const int is_filled = slot < 2 || (hostile && choose(s, 4) == 0);
    array->format = (fo_format)format;
    block *data = add_block(s, l, leaf, slot, array, fo_data_bytes(array, n)), *extra = NULL;
    array->data = data->data;
    if (fo_formats()[format].extra > 0) {
        extra = add_block(s, l, leaf, slot, array, fo_extra_bytes(array, n));
        extra->is_extra = 1;
        array->extra = extra->data;
    }
    if (is_filled)
        fill(s, data, hostile);
    if (is_filled && extra != NULL)
        fill(s, extra, hostile);
}

static ptrdiff_t some_size(source *s, ptrdiff_t most)
{
    ptrdiff_t n = 0;
    switch (choose(s, 4)) {
    case 0:
        n = choose(s, 40);
        break;
    case 1: /* near borders of tiles */
        n = choose(s, 20) * FO_TILE + choose(s, 5) - 2;
        break;
    case 2: /* near powers of two */
        n = ((ptrdiff_t)1 << choose(s, 18)) + choose(s, 3) - 1;
        break;
    default:
        n = choose(s, most + 1);
    }
    return n < 0 ? 0 : n > most ? most : n;
}

const char *const *tested_isas(void)
{
    static const char *only[2];
    only[0] = getenv("FUSEDOPT_ISA");
    return only[0] != NULL ? only : fo_isas();
}

int rule_count(void)
{
    int n = 0;
    while (fo_rules()[n].name != NULL)
        n++;
    return n;
}

/* Scalars by which a rule divides must have a reciprocal in float: see csrc/divide.inc. */
static int is_divisor(const char *scalar) { return strcmp(scalar, "root") == 0; }

static void new_constants(source *s, list *l)
{
    const char *const *names = fo_rules()[l->rule].scalars;
    static const double some[] = {0, 1, 0.5, 0.9, 0.999, 0.1, 1e-3, 1e-8, -1, 3, 1e-42, 1e300};
    enum { SOME = sizeof some / sizeof *some, IN_RANGE = SOME - 2 };
    const ptrdiff_t mild = choose(s, 4) ? 7 : SOME; /* values that overflow or cancel are rare */
    for (ptrdiff_t i = 0; i < l->n_hypers; i++) {
        fo_hyper *h = &l->hypers[i];
        memset(h, 0, sizeof *h);
        h->grad_scale = choose(s, 2) ? 1 : some[choose(s, SOME)];
        h->l2 = choose(s, 2) ? 0 : some[choose(s, mild)];
        h->l1 = choose(s, 2) ? 0 : some[choose(s, mild)];
        for (int k = 0; names[k] != NULL; k++)
            h->scalars[k] = some[choose(s, is_divisor(names[k]) && mild == SOME ? IN_RANGE : mild)];
    }
    for (ptrdiff_t i = 0; i < l->n_hypers; i++)
        l->hypers[i].ema_weight = some[choose(s, 7)];
    for (ptrdiff_t i = 0; i < l->n; i++) {
        l->leaves[i].key = random_bits(s);
        l->leaves[i].grad_scale = choose(s, 2) ? 1 : some[choose(s, SOME)];
    }
    l->run.clip_value = choose(s, 2) ? 0 : some[1 + choose(s, 6)];
    l->run.zero_grads = choose(s, 4) == 0;
    l->run.measure = (fo_measures)choose(s, 3);
}

static int format_of(source *s, int wish) { return wish < 0 ? (int)choose(s, FO_FORMATS) : wish; }

/* Whether the library steps a leaf of these formats. Tries it on a leaf without elements. */
static int is_supported(int rule, int param, int state)
{
    char byte[8];
    const fo_hyper hyper = {0};
    fo_leaf leaf = {.param = {byte, byte, (fo_format)param, FO_EACH},
                    .grad = {byte, byte, (fo_format)param, FO_EACH},
                    .state = {{byte, byte, (fo_format)state, FO_EACH}}};
    fo_stats stats;
    const fo_run run = {.tiles = &stats, .stats = &stats};
    return fo_step(rule, &leaf, 1, &hyper, 1, &run, 1) == FO_OK; /* writes nothing */
}

/* The largest divisor of n up to some choice. */
static ptrdiff_t some_divisor(source *s, ptrdiff_t n, ptrdiff_t most)
{
    ptrdiff_t divisor = 1 + choose(s, most);
    while (n % divisor != 0)
        divisor--;
    return divisor;
}

static void map_state(list *l, ptrdiff_t leaf, int k, fo_map map)
{
    l->leaves[leaf].state[k].map = map;
    l->leaves[leaf].state[k].extra = &l->shapes[leaf];
}

/* Adds state to a leaf. Where formats are chosen at random, samples and factors are too. */
static void add_states(source *s, list *l, ptrdiff_t i, int state, int hostile, int is_any)
{
    const fo_rule *rule = &fo_rules()[l->rule];
    fo_leaf *leaf = &l->leaves[i];
    fo_shape *shape = &l->shapes[i];
    const int native = leaf->param.format == FO_F64 ? FO_F64 : FO_F32;
    const ptrdiff_t optional = rule->states - rule->required;
    ptrdiff_t states = rule->required + (optional > 0 ? choose(s, optional + 1) : 0), first = 0;
    if (rule->kind == FO_FACTORED) {
        states = 3, first = 2;
        if (is_any && leaf->n > 0 && choose(s, 2)) {
            shape->columns = some_divisor(s, leaf->n, 1 + choose(s, 1500));
            shape->rows = some_divisor(s, leaf->n / shape->columns, 1 + choose(s, 300));
            shape->matrices = leaf->n / shape->columns / shape->rows;
            states = 2, first = 0;
            map_state(l, i, 0, FO_ROWS);
            map_state(l, i, 1, FO_COLUMNS);
            shape->scratch = calloc(1, fo_scratch(leaf));
            if (shape->scratch == NULL)
                abort();
        }
    } else if (rule->kind == FO_SUMMING && is_any) {
        shape->every = 1 + choose(s, 70);
        for (int k = 2; k < states; k++)
            if (choose(s, 2))
                map_state(l, i, k, FO_EVERY);
    }
    for (int k = (int)first; k < states; k++) { /* a direction is of the compute type */
        const int is_native =
            leaf->state[k].map != FO_EACH || (rule->kind == FO_MATRIX && k == rule->states - 1);
        add_array(s, l, i, 2 + k, &leaf->state[k], is_native ? native : state, hostile);
    }
}

list make_list(source *s, wish w)
{
    list l = {.rule = w.rule < 0 ? (int)choose(s, rule_count()) : w.rule};
    l.n = w.param < 0 ? choose(s, w.leaves + 1) : w.leaves;
    l.n_hypers = 1 + choose(s, 3);
    l.leaves = calloc((size_t)l.n + 1, sizeof *l.leaves);
    l.hypers = calloc((size_t)l.n_hypers, sizeof *l.hypers);
    l.shapes = calloc((size_t)l.n + 1, sizeof *l.shapes);
    if (l.leaves == NULL || l.hypers == NULL || l.shapes == NULL)
        abort();
    new_constants(s, &l);
    for (ptrdiff_t i = 0; i < l.n; i++) {
        fo_leaf *leaf = &l.leaves[i];
        leaf->n = some_size(s, w.elements);
        leaf->hyper = choose(s, l.n_hypers);
        leaf->origin = choose(s, 2) ? 0 : (ptrdiff_t)(random_bits(s) >> 20);
        const int format = format_of(s, w.param);
        int state = format_of(s, w.state);
        if (w.state < 0 && choose(s, 64) && !is_supported(l.rule, format, state))
            state = format;
        add_array(s, &l, i, 0, &leaf->param, format, w.hostile);
        if (w.grad >= 0 || choose(s, 8))
            add_array(s, &l, i, 1, &leaf->grad, format_of(s, w.grad), w.hostile);
        add_states(s, &l, i, state, w.hostile, w.state < 0);
        if (choose(s, 3) == 0)
            add_array(s, &l, i, EMA, &leaf->ema, format == FO_F64 ? FO_F64 : FO_F32, w.hostile);
        if (choose(s, 3) == 0) {
            const int kinds[] = {format == FO_F64 ? FO_F64 : FO_F32, FO_BF16, FO_F16};
            add_array(s, &l, i, COPY, &leaf->copy, kinds[choose(s, 3)], 0);
        }
    }
    l.run.tiles = calloc((size_t)fo_count_tiles(l.leaves, l.n) + 1, sizeof *l.run.tiles);
    l.run.stats = calloc((size_t)l.n + 1, sizeof *l.run.stats);
    if (l.run.tiles == NULL || l.run.stats == NULL)
        abort();
    return l;
}

void next_step(source *s, list *l, int hostile)
{
    for (block *b = l->blocks; b != NULL; b = b->next)
        if (b->slot == 1)
            fill(s, b, hostile);
    new_constants(s, l);
}

int states_are_zero(const list *l)
{
    for (const block *b = l->blocks; b != NULL; b = b->next)
        for (size_t at = 0;
             b->slot > 1 && b->slot < EMA && b->array->map == FO_EACH && at < b->size; at++)
            if (b->data[at] != 0)
                return 0;
    return 1;
}

void free_list(list *l)
{
    for (block *b = l->blocks, *next; b != NULL; b = next) {
        next = b->next;
        ASAN_UNPOISON_MEMORY_REGION(b->memory, (size_t)(b->data - b->memory) + b->size + GUARD);
        free(b->memory);
        free(b);
    }
    for (ptrdiff_t i = 0; i < l->n; i++)
        free(l->shapes[i].scratch);
    free(l->shapes);
    free(l->leaves);
    free(l->hypers);
    free(l->run.tiles);
    free(l->run.stats);
}

/* ---------------------------------------------------------------- comparison */

/* Replaces NaNs among n doubles by the same one. */
static void one_nan_of(double *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] != x[i] ? (double)NAN : x[i];
}

static void one_nan_in(fo_stats *stats, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        one_nan_of(&stats[i].grad, 5); /* grad is the first of five doubles */
    }
}

static uint64_t hash_bytes(const void *data, size_t size, uint64_t hash)
{
    for (size_t i = 0; i < size; i++) /* FNV-1a */
        hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
    return hash;
}

uint64_t digest(const list *l, uint64_t hash)
{
    one_nan_in(l->run.stats, l->n);
    hash = hash_bytes(l->run.stats, (size_t)l->n * sizeof *l->run.stats, hash);
    for (const block *b = l->blocks; b != NULL; b = b->next) {
        char *copy = malloc(b->size + 1);
        if (copy == NULL)
            abort();
        memcpy(copy, b->data, b->size);
        one_nan(b, copy);
        hash = hash_bytes(copy, b->size, hash);
        free(copy);
    }
    return hash;
}

static int is_guarded(const block *b)
{
    size_t before = (size_t)(b->data - b->memory);
    ASAN_UNPOISON_MEMORY_REGION(b->memory, before + b->size + GUARD);
    for (size_t i = 0; i < before + b->size + GUARD; i++)
        if ((i < before || i >= before + b->size) && (uint8_t)b->memory[i] != 0xa5)
            return 0;
    return 1;
}

const char *difference(const list *ours, const list *theirs)
{
    static char text[200];
    for (const block *a = ours->blocks, *b = theirs->blocks; a != NULL; a = a->next, b = b->next) {
        const char *what = NULL;
        size_t at = 0;
        one_nan(a, a->data);
        one_nan(b, b->data);
        while (at < a->size && a->data[at] == b->data[at])
            at++;
        if (at < a->size)
            what = "differs";
        else if (!is_guarded(a) || !is_guarded(b))
            what = "was written outside";
        if (what != NULL) {
            snprintf(text, sizeof text,
                     "rule %s, leaf %td of %td elements, slot %d (%s%s) %s at byte %zu",
                     fo_rules()[ours->rule].name, a->leaf, ours->leaves[a->leaf].n, a->slot,
                     fo_formats()[a->array->format].name, a->is_extra ? ", extra" : "", what, at);
            return text;
        }
    }
    const ptrdiff_t tiles = fo_count_tiles(ours->leaves, ours->n);
    one_nan_in(ours->run.tiles, tiles);
    one_nan_in(theirs->run.tiles, tiles);
    if (memcmp(ours->run.tiles, theirs->run.tiles, (size_t)tiles * sizeof *ours->run.tiles) != 0)
        return "the sums of tiles differ";
    return NULL;
}
