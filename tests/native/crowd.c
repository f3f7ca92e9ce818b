/* Parallel loops of several callers at once, with few and many threads, back to back and after
 * pauses, in children of forks: each chunk must run once, before the loop returns.
 *
 *     crowd [loops of each caller] */
#include "fusedopt.h"
#include "threads.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CALLERS = 3, MOST_CHUNKS = 300, FORKS = 10 };

static long loops = 3000;

/* not atomic: chunks of one loop are different elements, and a loop's writes end with it */
typedef struct counts {
    unsigned times[MOST_CHUNKS];
} counts;

static void body(void *context, ptrdiff_t begin, ptrdiff_t end)
{
    counts *c = context;
    for (ptrdiff_t i = begin; i < end; i++) {
        double x = 1;
        for (int k = 0; k < 200; k++)
            x = x * 1.0000001 + 1e-9;
        c->times[i] += x > 0;
    }
}

static void nap(long microseconds)
{
    const struct timespec length = {0, microseconds * 1000};
    nanosleep(&length, NULL);
}

static void run(unsigned seed, long count)
{
    counts c;
    for (long loop = 0; loop < count; loop++) {
        seed = seed * 1664525 + 1013904223;
        const ptrdiff_t chunks = seed >> 8 & 1 ? seed >> 9 & 7 : seed >> 9 & 255;
        memset(&c, 0, sizeof c);
        fo_parallel(body, &c, chunks, FO_LARGE, (int)(seed >> 20 & 7));
        for (ptrdiff_t i = 0; i < MOST_CHUNKS; i++)
            if (c.times[i] != (i < chunks)) {
                fprintf(stderr, "crowd: chunk %td of %td ran %u times\n", i, chunks, c.times[i]);
                abort();
            }
        if ((seed >> 24 & 15) == 0)
            nap(seed >> 28 << 4); /* shorter and longer than a worker looks for work */
    }
}

static void *caller(void *seed)
{
    run((unsigned)(uintptr_t)seed, loops);
    return NULL;
}

int main(int count, char **arguments)
{
    loops = count > 1 ? atol(arguments[1]) : loops;
    fo_force_threads(1);
    pthread_t threads[CALLERS];
    for (unsigned i = 0; i < CALLERS; i++)
        if (pthread_create(&threads[i], NULL, caller, (void *)(uintptr_t)(i + 1)) != 0)
            abort();
    for (int i = 0; i < FORKS; i++) {
        const pid_t child = fork();
        if (child == 0) {
            run(100 + (unsigned)i, 1 + loops / 20);
            _exit(0);
        }
        int status;
        if (waitpid(child, &status, 0) != child || status != 0) {
            fprintf(stderr, "crowd: a child of a fork ended with %d\n", status);
            abort();
        }
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    run(1000, loops);
    fprintf(stderr, "crowd: %ld loops of each of %d callers, on %s\n", loops, CALLERS,
            fo_backend());
    return 0;
}
