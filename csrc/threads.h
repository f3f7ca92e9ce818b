/* One parallel loop. threads.c decides whether it runs on threads now, and a backend runs it:
 * OpenMP (openmp.c) or a pthread pool (pool.c). A build without threads has serial.c alone. All
 * give the same bits, because the caller fixes the chunks and no chunk depends on the thread that
 * runs it. */
#ifndef FUSEDOPT_THREADS_H
#define FUSEDOPT_THREADS_H

#include "flags.h"
#include "ieee.h"

#include <stddef.h>
#include <stdint.h>

typedef void fo_body(void *context, ptrdiff_t begin, ptrdiff_t end);

/* How much work a loop is: too little for threads, enough for threads that are awake, or enough to
 * wake them. */
typedef enum fo_size { FO_SMALL, FO_MEDIUM, FO_LARGE } fo_size;

/* Calls body(context, begin, end) for ranges of chunks that together are [0, chunks), on at most
 * `threads` threads, of which the caller is one, in IEEE 754's default mode; returns when all have
 * ended. Never fails: it uses fewer threads if the system gives fewer. May be called from several
 * threads at once, and in the child of a fork. */
void fo_parallel(fo_body *body, void *context, ptrdiff_t chunks, fo_size size, int threads);

static inline void fo_run_alone(fo_body *body, void *context, ptrdiff_t chunks)
{
    const fo_mode before = fo_enter_ieee();
    body(context, 0, chunks);
    fo_leave_ieee(before);
}

/* What a backend provides: the loop on 2 to `chunks` threads. It returns what the caller did
 * itself, from which threads.c sees whether the others came late. */
typedef struct fo_share {
    ptrdiff_t chunks; /* how many of the chunks */
    int64_t end;      /* fo_now() when none was left for it */
} fo_share;

extern const unsigned fo_awake; /* for how many microseconds after a loop threads are awake */

fo_share fo_on_threads(fo_body *body, void *context, ptrdiff_t chunks, int threads);

/* Called in the child of a fork, where only the thread that called fork exists. */
void fo_forget_threads(void);

/* Nanoseconds since some time in the past. */
int64_t fo_now(void);

#endif
