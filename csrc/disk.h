/* Passes over leaves whose state is on disk: see disk.c. Internal. */
#ifndef FUSEDOPT_DISK_H
#define FUSEDOPT_DISK_H

#include "split.h"

/* Calls work->range for all elements of the chosen leaves, as fo_split does. Reads the arrays that
 * are on work->disk before and, if `writes`, writes them back afterwards. After an error, which it
 * records there, it skips the rest. */
void fo_pass_disk(fo_work *work, fo_choice which, int writes, int threads);

#endif
