/* One parallel loop, behind which a build has one of three backends: OpenMP (threads.c), a pthread
 * pool (pool.c), or none (threads.c without OpenMP). All give the same bits, because the caller
 * fixes the chunks and no chunk depends on who runs it. */
#ifndef FUSEDOPT_THREADS_H
#define FUSEDOPT_THREADS_H

#include "flags.h"
#include "ieee.h"

#include <stddef.h>

typedef void fo_body(void *context, ptrdiff_t begin, ptrdiff_t end);

/* Calls body(context, begin, end) for runs of chunks that together are [0, chunks), on at most
 * `threads` threads, the caller among them, in the mode of IEEE 754; returns when all have ended.
 * Never fails: with fewer threads to be had it uses fewer. Safe to call from several threads at
 * once and in the child of a fork. */
void fo_parallel(fo_body *body, void *context, ptrdiff_t chunks, int threads);

#endif
