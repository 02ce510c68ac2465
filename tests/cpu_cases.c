// Every instruction set of cpu.c against the slow equation in double precision, on random and edge shapes.
//
//     cc -fsanitize=address,undefined -I src/tqw/kernels tests/cpu_cases.c -lm -o cases && ./cases
//
// The same file is compiled for 64-bit Arm and run under an emulator (make test-arm). Buffers have exactly the size that
// the format promises, so the sanitizers see every byte read past the end.
#include "cpu.c"

#include <stdio.h>

static uint64_t state = 1;
static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}
static float gaussian(void) {
    float sum = -6;
    for (int i = 0; i < 12; i++) sum += (float)random_bits() / 2147483648.0f;
    return sum;
}

static const int8_t *levels_of(int64_t bits) {
    static int8_t table[9][256];
    for (int code = 0; code < 1 << bits; code++)
        table[bits][code] = bits == 8 ? (int8_t)(code - 128) : (int8_t)(2 * code + 1 - (1 << bits));
    return table[bits];
}

// docs/format.md section 3: the code of input k.
static int code_at(const struct tqw_weight *w, const struct tqw_pass *p, int64_t row, int64_t k) {
    const uint8_t *bytes = p->packed + row * (w->padded * p->bits / 8) + k / w->group * (w->group * p->bits / 8);
    int low = first_plane((int)p->bits), high = (int)p->bits - low;
    int64_t i = k % w->group;
    int code = bytes[i * low / 8] >> i * low % 8 & ((1 << low) - 1);
    if (high) code |= (bytes[w->group * low / 8 + i * high / 8] >> i * high % 8 & ((1 << high) - 1)) << low;
    return code;
}

static double rotated(const struct tqw_weight *w, const uint8_t *channel, const float *x, int64_t k) {
    int64_t start = k / w->block * w->block, i = k - start;
    double sum = 0;
    for (int64_t j = 0; j < w->block && start + j < w->in; j++) {
        double a = half_to_float((uint16_t)(channel[start + j] << 8)), h = i == j;
        if (w->rotation == HADAMARD) h = (__builtin_popcountll((uint64_t)(i & j)) % 2 ? -1 : 1) / sqrt((double)w->block);
        if (w->rotation == QR) h = w->matrix[i * w->block + j];
        sum += h * a * x[start + j];
    }
    return sum;
}

static void *exactly(int64_t bytes) { return malloc((size_t)(bytes ? bytes : 1)); }

static int ran[AMX + 1];  // instruction sets
static int tiles_ran;     // calls whose products were of bfloat16

static int run(int64_t in, int64_t out, int64_t group, int64_t rotation, const int *bits, int64_t tokens, int dtype) {
    int64_t block = 128;
    struct tqw_weight w = {.out = out, .in = in, .rotation = rotation};
    w.padded = (in + 31) / 32 * 32;
    while (w.padded % block) block /= 2;
    w.block = block, w.group = group < 0 ? w.padded : group;
    if (w.padded % w.group) return 0;
    float *matrix = exactly(block * block * 4);
    for (int64_t i = 0; i < block * block; i++) matrix[i] = gaussian() / sqrtf((float)block);
    w.matrix = rotation == QR ? matrix : NULL;
    uint8_t *channel = exactly(in);
    for (int64_t k = 0; k < in; k++) channel[k] = (uint8_t)(56 + random_bits() % 8 + (random_bits() & 128));
    for (; bits[w.passes]; w.passes++) {
        struct tqw_pass *p = &w.pass[w.passes];
        int64_t size = out * w.padded * bits[w.passes] / 8, scales = out * (w.padded / w.group);
        uint8_t *packed = exactly(size);
        uint16_t *scale = exactly(scales * 2);
        for (int64_t i = 0; i < size; i++) packed[i] = (uint8_t)random_bits();
        for (int64_t i = 0; i < scales; i++) scale[i] = float_to_half(0.01f + (float)(random_bits() % 100) / 1000);
        *p = (struct tqw_pass){packed, scale, channel, levels_of(bits[w.passes]), bits[w.passes]};
    }
    int64_t element = dtype == FLOAT32 ? 4 : 2;
    void *x = exactly(tokens * in * element), *y = exactly(tokens * out * element);
    float *wide = exactly(tokens * in * 4), *bias = exactly(out * 4);
    for (int64_t i = 0; i < tokens * in; i++) store_one(x, i, gaussian(), dtype), wide[i] = load_one(x, i, dtype);
    for (int64_t i = 0; i < out; i++) bias[i] = gaussian();
    int64_t chunk = smaller(w.group & -w.group, block);
    double *exact = exactly(tokens * out * 8), *bound = exactly(tokens * out * 8), *t = exactly(w.padded * 8);
    double *rounded = exactly(tokens * out * 8);  // the bound where AMX multiplies bfloat16, 0 where it does not
    for (int64_t token = 0; token < tokens; token++) {
        for (int64_t k = 0; k < w.padded; k++) t[k] = rotated(&w, channel, wide + token * in, k);
        int64_t width = 0;
        for (int64_t pass = 0; pass < w.passes; pass++) width += w.pass[pass].bits;
        for (int64_t row = 0; row < out; row++) {
            double sum = bias[row], size = 0, error = 0;
            for (int64_t pass = 0; pass < w.passes; pass++)
                for (int64_t start = 0; start < w.padded; start += chunk) {
                    double largest = 0, magnitude = 0;
                    for (int64_t k = start; k < start + chunk; k++) {
                        const struct tqw_pass *p = &w.pass[pass];
                        double v = p->levels[code_at(&w, p, row, k)] * (double)half_to_float(p->scale[row * (w.padded / w.group) + k / w.group]);
                        sum += v * t[k], size += fabs(v * t[k]);
                        magnitude += fabs(v), largest = fmax(largest, fabs(t[k]));
                    }
                    error += largest / 254 * magnitude / (width >= TWO_PLANES_FROM ? 254 : 1);
                }
            double unit = dtype == FLOAT32 ? 0x1p-24 : dtype == BFLOAT16 ? 0x1p-9 : 0x1p-12;
            double rest = 2 * unit * fabs(sum) + 0x1p-18 * (size + fabs(sum));
            exact[token * out + row] = sum;
            bound[token * out + row] = 1.001 * error + rest;
            // T(x) and each pass's V are off by 2^-9 of themselves, a product by (1 + 2^-9)^2 - 1.
            int tiles = width < TWO_PLANES_FROM && tokens >= bfloat16_from(chunk);
            rounded[token * out + row] = tiles ? (0x1p-8 + 0x1p-18) * size + rest : 0;
        }
    }
    int failures = 0, best = detected_isa();
#ifdef TQW_EVEX
    int has_avxvnni = best >= AVX512;
#else
    int has_avxvnni = best == AVXVNNI;
#endif
    for (int isa = 0; isa <= best; isa++)
        for (int floats = 0; floats < 2; floats++) {
            if ((best >= AVX2 && isa == NEON) || (isa == AVXVNNI && !has_avxvnni)) continue;
            ran[isa] = 1;
            memset(y, 0xff, (size_t)(tokens * out * element));
            failures += tqw_linear(&w, x, y, bias, tokens, dtype, FLOAT32, 1, isa, floats) != 0;
            const double *limit = isa == AMX && !floats && rounded[0] ? rounded : bound;
            if (limit == rounded) tiles_ran++;
            for (int64_t i = 0; i < tokens * out; i++)
                if (!(fabs(load_one(y, i, dtype) - exact[i]) <= limit[i]) && failures++ < 3)
                    printf("isa %d floats %d in %d out %d group %d bits %d passes %d tokens %d dtype %d: %g, expected %g +- %g\n",
                           isa, floats, (int)in, (int)out, (int)w.group, bits[0], (int)w.passes, (int)tokens, dtype,
                           (double)load_one(y, i, dtype), exact[i], limit[i]);
            int64_t ids[2] = {out - 1, 0};
            float *rows = exactly(2 * in * 4);
            failures += tqw_dense(&w, ids, rows, 2, FLOAT32, 1, isa) != 0;
            free(rows);
        }
    for (int64_t pass = 0; pass < w.passes; pass++) free((void *)w.pass[pass].packed), free((void *)w.pass[pass].scale);
    free(matrix), free(channel), free(x), free(y), free(wide), free(bias), free(exact), free(bound), free(t);
    free(rounded);
    return failures;
}

int main(void) {
    static const int widths[][4] = {{2}, {3}, {4}, {5}, {6}, {8}, {4, 4}, {3, 2}, {2, 2, 2}};
    static const int64_t groups[] = {32, 64, 128, -1}, ins[] = {1, 32, 100, 200, 576}, outs[] = {1, 17, 83}, counts[] = {1, 2, 7};
    int failures = 0, cases = 0;
    for (int b = 0; b < 9; b++)
        for (int g = 0; g < 4; g++)
            for (int i = 0; i < 5; i++)
                for (int o = 0; o < 3; o++) {
                    int64_t tokens = counts[(b + g + i + o) % 3];
                    failures += run(ins[i], outs[o], groups[g], (b + o) % 3, widths[b], tokens, cases % 3);
                    cases++;
                }
    failures += run(256, 70, 128, HADAMARD, widths[2], 300, FLOAT32);
    cases++;
    // From 32, 64 and 192 tokens on AMX multiplies bfloat16: every width, several blocks of inputs, parts of all tiles.
    static const int few[] = {0, 1, 2, 3, 7, 8};
    static const int64_t many_ins[][3] = {{32, 200, 1000}, {64, 576, 1472}, {128, 1024, 256}, {200, 576, 1024}};
    static const int64_t many[] = {32, 65, 203, 200};
    for (int b = 0; b < 6; b++)
        for (int g = 0; g < 4; g++) {
            int64_t out = outs[(b + 2 * g) % 3];
            failures += run(many_ins[g][b % 3], out, groups[g], (b + g) % 3, widths[few[b]], many[g], cases % 3);
            cases++;
        }
    failures += run(1408, 290, 32, NONE, widths[2], 33, BFLOAT16);
    cases++;
    printf("%d cases, %d with bfloat16 tiles, instruction sets", cases, tiles_ran);
    for (int isa = 0; isa <= AMX; isa++)
        if (ran[isa]) printf(" %d", isa);
    printf(", %d failures\n", failures);
    return failures != 0;
}
