/* fo_parallel on OpenMP, or serially where the compiler has none.
 *
 * After a fork, libgomp in the child waits for ever for the threads of its team, which exist in the
 * parent alone. So the child of a fork runs serially. */
#include "threads.h"
#include "fusedopt.h"

#ifdef _OPENMP
#include <pthread.h>

static int forked = 0;

static void in_child(void) { forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

const char *fo_backend(void) { return "openmp"; }
#else
const char *fo_backend(void) { return "serial"; }
#endif

void fo_parallel(fo_body *body, void *context, ptrdiff_t chunks, int threads)
{
#ifdef _OPENMP
    if (threads > 1 && chunks > 1 && !forked) {
        /* each thread gets one range of chunks, the same in every step, so that a core finds in its
         * cache what it used in the last step */
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int part = 0; part < threads; part++) {
            const fo_mode before = fo_enter_ieee(); /* other libraries use the same team */
            body(context, chunks * part / threads, chunks * (part + 1) / threads);
            fo_leave_ieee(before);
        }
        return;
    }
#else
    (void)threads;
#endif
    const fo_mode before = fo_enter_ieee();
    body(context, 0, chunks);
    fo_leave_ieee(before);
}
