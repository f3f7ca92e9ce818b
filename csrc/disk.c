/* State on disk: a pass over leaves streams through arrays that are parts of files.
 *
 * Each thread claims pieces of leaves one after the other. Of a piece it reads what is on disk into
 * a buffer, works on that in the place of the arrays, and writes it back: while one thread
 * computes, others wait for the disk. So there are two threads more than asked for, and what is in
 * memory is the buffers alone, at most FO_WINDOW bytes, if the files are opened for direct access.
 * A fault of the disk is an error number here; an access to a mapped page would end the process.
 *
 * The arrays are mapped too, for bindings: between passes they are ordinary memory. Systems keep
 * both views of a file equal as long as they are not used at the same time. */
#define _GNU_SOURCE      /* sync_file_range, fallocate */
#define _DARWIN_C_SOURCE /* madvise */
#include "disk.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__linux__) && !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

enum {
    ALIGNED = 4096,             /* bytes: addresses and lengths of direct access are multiples */
    GRAIN = ALIGNED * FO_BLOCK, /* elements: of so many every part of an array has such a length */
    LONGEST = 4,                /* grains of a piece, at most */
    PLACES = FO_MAX_STATES + 2, /* arrays of a leaf that may be on disk */
    PIECE = 16 << 20,           /* bytes of a copy */
};

static size_t aligned(size_t bytes) { return (bytes + ALIGNED - 1) / ALIGNED * ALIGNED; }

static const fo_region *region_of(const fo_disk *disk, const void *data)
{
    const uintptr_t at = (uintptr_t)data;
    ptrdiff_t low = 0, high = disk->n;
    while (low < high) {
        const ptrdiff_t middle = low + (high - low) / 2;
        if ((uintptr_t)disk->regions[middle].start + disk->regions[middle].bytes <= at)
            low = middle + 1;
        else
            high = middle;
    }
    if (data == NULL || low == disk->n || (uintptr_t)disk->regions[low].start > at)
        return NULL;
    return &disk->regions[low];
}

/* The region of an array that passes can read and write; others are used where they are mapped. */
static const fo_region *file_of(const fo_disk *disk, const void *data)
{
    const fo_region *of = region_of(disk, data);
    return of != NULL && !of->is_read_only && (uintptr_t)data % ALIGNED == 0 ? of : NULL;
}

/* Leaves of some rows are used where they are mapped: their rows do not follow one another. */
static int has_some_rows(const fo_leaf *leaf)
{
    return leaf->by_rows != NULL && leaf->by_rows->rows != NULL;
}

/* ------------------------------------------------------------------ a pass */

typedef struct pass {
    fo_work *w;
    ptrdiff_t pieces, length; /* how many, and elements of each */
    int writes;
    char *buffers;
    size_t capacity; /* bytes of a thread's */
    atomic_ptrdiff_t next;
    atomic_int error, has_written;
} pass;

static fo_array *array_of(fo_leaf *leaf, int place)
{
    return place == 0 ? &leaf->param : place == 1 ? &leaf->ema : &leaf->state[place - 2];
}

/* Reads or writes bytes, a multiple of ALIGNED, at an address in a region. */
static int transfer(const fo_region *of, const char *at, char *buffer, size_t bytes, int writes)
{
    off_t offset = (off_t)(of->offset + (at - of->start));
    while (bytes > 0) {
        const ssize_t done = writes ? pwrite(of->file, buffer, bytes, offset)
                                    : pread(of->file, buffer, bytes, offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? errno : EIO;
        buffer += done, offset += done, bytes -= (size_t)done;
    }
    return 0;
}

/* Moves bytes [begin, end) of an array between its file and a buffer, and points the array of
 * another leaf there. */
static int move(const pass *p, char *data, void **shown, ptrdiff_t begin, ptrdiff_t end,
                char **buffer, int writes)
{
    const fo_region *of = file_of(p->w->disk, data);
    if (of == NULL || end == begin)
        return 0;
    const size_t bytes = aligned((size_t)(end - begin));
    const int error = transfer(of, data + begin, *buffer, bytes, writes);
    *shown = (void *)((uintptr_t)*buffer - (uintptr_t)begin);
    *buffer += bytes;
    return error;
}

/* Moves what elements [begin, end) of a leaf have on disk; points `shown` at the buffer. */
static int move_all(const pass *p, fo_leaf *leaf, fo_leaf *shown, ptrdiff_t begin, ptrdiff_t end,
                    char *buffer, int writes)
{
    int error = 0;
    for (int place = 0; place < PLACES && error == 0 && !has_some_rows(leaf); place++) {
        const fo_array *from = array_of(leaf, place);
        fo_array *to = array_of(shown, place);
        if (from->data == NULL || from->map != FO_EACH)
            continue;
        error = move(p, from->data, &to->data, fo_data_bytes(from, begin), fo_data_bytes(from, end),
                     &buffer, writes);
        if (error == 0)
            error = move(p, from->extra, &to->extra, fo_extra_bytes(from, begin),
                         fo_extra_bytes(from, end), &buffer, writes);
    }
    return error;
}

/* A fo_body: a thread's part, which is what it claims. */
static void work(void *context, ptrdiff_t first, ptrdiff_t last)
{
    pass *p = context;
    const fo_work *w = p->w;
    char *buffer = p->buffers + (size_t)first * p->capacity;
    int error = 0;
    (void)last;
    while (error == 0 && atomic_load(&p->error) == 0) {
        const ptrdiff_t piece = atomic_fetch_add(&p->next, 1);
        if (piece >= p->pieces)
            return;
        fo_leaf *leaf = &w->leaves[fo_leaf_at(w, piece)], shown = *leaf;
        const ptrdiff_t begin = (piece - leaf->start) * p->length;
        const ptrdiff_t end = leaf->n - begin < p->length ? leaf->n : begin + p->length;
        error = move_all(p, leaf, &shown, begin, end, buffer, 0);
        if (error != 0)
            break;
        if (p->writes)
            atomic_store(&p->has_written, 1);
        w->range[fo_compute_type(leaf)](&w->task, &shown, begin, end);
        if (p->writes)
            error = move_all(p, leaf, &shown, begin, end, buffer, 1);
    }
    int none = 0;
    if (error != 0)
        (void)atomic_compare_exchange_strong(&p->error, &none, error);
}

/* Bytes of a buffer for so many elements of a leaf. */
static size_t room_for(const fo_disk *disk, fo_leaf *leaf, ptrdiff_t elements)
{
    size_t capacity = 0;
    for (int place = 0; place < PLACES && !has_some_rows(leaf); place++) {
        const fo_array *array = array_of(leaf, place);
        if (array->data == NULL || array->map != FO_EACH)
            continue;
        if (file_of(disk, array->data) != NULL)
            capacity += aligned((size_t)fo_data_bytes(array, elements));
        if (file_of(disk, array->extra) != NULL)
            capacity += aligned((size_t)fo_extra_bytes(array, elements));
    }
    return capacity;
}

void fo_pass_disk(fo_work *w, fo_choice which, int writes, int threads)
{
    pass p = {.w = w, .writes = writes};
    size_t capacity = ALIGNED; /* for a grain of any leaf */
    for (ptrdiff_t i = 0; i < w->n; i++) {
        const size_t its = room_for(w->disk, &w->leaves[i], GRAIN);
        capacity = its > capacity ? its : capacity;
    }
    const size_t grains =
        FO_WINDOW / capacity; /* that fit; more than one, as a leaf's arrays are few */
    ptrdiff_t workers = threads + 2;
    if ((size_t)workers > grains)
        workers = (ptrdiff_t)grains;
    ptrdiff_t longest = (ptrdiff_t)grains / workers;
    longest = longest < LONGEST ? longest : LONGEST;
    p.length = longest * GRAIN;
    p.capacity = (size_t)longest * capacity;
    for (ptrdiff_t i = 0; i < w->n; i++) {
        fo_leaf *leaf = &w->leaves[i];
        leaf->start = p.pieces;
        if (fo_is_chosen(leaf, which))
            p.pieces += (leaf->n + p.length - 1) / p.length;
    }
    workers = workers < p.pieces ? workers : p.pieces;
    if (workers == 0)
        return;
    void *const memory = fo_allocate((size_t)workers * p.capacity + ALIGNED);
    if (memory == NULL) {
        w->disk->error = ENOMEM;
        return;
    }
    p.buffers = (char *)memory + (ALIGNED - (uintptr_t)memory % ALIGNED) % ALIGNED;
    if (workers > 1)
        (void)fo_on_threads(work, &p, workers, (int)workers);
    else
        fo_run_alone(work, &p, 1);
    fo_release(memory);
    w->disk->error = atomic_load(&p.error);
    w->disk->has_written |= atomic_load(&p.has_written);
}

/* ------------------------------------------------------------------ for bindings */

int fo_map_file(fo_region *region)
{
    const int access = region->is_read_only ? PROT_READ : PROT_READ | PROT_WRITE;
    void *start =
        mmap(NULL, region->bytes, access, MAP_SHARED, region->file, (off_t)region->offset);
    if (start == MAP_FAILED)
        return errno;
    region->start = start;
    region->process = getpid();
    return 0;
}

void fo_unmap_file(const fo_region *region)
{
    (void)munmap(region->start, region->bytes);
#if defined(FALLOC_FL_PUNCH_HOLE) && defined(FALLOC_FL_KEEP_SIZE)
    if (!region->is_read_only && region->process == getpid()) /* not in the child of a fork */
        (void)fallocate(region->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                        (off_t)region->offset, (off_t)region->bytes);
#endif
}

void fo_close_file(int file) { (void)close(file); }

/* Whole pages of a region: those that bytes at an address touch. */
typedef struct pages {
    char *start;
    size_t bytes;
} pages;

static pages pages_of(const fo_region *of, const void *data, size_t bytes)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t limit = (uintptr_t)of->start + of->bytes;
    const uintptr_t low = (uintptr_t)data / page * page;
    const uintptr_t high = (uintptr_t)data + bytes < limit ? (uintptr_t)data + bytes : limit;
    return (pages){(char *)low, (high - low + page - 1) / page * page};
}

/* Loads mapped pages, so that one that cannot be read is an error number here and not a signal
 * later. */
static int populate(const fo_region *of, pages p)
{
#ifdef MADV_POPULATE_WRITE
    while (madvise(p.start, p.bytes, of->is_read_only ? MADV_POPULATE_READ : MADV_POPULATE_WRITE)) {
        if (errno == EFAULT)
            return EIO; /* where a touch would be a SIGBUS */
        if (errno != EAGAIN && errno != EINTR)
            return errno == EINVAL ? 0 : errno; /* that is an older kernel */
    }
#else
    (void)of, (void)p;
#endif
    return 0;
}

int fo_relieve(const fo_disk *disk, void *data, size_t bytes)
{
    const fo_region *of = region_of(disk, data);
    if (of == NULL || bytes == 0)
        return 0;
    /* the bytes before too: the last call may have left a part of a page, which is large */
    const size_t before = (size_t)((char *)data - of->start);
    const size_t reach = before < PIECE ? before : PIECE;
    const pages p = pages_of(of, (char *)data - reach, reach + bytes);
    const off_t offset = (off_t)(of->offset + (p.start - of->start));
    int error = 0;
    (void)madvise(p.start, p.bytes, MADV_DONTNEED); /* of a shared mapping: the file has the data */
    if (!of->is_read_only) {
#ifdef SYNC_FILE_RANGE_WRITE
        if (sync_file_range(of->file, offset, (off_t)p.bytes,
                            SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                                SYNC_FILE_RANGE_WAIT_AFTER) != 0 &&
            errno != ENOSYS && errno != EINVAL && errno != ESPIPE)
            error = errno;
#else
        if (msync(p.start, p.bytes, MS_SYNC) != 0)
            error = errno;
#endif
    }
#ifdef POSIX_FADV_DONTNEED
    (void)posix_fadvise(of->file, offset, (off_t)p.bytes, POSIX_FADV_DONTNEED);
#else
    (void)offset;
#endif
    return error;
}

int fo_copy(const fo_disk *disk, void *to, const void *from, size_t bytes)
{
    int first = 0;
    for (size_t at = 0; at < bytes; at += PIECE) {
        const size_t n = bytes - at < PIECE ? bytes - at : PIECE;
        char *const sides[] = {(char *)to + at, (char *)(uintptr_t)from + at};
        int error = 0;
        for (int k = 0; k < 2 && error == 0; k++) {
            const fo_region *of = region_of(disk, sides[k]);
            if (of != NULL)
                error = populate(of, pages_of(of, sides[k], n));
        }
        if (error == 0)
            memmove(sides[0], sides[1], n);
        for (int k = 0; k < 2; k++) {
            const int late = fo_relieve(disk, sides[k], n);
            error = error != 0 ? error : late;
        }
        first = first != 0 ? first : error;
    }
    return first;
}

#else /* a system without mapped files: bindings make no fo_disk */

void fo_pass_disk(fo_work *w, fo_choice which, int writes, int threads)
{
    (void)which, (void)writes, (void)threads;
    w->disk->error = ENOSYS;
}

int fo_map_file(fo_region *region)
{
    (void)region;
    return ENOSYS;
}

void fo_unmap_file(const fo_region *region) { (void)region; }

void fo_close_file(int file) { (void)file; }

int fo_relieve(const fo_disk *disk, void *data, size_t bytes)
{
    (void)disk, (void)data, (void)bytes;
    return 0;
}

int fo_copy(const fo_disk *disk, void *to, const void *from, size_t bytes)
{
    (void)disk;
    memmove(to, from, bytes);
    return 0;
}

#endif
