/* fo_parallel on a small pool of POSIX threads, for wheels, which must not contain an OpenMP
 * runtime.
 *
 * The caller publishes a job and works on it together with the workers. Threads claim chunks from
 * an atomic counter, many at first and fewer towards the end: each reads memory in few long runs,
 * and all end at about the same time. A worker enters a job only under the lock and only while the
 * job is open. The caller closes the job under the same lock before it waits, so it waits for
 * chunks already claimed, and never for a worker that has not woken yet. Idle workers sleep, so
 * that other threads can use the cores. If a job is running already, a second caller does its own
 * work serially. In the child of a fork the pool starts empty. */
#include "fusedopt.h"
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>

/* glibc 2.34 moved these two functions from libpthread to libc and gave them a new version. They
 * did not change: a library that asks for their first version loads on systems back to glibc 2.17,
 * even if it was linked on a new one. */
#if defined(__GLIBC__) && defined(__x86_64__)
#define FO_FIRST_GLIBC "2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define FO_FIRST_GLIBC "2.17"
#endif
#ifdef FO_FIRST_GLIBC
__asm__(".symver pthread_create, pthread_create@GLIBC_" FO_FIRST_GLIBC);
__asm__(".symver pthread_mutex_trylock, pthread_mutex_trylock@GLIBC_" FO_FIRST_GLIBC);
#endif

enum { MAX_WORKERS = 255, SPINS = 2000 };

typedef struct job {
    fo_body *body;
    void *context;
    ptrdiff_t chunks, threads;
    atomic_ptrdiff_t next; /* the first chunk that is not claimed */
} job;

static struct {
    pthread_mutex_t one_caller; /* held while a job runs */
    pthread_mutex_t lock;       /* guards all below */
    pthread_cond_t posted, left;
    job *open;         /* the job that workers may enter, or NULL */
    int seats;         /* number of workers that may still enter it */
    atomic_int inside; /* number of workers in it; written under the lock, read without */
    int workers;       /* number of threads that exist */
} pool = {
    .one_caller = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .posted = PTHREAD_COND_INITIALIZER,
    .left = PTHREAD_COND_INITIALIZER,
};

const char *fo_backend(void) { return "pool"; }

/* In the child only the thread that called fork exists, and the locks may be in any state. */
static void in_child(void)
{
    pthread_mutex_init(&pool.one_caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.posted, NULL);
    pthread_cond_init(&pool.left, NULL);
    pool.open = NULL;
    pool.seats = 0;
    pool.workers = 0;
    atomic_store(&pool.inside, 0);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

static void work(job *j)
{
    const fo_mode before = fo_enter_ieee(); /* a worker has the mode of its creator */
    ptrdiff_t chunk = atomic_load(&j->next);
    while (chunk < j->chunks) {
        ptrdiff_t share = (j->chunks - chunk) / (2 * j->threads);
        ptrdiff_t end = chunk + (share > 0 ? share : 1);
        if (atomic_compare_exchange_weak(&j->next, &chunk, end)) {
            j->body(j->context, chunk, end);
            chunk = atomic_load(&j->next);
        }
    }
    fo_leave_ieee(before);
}

static void *worker(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.open == NULL || pool.seats == 0)
            pthread_cond_wait(&pool.posted, &pool.lock);
        job *j = pool.open;
        pool.seats--;
        atomic_fetch_add(&pool.inside, 1);
        pthread_mutex_unlock(&pool.lock);
        work(j);
        pthread_mutex_lock(&pool.lock);
        if (atomic_fetch_sub(&pool.inside, 1) == 1)
            pthread_cond_signal(&pool.left);
    }
    return NULL;
}

/* Call under the lock. Starts threads until there are `wanted`, or as many as the system gives. */
static void hire(int wanted)
{
    pthread_attr_t detached;
    if (pool.workers >= wanted || pthread_attr_init(&detached) != 0)
        return;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_t id;
    while (pool.workers < wanted && pthread_create(&id, &detached, worker, NULL) == 0)
        pool.workers++;
    pthread_attr_destroy(&detached);
}

void fo_parallel(fo_body *body, void *context, ptrdiff_t chunks, int threads)
{
    ptrdiff_t helpers = (threads < chunks ? threads : chunks) - 1;
    if (helpers > MAX_WORKERS)
        helpers = MAX_WORKERS;
    if (helpers < 0)
        helpers = 0;
    job j = {.body = body, .context = context, .chunks = chunks, .threads = helpers + 1};
    atomic_init(&j.next, 0);

    if (helpers < 1 || pthread_mutex_trylock(&pool.one_caller) != 0) {
        work(&j);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    hire((int)helpers);
    pool.open = &j;
    pool.seats = (int)helpers;
    pthread_cond_broadcast(&pool.posted);
    pthread_mutex_unlock(&pool.lock);

    work(&j);

    pthread_mutex_lock(&pool.lock);
    pool.open = NULL; /* from here on no worker enters */
    pthread_mutex_unlock(&pool.lock);
    /* the claimed chunks end within microseconds: polling costs less than sleeping */
    for (int i = 0; i < SPINS && atomic_load(&pool.inside) > 0; i++)
        ;
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.inside) > 0)
        pthread_cond_wait(&pool.left, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.one_caller);
}
