/* fo_parallel in a build without threads. */
#include "fusedopt.h"
#include "threads.h"

const char *fo_backend(void) { return "serial"; }

void fo_parallel(fo_body *body, void *context, ptrdiff_t chunks, fo_size size, int threads)
{
    (void)size, (void)threads;
    fo_run_alone(body, context, chunks);
}

fo_share fo_on_threads(fo_body *body, void *context, ptrdiff_t chunks, int threads)
{
    (void)threads;
    fo_run_alone(body, context, chunks);
    return (fo_share){chunks, 0};
}

void fo_force_threads(int yes) { (void)yes; }

fo_lateness fo_late(void) { return (fo_lateness){0, 0, 0}; }
