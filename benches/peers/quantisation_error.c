/* The relative RMS error of ggml's formats on normal weights. benches/README.md says how to build it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "ggml.h"

enum { ROWS = 4096, COLUMNS = 2048, ELEMENTS = ROWS * COLUMNS };

/* In (0, 1], by Knuth's 64-bit linear congruential generator. */
static double uniform(void) {
    static unsigned long long state = 1;
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return ((state >> 11) + 1) / 9007199254740992.0;
}

int main(void) {
    const enum ggml_type types[] = {GGML_TYPE_Q8_0, GGML_TYPE_Q6_K, GGML_TYPE_Q5_K, GGML_TYPE_Q4_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0};
    float *weights = malloc(ELEMENTS * sizeof(float)), *back = malloc(ELEMENTS * sizeof(float));
    void *quantised = malloc(ELEMENTS * sizeof(float));
    if (!weights || !back || !quantised) return 1;
    for (size_t i = 0; i < ELEMENTS; i++) weights[i] = 0.02 * sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform());

    printf("| format | bits a weight | relative RMS error |\n|---|---|---|\n");
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        size_t bytes = ggml_quantize_chunk(types[t], weights, quantised, 0, ROWS, COLUMNS, NULL);
        ggml_get_type_traits(types[t])->to_float(quantised, back, ELEMENTS);
        double error = 0, power = 0;
        for (size_t i = 0; i < ELEMENTS; i++) {
            error += pow((double)back[i] - weights[i], 2);
            power += pow(weights[i], 2);
        }
        printf("| %s | %.2f | %.2f%% |\n", ggml_type_name(types[t]), 8.0 * bytes / ELEMENTS, 100 * sqrt(error / power));
    }
    return 0;
}
