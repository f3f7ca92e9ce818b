/* Prints a checksum of steps for each rule and combination of formats, which CI compares between
 * machines, compilers and builds. Within one run all instruction sets and thread counts must agree.
 *
 *     bits [elements of the largest leaf] [rounds] */
#include "lists.h"

#include <stdio.h>
#include <stdlib.h>

/* The checksum of some lists after a few steps; 0 if the library refuses these formats. */
static uint64_t checksum(wish w, int rounds, int threads)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (int round = 0; round < rounds; round++) {
        source s = source_seeded((uint64_t)(round + 10 * (w.param + FO_FORMATS * w.state)));
        list l = make_list(&s, w);
        for (int step = 0; step < 3; step++) {
            if (fo_step(l.rule, l.leaves, l.n, l.hypers, l.n_hypers, &l.run, threads) != FO_OK)
                hash = 0;
            next_step(&s, &l, w.hostile);
        }
        hash = hash ? digest(&l, hash) : 0;
        free_list(&l);
        if (hash == 0)
            break;
    }
    return hash;
}

int main(int count, char **arguments)
{
    const ptrdiff_t elements = count > 1 ? atol(arguments[1]) : 60000;
    const int rounds = count > 2 ? atoi(arguments[2]) : 1;
    static const int threads[] = {1, 3};
    int tried = 0, stepped = 0, failed = 0;
    fo_force_threads(1);

    for (int rule = 0; rule < rule_count(); rule++)
        for (int param = 0; param < FO_FORMATS; param++)
            for (int state = 0; state < FO_FORMATS; state++) {
                /* each format is a gradient's too, though not with each pair */
                wish w = {rule, param, (param + 3 * state) % FO_FORMATS, state, 6, elements, 1};
                fo_select_isa(tested_isas()[0]);
                const uint64_t first = checksum(w, rounds, 1);
                tried++;
                if (first == 0)
                    continue;
                stepped++;
                printf("%s %s %s %s %016llx\n", fo_rules()[rule].name, fo_formats()[param].name,
                       fo_formats()[w.grad].name, fo_formats()[state].name,
                       (unsigned long long)first);
                for (int i = 0; tested_isas()[i] != NULL; i++)
                    for (size_t k = 0; k < sizeof threads / sizeof *threads; k++) {
                        fo_select_isa(tested_isas()[i]);
                        if (checksum(w, rounds, threads[k]) == first)
                            continue;
                        failed++;
                        printf("DIFFERS on %s with %d threads\n", fo_isa(), threads[k]);
                    }
            }
    fprintf(stderr,
            "bits: %d of %d combinations stepped; best instruction set %s; %d differences\n",
            stepped, tried, tested_isas()[0], failed);
    return failed > 0 || stepped < rule_count() * FO_FORMATS;
}
