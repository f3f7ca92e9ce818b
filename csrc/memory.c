/* Memory for state. Large blocks are aligned to huge pages and ask the system for them. */
#include "flags.h"
#include "fusedopt.h"

#include <stdlib.h>

#if defined(__linux__)
#include <sys/mman.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

enum { CACHE_LINE = 64, HUGE_PAGE = 2 << 20 };

void *fo_allocate(size_t bytes)
{
    const size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : CACHE_LINE;
    void *memory = NULL;
    if (bytes > SIZE_MAX - alignment)
        return NULL;
    bytes += bytes == 0;
#ifdef _WIN32
    memory = _aligned_malloc(bytes, alignment);
#else
    if (posix_memalign(&memory, alignment, bytes))
        return NULL;
#endif
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == HUGE_PAGE)
        (void)madvise(memory, bytes, MADV_HUGEPAGE); /* advice: without it the memory is as good */
#endif
    return memory;
}

void fo_release(void *memory)
{
#ifdef _WIN32
    _aligned_free(memory);
#else
    free(memory);
#endif
}
