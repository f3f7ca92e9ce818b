/* The backend on a small pool of POSIX threads, for wheels, which must not contain an OpenMP
 * runtime.
 *
 * Every thread has a part of the chunks, the same in every step, so that a core finds in its cache
 * what it used in the last step. It claims its chunks one by one, and then those that are left of
 * the others' parts. The caller waits for claimed chunks alone: not for a worker that has not
 * started, and not for the part of one that the system has stopped.
 *
 * A job is opened and entered by one word, the gate, without a lock. A worker that ends a job
 * looks at the gate for a while before it sleeps, because to wake it takes longer than a small
 * step. It does so only as long as jobs follow one another that fast: a wait in vain halves the
 * next one, so an idle or slow process spends no time on it. A worker that occupies the caller's
 * CPU does not look; it moves to another CPU, if it may.
 *
 * If a job is running already, a second caller does its own work alone. In the child of a fork the
 * pool starts empty. */
#ifdef __linux__
#define _GNU_SOURCE /* sched_getcpu, sched_setaffinity */
#endif
#include "fusedopt.h"
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

/* glibc 2.34 moved this function from libpthread to libc and gave it a new version. It did not
 * change: a library that asks for its first version loads on systems back to glibc 2.17, even if
 * it was linked on a new one. */
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.17");
#endif

enum {
    MAX_WORKERS = 255,
    AT_ONCE = 4, /* chunks; measured: one by one, Adam on 300k elements took 1.02 times as long */
    WAIT = 50,   /* microseconds; measured: to wake a thread takes 13 to 26 */
    CACHE_LINE = 64,
};

/* The gate, from the lowest bit: 8 bits for the number of workers inside, 8 for the number that may
 * enter, 1 for a job that is closed, the rest for its number, which changes with each job. */
enum { SEATS_SHIFT = 8, COUNT = 0xff, CLOSED = 1 << 16 };
static const unsigned ONE_JOB = 1u << 17, JOB = ~0u << 17;

typedef struct seat {
    _Alignas(CACHE_LINE) atomic_ptrdiff_t next; /* the first chunk of its part not claimed */
    atomic_int asleep;                          /* or about to sleep */
} seat;

static struct {
    _Alignas(CACHE_LINE) atomic_uint gate;
    /* the job: written by the caller before it opens the gate, read by workers inside */
    _Alignas(CACHE_LINE) fo_body *body;
    void *context;
    ptrdiff_t chunks, threads;
    /* of the last job; read by workers outside too */
    atomic_uint posted; /* when, in microseconds */
    atomic_int cpu;     /* where, or -1 */
    /* of callers */
    atomic_int taken; /* a job is running */
    int workers;      /* number of threads that exist; of the caller that has taken the pool */
    atomic_int waits; /* the caller sleeps until the last worker leaves, or is about to */
    /* for sleeping */
    pthread_mutex_t lock;
    pthread_cond_t opened, left;
    seat seats[MAX_WORKERS + 1]; /* by thread; the caller's is 0 */
} pool = {
    .gate = CLOSED,
    .cpu = -1,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .opened = PTHREAD_COND_INITIALIZER,
    .left = PTHREAD_COND_INITIALIZER,
};

const char *fo_backend(void) { return "pool"; }

const unsigned fo_awake = WAIT;

/* The lock may be in any state. */
void fo_forget_threads(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.opened, NULL);
    pthread_cond_init(&pool.left, NULL);
    atomic_store(&pool.gate, CLOSED);
    atomic_store(&pool.taken, 0);
    atomic_store(&pool.waits, 0);
    pool.workers = 0;
    for (int i = 0; i <= MAX_WORKERS; i++)
        atomic_store(&pool.seats[i].asleep, 0);
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static unsigned now(void) { return (unsigned)(fo_now() / 1000); }

static int current_cpu(void)
{
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

static int is_on_callers_cpu(void)
{
    const int cpu = atomic_load(&pool.cpu);
    return cpu >= 0 && cpu == current_cpu();
}

/* Goes to another CPU, if this thread may run on one, and leaves its affinity as it was. */
static void leave_callers_cpu(void)
{
#ifdef __linux__
    cpu_set_t all, others;
    if (!is_on_callers_cpu() || sched_getaffinity(0, sizeof all, &all) != 0)
        return;
    others = all;
    CPU_CLR(atomic_load(&pool.cpu), &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
        sched_setaffinity(0, sizeof all, &all);
#endif
}

static ptrdiff_t part_begin(ptrdiff_t part) { return pool.chunks * part / pool.threads; }

/* Runs chunks, from its own part on, until all are claimed; returns how many. */
static ptrdiff_t work(ptrdiff_t me)
{
    const fo_mode before = fo_enter_ieee(); /* a worker has the mode of its creator */
    ptrdiff_t done = 0;
    for (ptrdiff_t k = 0; k < pool.threads; k++) {
        const ptrdiff_t part = (me + k) % pool.threads, end = part_begin(part + 1);
        atomic_ptrdiff_t *next = &pool.seats[part].next;
        ptrdiff_t left;
        while ((left = end - atomic_load_explicit(next, memory_order_relaxed)) > 0) {
            const ptrdiff_t most = left < 4 * AT_ONCE ? 1 + left / 8 : AT_ONCE;
            const ptrdiff_t chunk = atomic_fetch_add_explicit(next, most, memory_order_relaxed);
            if (chunk >= end)
                break;
            const ptrdiff_t stop = end - chunk < most ? end : chunk + most;
            pool.body(pool.context, chunk, stop);
            done += stop - chunk;
        }
    }
    fo_leave_ieee(before);
    return done;
}

/* Whether the gate shows another job than `seen`, and a seat for this worker. */
static int is_news(unsigned gate, unsigned me, unsigned seen)
{
    return (gate & JOB) != seen && me <= (gate >> SEATS_SHIFT & COUNT);
}

/* Returns the number of the next job with a seat for this worker, which may have ended already.
 * Looks for it for `*wait` microseconds before it sleeps, and sets how long to look next time. */
static unsigned next_job(unsigned me, unsigned seen, int *wait)
{
    const unsigned begin = now();
    unsigned gate = atomic_load(&pool.gate);
    if (!is_on_callers_cpu())
        while (!is_news(gate, me, seen) && (int)(now() - begin) < *wait)
            for (int i = 0; i < 16 && !is_news(gate, me, seen); i++) {
                relax();
                gate = atomic_load(&pool.gate);
            }
    if (!is_news(gate, me, seen)) {
        pthread_mutex_lock(&pool.lock);
        atomic_store(&pool.seats[me].asleep, 1);
        while (!is_news(gate = atomic_load(&pool.gate), me, seen))
            pthread_cond_wait(&pool.opened, &pool.lock);
        atomic_store(&pool.seats[me].asleep, 0);
        pthread_mutex_unlock(&pool.lock);
    }
    *wait = (int)(atomic_load(&pool.posted) - begin) <= WAIT ? WAIT : *wait / 2;
    return gate & JOB;
}

/* Whether the job is still open; then this worker is inside. */
static int enter(unsigned job)
{
    unsigned gate = atomic_load(&pool.gate);
    while ((gate & JOB) == job && !(gate & CLOSED))
        if (atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1))
            return 1;
    return 0;
}

static void leave(void)
{
    if ((atomic_fetch_sub(&pool.gate, 1) & COUNT) == 1 && atomic_load(&pool.waits)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.left);
        pthread_mutex_unlock(&pool.lock);
    }
}

/* `start`: the worker's number, and that of the last job before it began. */
static void *worker(void *start)
{
    const unsigned me = (unsigned)(uintptr_t)start & COUNT;
    unsigned seen = (unsigned)(uintptr_t)start & JOB;
    int wait = WAIT;
    for (;;) {
        seen = next_job(me, seen, &wait);
        leave_callers_cpu(); /* before it enters: the caller waits for those inside */
        if (enter(seen)) {
            work(me);
            leave();
        }
    }
    return NULL;
}

/* Starts threads until there are `wanted`, or as many as the system gives. */
static void hire(int wanted)
{
    pthread_attr_t detached;
    if (pool.workers >= wanted || pthread_attr_init(&detached) != 0)
        return;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_t id;
    for (; pool.workers < wanted; pool.workers++) {
        const unsigned start = (atomic_load(&pool.gate) & JOB) | (unsigned)(pool.workers + 1);
        if (pthread_create(&id, &detached, worker, (void *)(uintptr_t)start) != 0)
            break;
    }
    pthread_attr_destroy(&detached);
}

/* Opens the gate for a job and wakes those workers that may enter. */
static void open_job(fo_body *body, void *context, ptrdiff_t chunks, int helpers)
{
    pool.body = body;
    pool.context = context;
    pool.chunks = chunks;
    pool.threads = helpers + 1;
    for (ptrdiff_t i = 0; i < pool.threads; i++)
        atomic_store_explicit(&pool.seats[i].next, part_begin(i), memory_order_relaxed);
    atomic_store(&pool.posted, now());
    atomic_store(&pool.cpu, current_cpu());
    const unsigned job = (atomic_load(&pool.gate) & JOB) + ONE_JOB;
    atomic_store(&pool.gate, job | (unsigned)helpers << SEATS_SHIFT);

    int asleep = 0;
    for (int i = 1; i <= helpers; i++)
        asleep |= atomic_load(&pool.seats[i].asleep);
    if (asleep) {
        pthread_mutex_lock(&pool.lock); /* a worker that is about to sleep holds it */
        pthread_mutex_unlock(&pool.lock);
        pthread_cond_broadcast(&pool.opened);
    }
}

static int is_someone_inside(void) { return (atomic_load(&pool.gate) & COUNT) > 0; }

/* No worker enters any more; returns when all have left. */
static void close_job(void)
{
    atomic_fetch_or(&pool.gate, CLOSED);
    const unsigned begin = now();
    while (is_someone_inside() && now() - begin < WAIT)
        for (int i = 0; i < 16 && is_someone_inside(); i++)
            relax();
    if (is_someone_inside()) {
        pthread_mutex_lock(&pool.lock);
        atomic_store(&pool.waits, 1);
        while (is_someone_inside())
            pthread_cond_wait(&pool.left, &pool.lock);
        atomic_store(&pool.waits, 0);
        pthread_mutex_unlock(&pool.lock);
    }
}

fo_share fo_on_threads(fo_body *body, void *context, ptrdiff_t chunks, int threads)
{
    int helpers = threads - 1 < MAX_WORKERS ? threads - 1 : MAX_WORKERS;
    if (atomic_exchange(&pool.taken, 1)) {
        fo_run_alone(body, context, chunks);
        return (fo_share){chunks, fo_now()};
    }
    hire(helpers);
    if (helpers > pool.workers)
        helpers = pool.workers;
    open_job(body, context, chunks, helpers);
    fo_share caller = {.chunks = work(0)};
    caller.end = fo_now();
    close_job();
    atomic_store(&pool.taken, 0);
    return caller;
}
