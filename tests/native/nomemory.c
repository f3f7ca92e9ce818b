/* A library to preload: it lets one allocation of a thread fail, as if memory had run out.
 *
 * After nomemory_arm(n) the n-th allocation (from 0) in the calling thread returns NULL; with n =
 * -1 none does. nomemory_left returns how many allocations were left before the failing one:
 * negative if it has happened. It replaces the functions of glibc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>

static _Thread_local long left = -1;
static _Thread_local int armed = 0;

void nomemory_arm(long n)
{
    left = n;
    armed = n >= 0;
}

long nomemory_left(void)
{
    armed = 0;
    return left;
}

static int fails(void) { return armed && left-- == 0; }

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

void *malloc(size_t size)
{
    if (!fails())
        return __libc_malloc(size);
    errno = ENOMEM;
    return NULL;
}

void *calloc(size_t n, size_t size)
{
    if (!fails())
        return __libc_calloc(n, size);
    errno = ENOMEM;
    return NULL;
}

void *realloc(void *memory, size_t size)
{
    if (!fails())
        return __libc_realloc(memory, size);
    errno = ENOMEM;
    return NULL;
}

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    if (fails())
        return ENOMEM;
    *memory = __libc_memalign(alignment, size);
    return *memory == NULL ? ENOMEM : 0;
}
