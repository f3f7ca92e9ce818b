/* Tests when loops run on the caller alone: threads.c on a clock that only moves when a loop says
 * so, and with threads that come as late as the test wants. */
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long nanoseconds;

static int fake_clock(int id, struct timespec *now)
{
    (void)id;
    *now = (struct timespec){nanoseconds / 1000000000, nanoseconds % 1000000000};
    return 0;
}

#define clock_gettime fake_clock
#include "threads.c"

#include <stdio.h>
#include <stdlib.h>

enum { MICROSECOND = 1000, CHUNKS = 100, CHUNK = 10 * MICROSECOND };

static int on_threads; /* whether the last loop was */
static long lateness;  /* of threads, in microseconds */
static ptrdiff_t of_caller = CHUNKS / 2;

const char *fo_backend(void) { return "none"; }
void fo_forget_threads(void) {}
const unsigned fo_awake = 50;

static void body(void *context, ptrdiff_t begin, ptrdiff_t end)
{
    (void)context;
    nanoseconds += (end - begin) * CHUNK;
}

fo_share fo_on_threads(fo_body *run, void *context, ptrdiff_t chunks, int threads)
{
    (void)threads, (void)chunks;
    on_threads = 1;
    run(context, 0, of_caller);
    const fo_share caller = {of_caller, nanoseconds};
    nanoseconds += lateness * MICROSECOND;
    return caller;
}

/* Whether a loop on two threads, which come so many microseconds late, is on threads. */
static int loop(long late)
{
    lateness = late;
    on_threads = 0;
    fo_parallel(body, NULL, CHUNKS, FO_LARGE, 2);
    return on_threads;
}

static int sized(fo_size size)
{
    lateness = on_threads = 0;
    fo_parallel(body, NULL, CHUNKS, size, 2);
    return on_threads;
}

static int alone(void)
{
    int count = 0;
    while (count < 1000000 && !loop(0))
        count++;
    return count; /* the last of these loops was on threads, and on time */
}

static void expect(const char *what, long is, long wanted)
{
    if (is != wanted) {
        fprintf(stderr, "late: %s: %ld, not %ld\n", what, is, wanted);
        exit(1);
    }
}

int main(void)
{
    /* alone a loop takes 1,000 us, on two threads 500 */
    fo_parallel(body, NULL, CHUNKS, FO_LARGE, 1);
    expect("one thread needs no backend", on_threads, 0);
    expect("the first loop is not judged: it makes threads", loop(50000), 1);
    expect("nothing was late", fo_late().late, 0);
    expect("on threads", loop(0), 1);
    expect("a loss that is below a slice", loop(990), 1);
    expect("is not late", fo_late().late, 0);

    expect("a late one", loop(10500), 1);
    expect("is counted", fo_late().late, 1);
    expect("and leads to loops alone", fo_late().is_alone, 1);
    expect("as long as what it lost, 10,000 us", alone(), 10);
    expect("which are counted", fo_late().alone, 10);
    expect("then it is over", fo_late().is_alone, 0);

    /* late again and again: twice as long each time, up to 64 times */
    for (int i = 1; i <= 8; i++) {
        loop(10500);
        expect("twice as long", alone(), 10 << (i < 6 ? i : 6));
    }
    /* on time for as long as the last debt of 640,000 us: loops of 500 */
    for (int i = 0; i < 640000 / 500; i++)
        expect("on time", loop(0), 1);
    loop(10500);
    expect("from the beginning", alone(), 10);

    loop(3600000000); /* an hour: the machine slept */
    expect("a debt has a limit of 1 s, here doubled; 1,001 us each", alone(), 1999);

    loop(10500);
    const int child = fork();
    if (child == 0)
        _exit(loop(0));
    int status;
    expect("a child", waitpid(child, &status, 0), child);
    expect("starts without debt", WEXITSTATUS(status), 1);
    expect("its parent does not", loop(0), 0);
    on_threads = 0;
    fo_parallel(body, NULL, CHUNKS, FO_LARGE, 3);
    expect("more threads than ever are tried", on_threads, 1);
    fo_force_threads(1);
    expect("on threads, whatever is owed", loop(10500), 1);
    fo_force_threads(0);
    alone();
    expect("a small loop", sized(FO_SMALL), 0);
    expect("a large one", sized(FO_LARGE), 1);
    for (int i = 0; i < 3; i++)
        expect("medium ones after a large one", sized(FO_MEDIUM), 0);
    for (int i = 0; i < 3; i++)
        expect("medium ones after many loops", sized(FO_MEDIUM), 1);
    nanoseconds += 51 * MICROSECOND;
    expect("a medium one after a pause", sized(FO_MEDIUM), 0);
    nanoseconds += 51 * MICROSECOND;
    expect("a large one after a pause", sized(FO_LARGE), 1);
    of_caller = 0;
    expect("no share of the caller", loop(10500), 1);
    expect("says nothing", fo_late().is_alone, 0);
    fprintf(stderr, "late: all as it should be\n");
    return 0;
}
