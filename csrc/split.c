/* Splits a list of leaves over threads: one parallel loop over chunks that depend on the list
 * alone.
 *
 * All leaves lie one after the other on a line. A tile's length on it is that of its elements and
 * of its overhead. The line is cut into chunks of equal length, and a tile belongs to the chunk in
 * which it begins: chunks cost about the same whatever the mixture of sizes, and a tile is never
 * cut. */
#include "disk.h"

enum {
    TILE_LENGTH = FO_TILE + 32, /* elements that cost as much as a tile: 32 is its overhead */
    /* measured: large enough to hide what it costs to claim a chunk, small enough to balance */
    CHUNK_LENGTH = 8 * TILE_LENGTH,
    /* measured: what threads save if they are awake, and if they are not */
    MEDIUM_LENGTH = 32 * 1024,
    LARGE_LENGTH = 192 * 1024,
};

/* Writes each leaf's start and tile; returns the length of the line. A leaf without work has none.
 */
static ptrdiff_t lay_out(fo_leaf *leaves, ptrdiff_t n, fo_choice which)
{
    ptrdiff_t length = 0, tile = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        fo_leaf *leaf = &leaves[i];
        leaf->start = length;
        leaf->tile = tile;
        tile += fo_tiles_of(leaf);
        if (fo_is_chosen(leaf, which)) {
            ptrdiff_t full = leaf->n / FO_TILE, rest = leaf->n % FO_TILE;
            length += full * TILE_LENGTH + (rest > 0 ? rest + (TILE_LENGTH - FO_TILE) : 0);
        }
    }
    return length;
}

ptrdiff_t fo_leaf_at(const fo_work *w, ptrdiff_t place)
{
    ptrdiff_t low = 0, high = w->n;
    while (high - low > 1) {
        ptrdiff_t middle = low + (high - low) / 2;
        if (w->leaves[middle].start <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* The first tile of a leaf that begins at or after a place on the line. */
static ptrdiff_t tile_from(const fo_leaf *leaf, ptrdiff_t place)
{
    return place <= leaf->start ? 0 : (place - leaf->start + TILE_LENGTH - 1) / TILE_LENGTH;
}

static void run_chunks(void *context, ptrdiff_t first, ptrdiff_t last)
{
    const fo_work *w = context;
    const ptrdiff_t from = first * CHUNK_LENGTH, to = last * CHUNK_LENGTH;
    const ptrdiff_t line_end = to < w->length ? to : w->length;

    for (ptrdiff_t i = fo_leaf_at(w, from); i < w->n && w->leaves[i].start < line_end; i++) {
        const fo_leaf *leaf = &w->leaves[i];
        const ptrdiff_t next = i + 1 < w->n ? w->leaves[i + 1].start : w->length;
        if (next == leaf->start)
            continue; /* this leaf is not chosen */
        ptrdiff_t begin = tile_from(leaf, from) * FO_TILE, end = tile_from(leaf, to) * FO_TILE;
        if (end > leaf->n)
            end = leaf->n;
        if (begin >= end)
            continue;
        w->range[fo_compute_type(leaf)](&w->task, leaf, begin, end);
    }
}

fo_size fo_size_of(ptrdiff_t elements)
{
    return elements < MEDIUM_LENGTH ? FO_SMALL : elements < LARGE_LENGTH ? FO_MEDIUM : FO_LARGE;
}

void fo_split(fo_work *w, fo_choice which, int threads)
{
    w->length = lay_out(w->leaves, w->n, which);
    if (w->disk != NULL) {
        fo_pass_disk(w, which, !w->only_reads, threads);
        return;
    }
    ptrdiff_t chunks = (w->length + CHUNK_LENGTH - 1) / CHUNK_LENGTH;
    fo_parallel(run_chunks, w, chunks, fo_size_of(w->length), threads);
}

ptrdiff_t fo_count_tiles(const fo_leaf *leaves, ptrdiff_t n)
{
    ptrdiff_t tiles = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        tiles += fo_tiles_of(&leaves[i]);
    return tiles;
}
