/* One parallel loop. A build has one of three backends: OpenMP (threads.c), a pthread pool
 * (pool.c), or none (threads.c without OpenMP). All give the same bits, because the caller fixes
 * the chunks and no chunk depends on the thread that runs it. */
#ifndef FUSEDOPT_THREADS_H
#define FUSEDOPT_THREADS_H

#include "flags.h"
#include "ieee.h"

#include <stddef.h>

typedef void fo_body(void *context, ptrdiff_t begin, ptrdiff_t end);

/* Calls body(context, begin, end) for ranges of chunks that together are [0, chunks), on at most
 * `threads` threads, of which the caller is one, in IEEE 754's default mode; returns when all have
 * ended. Never fails: it uses fewer threads if the system gives fewer. May be called from several
 * threads at once, and in the child of a fork. */
void fo_parallel(fo_body *body, void *context, ptrdiff_t chunks, int threads);

#endif
