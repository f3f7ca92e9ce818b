/* fo_parallel: whether a loop runs on threads or on the caller alone.
 *
 * Waking threads costs more than they save in a loop of medium size, so it uses them only as one of
 * many loops that follow one another.
 *
 * If other processes keep the CPUs busy, the system runs a thread milliseconds after it is needed,
 * and a loop of microseconds waits for it. So each parallel loop is compared with the time that
 * the caller would have needed alone, which follows from its own share. A loop that lost much
 * leaves a debt as long as what it lost; until the time spent in loops has paid it, loops run on
 * the caller alone, and then threads are tried again. If threads come late before they were on time
 * for as long as the last debt, the next one is twice as long: so waiting costs a busy machine
 * little, and one late thread costs a quiet machine little.
 *
 * All of this is an estimate for the whole process: several callers may lose an update of each
 * other. Time is in microseconds: a long holds those of a debt, and of an unsigned that wraps only
 * the difference counts. */
#include "threads.h"
#include "fusedopt.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

enum {
    /* A thread that was asleep starts within tens of microseconds. One that waits for its turn on a
     * CPU needs a scheduler's slice, which is at least about a millisecond. */
    LATE = 500,
    LONGEST = 1000 * 1000,
    DOUBLINGS = 6,
    ROW = 4, /* more than the loops of one step */
};

static struct {
    atomic_int forced;   /* never alone */
    atomic_int most;     /* the largest number of threads tried; more are tried in any case */
    atomic_long debt;    /* > 0: loops run on the caller alone */
    atomic_long last;    /* the last debt, when it was made */
    atomic_long on_time; /* time of parallel loops since then */
    atomic_uint ended;   /* when the last loop did */
    atomic_int row;      /* how many loops began soon after another, at most ROW */
    atomic_int doubled;  /* how often the last debt was doubled */
    atomic_long late, alone;
} state;

#define GET(member) atomic_load_explicit(&state.member, memory_order_relaxed)
#define SET(member, value) atomic_store_explicit(&state.member, value, memory_order_relaxed)
#define ADD(member, value) atomic_fetch_add_explicit(&state.member, value, memory_order_relaxed)

int64_t fo_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void in_child(void)
{
    SET(most, 0);
    SET(debt, 0);
    fo_forget_threads();
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

/* From 0 to LONGEST. */
static long microseconds(int64_t ns)
{
    return ns < 0 ? 0 : ns < LONGEST * INT64_C(1000) ? (long)(ns / 1000) : LONGEST;
}

static void judge(fo_share caller, ptrdiff_t chunks, int64_t start, int64_t end)
{
    if (caller.chunks == 0)
        return; /* the others came first */
    const double alone = (double)(caller.end - start) * (double)chunks / (double)caller.chunks;
    const long lost = microseconds(end - start - (int64_t)alone);
    if (lost < LATE) {
        /* a loop in which the caller itself had to wait for its turn says little */
        const long took = microseconds(end - start);
        if (GET(on_time) < GET(last))
            ADD(on_time, took < LATE ? took : LATE);
        return;
    }
    const int doubled = GET(on_time) >= GET(last) ? 0 : GET(doubled) + 1;
    SET(doubled, doubled < DOUBLINGS ? doubled : DOUBLINGS);
    SET(last, lost << GET(doubled));
    SET(debt, GET(last));
    SET(on_time, 0);
    ADD(late, 1);
}

/* Whether a loop on no more threads than ever is to run on the caller alone; counts those for which
 * threads were late. */
static int is_alone(fo_size size)
{
    if (GET(forced))
        return 0;
    if (GET(debt) > 0) {
        ADD(alone, 1);
        return 1;
    }
    return size == FO_MEDIUM && GET(row) < ROW;
}

void fo_parallel(fo_body *body, void *context, ptrdiff_t chunks, fo_size size, int threads)
{
    if (threads > chunks)
        threads = (int)chunks;
    if (threads <= 1 || size == FO_SMALL) {
        fo_run_alone(body, context, chunks);
        return;
    }
    const int64_t start = fo_now();
    const int more = threads > GET(most);
    const int soon = (unsigned)(start / 1000) - GET(ended) <= fo_awake;
    SET(row, !soon ? 0 : GET(row) < ROW ? GET(row) + 1 : ROW);
    int64_t end;
    if (!more && is_alone(size)) {
        fo_run_alone(body, context, chunks);
        end = fo_now();
        if (GET(debt) > 0)
            ADD(debt, -microseconds(end - start) - 1); /* rounded up: it ends */
    } else {
        if (more)
            SET(most, threads);
        const fo_share caller = fo_on_threads(body, context, chunks, threads);
        end = fo_now();
        if (!more) /* else the time holds that of making threads */
            judge(caller, chunks, start, end);
    }
    SET(ended, (unsigned)(end / 1000));
}

void fo_force_threads(int yes) { SET(forced, yes); }

fo_lateness fo_late(void)
{
    return (fo_lateness){GET(late), GET(alone), GET(debt) > 0 && !GET(forced)};
}
