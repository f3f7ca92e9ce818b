/* The backend on OpenMP.
 *
 * After a fork, libgomp in the child waits without end for the threads of its team, which exist in
 * the parent alone. So the child of a fork runs serially. */
#include "fusedopt.h"
#include "threads.h"

static int forked = 0;

const char *fo_backend(void) { return "openmp"; }

/* libgomp looks for work 300,000 times before it sleeps: at least 1 ms, here more than 6. */
const unsigned fo_awake = 1000;

void fo_forget_threads(void) { forked = 1; }

fo_share fo_on_threads(fo_body *body, void *context, ptrdiff_t chunks, int threads)
{
    if (forked) {
        fo_run_alone(body, context, chunks);
        return (fo_share){chunks, fo_now()};
    }
    fo_share caller = {0, 0};
#pragma omp parallel num_threads(threads)
    {
        const fo_mode before = fo_enter_ieee(); /* other libraries use the same team */
        ptrdiff_t done = 0;
        /* each thread gets one range of chunks, the same in every step, so that a core finds in its
         * cache what it used in the last step */
#pragma omp for schedule(static) nowait
        for (int part = 0; part < threads; part++) {
            const ptrdiff_t begin = chunks * part / threads, end = chunks * (part + 1) / threads;
            body(context, begin, end);
            done += end - begin;
        }
        fo_leave_ieee(before);
#pragma omp master
        caller = (fo_share){done, fo_now()};
    }
    return caller;
}
