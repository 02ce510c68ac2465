// y = T(x) V^T + b on the CPU, from the stored layout. Plain C ABI: loaded by cpu.py through ctypes.
//
//   T(x)[c] ~= sx[c] * q[c]      q int8, one scale for each chunk c of 32, 64 or 128 inputs; for weights of 6 bits and more
//                                the rest is quantized once more, and both planes are multiplied like two tokens
//   y[n]     = sum over chunks   weight_scale[n, group of c] * sx[c] * sum_k level[code[n, k]] * q[k]
//
// The inner sum is exact in int32. Where AMX has many tokens, T(x) and weight_scale * level are rounded to bfloat16 instead,
// and their products summed in float32. AVX-512 VNNI has its own kernels for few tokens (one pass over the packed bytes)
// and for many (panels of rows expanded to bytes, then an ordinary matrix product). Everything else expands one row
// at a time with a table and takes dot products. A row is always summed by one thread in one order, so results do not
// depend on the number of threads.
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define MAX_PASSES 4
#define MAX_FAMILY 8
#define COLUMNS_STEP 12      // AVX-512: columns are multiplied by 6 at a time, both planes of a token in one place
#define TILES_STEP 32        // AMX: the same
#define STREAM_COLUMNS 4     // AVX-512: up to here rows are streamed, beyond them panels are multiplied
#define TWO_PLANES_FROM 6    // bits of all passes: from here on one plane's rounding would cost more than the weights'

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { NONE, HADAMARD, QR };
enum { PORTABLE, NEON, AVX2, AVXVNNI, AVX512, AMX };  // AMX: AVX512 with another product for many tokens
enum { NO_MEMORY = 1 };

struct tqw_pass {
    const uint8_t *packed;     // [out, padded * bits / 8]
    const uint16_t *scale;     // float16 [out, padded / group]
    const uint8_t *channel;    // e5m2 [in]; equal pointers where passes share a rotation
    const int8_t *levels;      // [2^bits]
    int64_t bits;
};

struct tqw_weight {
    int64_t out, in, padded, group, block, rotation, passes;
    const float *matrix;       // [block, block] for QR
    struct tqw_pass pass[MAX_PASSES];
};

// ---------------------------------------------------------------- numbers

typedef float v16f __attribute__((vector_size(64), aligned(4)));
typedef int32_t v16i __attribute__((vector_size(64), aligned(4)));
typedef uint32_t v16u __attribute__((vector_size(64), aligned(4)));
typedef int8_t v16b __attribute__((vector_size(16), aligned(1)));
typedef uint8_t v16ub __attribute__((vector_size(16), aligned(1)));
typedef uint16_t v16h __attribute__((vector_size(32), aligned(2)));

INLINE v16f splat(float value) { return (v16f){} + value; }

INLINE v16f from_half(v16u h) {
    v16u magnitude = (h & 0x7fff) << 13, special = (v16u)((h & 0x7c00) == 0x7c00) & 0x7f800000;
    v16f value = (v16f)magnitude * splat(0x1p112f);  // subnormals come out right
    return (v16f)((v16u)value | special | (h & 0x8000) << 16);
}

INLINE float half_to_float(uint16_t h) {
    union { uint32_t u; float f; } v = {(uint32_t)(h & 0x7fff) << 13};
    v.f *= 0x1p112f;
    if ((h & 0x7c00) == 0x7c00) v.u |= 0x7f800000;
    v.u |= (uint32_t)(h & 0x8000) << 16;
    return v.f;
}

INLINE uint16_t float_to_half(float f) {  // round to nearest even
    union { float f; uint32_t u; } v = {f};
    uint32_t sign = v.u >> 16 & 0x8000;
    v.u &= 0x7fffffff;
    if (v.u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (v.u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (v.u < 0x38800000) {  // subnormal: the addition rounds at 2^-24
        v.f += 0.5f;
        return (uint16_t)(sign | (v.u - 0x3f000000));
    }
    return (uint16_t)(sign | ((v.u + 0xfff + (v.u >> 13 & 1)) - 0x38000000) >> 13);
}

INLINE uint16_t float_to_bfloat(float f) {
    union { float f; uint32_t u; } v = {f};
    if (f != f) return 0x7fc0;
    return (uint16_t)((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}

INLINE float load_one(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    if (dtype == FLOAT16) return half_to_float(h);
    union { uint32_t u; float f; } v = {(uint32_t)h << 16};
    return v.f;
}

INLINE void store_one(void *p, int64_t i, float value, int dtype) {
    if (dtype == FLOAT32) ((float *)p)[i] = value;
    else ((uint16_t *)p)[i] = dtype == BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

INLINE v16f load_sixteen(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return *(const v16f *)((const float *)p + i);
    v16u h = __builtin_convertvector(*(const v16h *)((const uint16_t *)p + i), v16u);
    return dtype == FLOAT16 ? from_half(h) : (v16f)(h << 16);
}

INLINE float sum_sixteen(v16f v) {
    float s[16];
    memcpy(s, &v, sizeof s);
    for (int h = 8; h; h /= 2)
        for (int i = 0; i < h; i++) s[i] += s[i + h];
    return s[0];
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------- threads
// The OpenMP runtime that torch uses, whose threads still spin from torch's last operation: a second pool would compete
// with them for the cores. cpu.py finds it in the process and hands over the entry point of its fork and join.

typedef int (*task)(void *job, int64_t index);

struct team {
    task run;
    void *job;
    int64_t count;
    atomic_int_fast64_t next;
    atomic_int failed;
};

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int child;  // OpenMP threads do not survive a fork: there everything runs on the caller's thread

static void after_fork(void) { child = 1; }

EXPORT void tqw_threads(void *entry) {
    if (!gomp_parallel) pthread_atfork(NULL, NULL, after_fork);
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))entry;
}

static void work(void *argument) {
    struct team *team = argument;
    for (int64_t i; (i = atomic_fetch_add(&team->next, 1)) < team->count;)
        if (team->run(team->job, i)) atomic_store(&team->failed, 1);
}

static int parallel(task run, void *job, int64_t count, int64_t threads) {
    struct team team = {.run = run, .job = job, .count = count};
    if (count < threads) threads = count;
    if (threads < 2 || !gomp_parallel || child) work(&team);
    else gomp_parallel(work, &team, (unsigned)threads, 0);
    return team.failed;
}

// ---------------------------------------------------------------- one call

// How the int8 activations of one rotation lie in memory.
//   NATURAL  q[padded], sx[chunks]
//   FLOATS   T(x) itself [padded]
//   LANES    for each tile of 128 (64 at 8 bits): q in the order in which the kernel unpacks codes, and for each of the
//            16 int32 lanes the start value -128 sum(q), which undoes the unsigned bytes' offset, and the scale
//   COLUMNS  q with each 32 in unpacking order, sx[chunks], -128 sum(q) [chunks]
//   TILES    T(x) as bfloat16, [16 tokens][32 inputs in unpacking order] after one another: no int8, no scales
enum { NATURAL, FLOATS, LANES, COLUMNS, TILES };

struct call {
    const struct tqw_weight *w;
    const void *x, *bias;
    void *y;
    int64_t tokens, planes, columns;  // columns = tokens * planes: vectors that are multiplied
    int dtype, bias_dtype, layout, isa;
    int64_t chunk, chunks;
    int64_t rows_per_item, columns_per_item;
    int64_t tokens_per_item;         // of the prologue
    int sets;                        // activations: one set for each (channel scale, order) that occurs
    int set_of_pass[MAX_PASSES];
    int order[MAX_PASSES];           // fields of a byte of the first plane: 4 at 2 and 3 bits, 2 at 4 to 6, 1 at 8
    const uint8_t *channel[MAX_PASSES];
    int64_t stride[MAX_PASSES];      // bytes of one token
    char *activations[MAX_PASSES];
    int (*prologue)(void *, int64_t);
    int (*body)(void *, int64_t);
};

INLINE int first_plane(int bits) { return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits; }
INLINE int order_of(int bits) { return 8 / first_plane(bits); }
INLINE int64_t tile_of(int order) { return order == 1 ? 64 : 128; }
INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

INLINE int64_t element_of(const struct call *c) { return c->dtype == FLOAT32 ? 4 : 2; }  // bytes of one of x or y

// Tokens for which a layout has room.
static int64_t room(const struct call *c) { return c->layout == TILES ? round_up(c->columns, 16) : c->columns; }

static int64_t token_bytes(const struct call *c, int order) {
    int64_t padded = c->w->padded;
    if (c->layout == FLOATS) return padded * 4;
    if (c->layout == NATURAL) return round_up(padded + c->chunks * 4, 64);
    if (c->layout == COLUMNS) return round_up(padded + c->chunks * 8, 64);
    if (c->layout == TILES) return padded * 2;
    return (padded + tile_of(order) - 1) / tile_of(order) * (tile_of(order) + 128);
}

// ---------------------------------------------------------------- prologue: x -> T(x) -> int8

INLINE v16f butterfly(v16f v, v16f partner, v16f sign) { return v * sign + partner; }

INLINE void add_subtract(v16f *v, int count, const int half) {
    for (int i = 0; i < count / 2; i++) {
        int j = i / half * 2 * half + i % half;
        v16f low = v[j], high = v[j + half];
        v[j] = low + high;
        v[j + half] = low - high;
    }
}

// Unnormalised Walsh-Hadamard transform of v[0 .. block), block a power of two from 32 to 128.
INLINE void walsh_hadamard(v16f *v, int count) {
    const v16f s1 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
    const v16f s2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
    const v16f s4 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
    const v16f s8 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    for (int i = 0; i < count; i++) {
        v16f a = v[i];
        a = butterfly(a, __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14), s1);
        a = butterfly(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13), s2);
        a = butterfly(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11), s4);
        a = butterfly(a, __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7), s8);
        v[i] = a;
    }
    add_subtract(v, count, 1);  // one after the other: compilers unroll these loops, but not a loop over them
    if (count > 2) add_subtract(v, count, 2);
    if (count > 4) add_subtract(v, count, 4);
}

INLINE void matrix_product(const float *matrix, v16f *v, int64_t block) {  // v <- Q v
    float out[128];
    for (int64_t i = 0; i < block; i++) {
        v16f sum = splat(0);
        for (int64_t j = 0; j < block / 16; j++) sum += *(const v16f *)(matrix + i * block + j * 16) * v[j];
        out[i] = sum_sixteen(sum);
    }
    memcpy(v, out, (size_t)block * 4);
}

// One block of a * x, rotated, without the factor 1 / sqrt(block) of the Hadamard kind.
INLINE void transform_block(const struct call *c, const uint8_t *channel, const char *x, int64_t start, v16f *v) {
    const struct tqw_weight *w = c->w;
    for (int64_t i = 0; i < w->block; i += 16) {
        int64_t left = w->in - start - i;
        v16u a;
        if (left >= 16) {
            v[i / 16] = load_sixteen(x, start + i, c->dtype);
            a = __builtin_convertvector(*(const v16ub *)(channel + start + i), v16u);
        } else {
            float value[16] = {0};
            uint8_t bytes[16] = {0};
            for (int64_t j = 0; j < left; j++) value[j] = load_one(x, start + i + j, c->dtype);
            if (left > 0) memcpy(bytes, channel + start + i, (size_t)left);
            memcpy(&v[i / 16], value, sizeof value);
            a = __builtin_convertvector(*(const v16ub *)bytes, v16u);
        }
        v[i / 16] *= from_half(a << 8);  // an e5m2 byte is the upper byte of a float16
    }
    if (w->rotation == HADAMARD) walsh_hadamard(v, (int)(w->block / 16));
    else if (w->rotation == QR) matrix_product(w->matrix, v, w->block);
}

// q = round(v / sx), sx = max |v| / 127. A NaN or infinity anywhere makes sx NaN, and with it the whole output.
// With `rest`, v becomes what the rounding left over.
INLINE float quantize_chunk(v16f *v, int count, int8_t *q, int rest) {
    v16u largest = {0};
    for (int i = 0; i < count; i++) {
        v16u magnitude = (v16u)v[i] & 0x7fffffff;  // as integers, magnitudes order like floats, NaN above all
        v16u above = (v16u)(magnitude > largest);
        largest = (magnitude & above) | (largest & ~above);
    }
    uint32_t lane[16], bits = 0;
    memcpy(lane, &largest, sizeof lane);
    for (int i = 0; i < 16; i++) bits = lane[i] > bits ? lane[i] : bits;
    union { uint32_t u; float f; } top = {bits};
    int finite = bits < 0x7f800000;
    float inverse = finite && top.f > 1e-30f ? 127 / top.f : 0;
    const v16f magic = splat(12582912);  // 1.5 * 2^23: adding it rounds to the nearest integer
    for (int i = 0; i < count; i++) {
        v16i rounded = (v16i)(v[i] * inverse + magic) - (v16i)magic;
        if (!finite) rounded = (v16i){0};
        *(v16b *)(q + i * 16) = __builtin_convertvector(rounded, v16b);
        if (rest && inverse) v[i] -= __builtin_convertvector(rounded, v16f) * (top.f / 127);
    }
    return !finite ? NAN : inverse ? top.f / 127 : 0;
}

// out[f][j] = q[j * order + f]: all first codes of the bytes, then all second codes, ...
INLINE void reorder(const int8_t *q, int8_t *out, int64_t size, int order) {
    int64_t bytes = size / order;
    if (order == 1) memcpy(out, q, (size_t)size);
    else if (order == 2)
        for (int64_t j = 0; j < bytes; j++) out[j] = q[2 * j], out[bytes + j] = q[2 * j + 1];
    else
        for (int f = 0; f < 4; f++)
            for (int64_t j = 0; j < bytes; j++) out[f * bytes + j] = q[4 * j + f];
}

// Which 32 codes of a tile int32 lane `lane` sums.
INLINE int unit_of_lane(int lane, int order) { return order == 4 ? lane % 8 / 2 : order == 2 ? lane / 4 : lane / 8; }

INLINE void arrange_lanes(const struct call *c, const int8_t *q, const float *sx, char *out, int order) {
    int64_t tile = tile_of(order);
    for (int64_t start = 0; start < c->w->padded; start += tile, out += tile + 128) {
        int8_t *mine = (int8_t *)out;
        int32_t *bias = (int32_t *)(out + tile);
        float *scale = (float *)(out + tile + 64);
        reorder(q + start, mine, tile, order);
        for (int lane = 0; lane < 16; lane++) {
            int32_t sum = 0;
            for (int64_t part = 0; part < tile; part += 64)
                for (int i = 0; i < 4; i++) sum += mine[part + lane * 4 + i];
            bias[lane] = -128 * sum;
            int64_t at = start + unit_of_lane(lane, order) * 32;
            scale[lane] = at < c->w->padded ? sx[at / c->chunk] : 0;
        }
    }
}

// One token in any layout but COLUMNS.
INLINE int prologue_body(struct call *c, int64_t token) {
    const struct tqw_weight *w = c->w;
    float norm = w->rotation == HADAMARD ? 1 / sqrtf((float)w->block) : 1;
    const char *x = (const char *)c->x + token * w->in * element_of(c);
    const int64_t size = round_up(w->padded + 128 + c->chunks * 4, 64);  // of one plane: q, zeros for tiles past the end, sx
    int8_t *q = calloc(1, (size_t)(size * c->planes));
    if (!q) return NO_MEMORY;
    v16f v[8];
    for (int set = 0; set < c->sets; set++) {
        char *out = c->activations[set] + token * c->planes * c->stride[set];
        if (set == 0 || c->channel[set] != c->channel[set - 1])
            for (int64_t start = 0; start < w->padded; start += w->block) {
                transform_block(c, c->channel[set], x, start, v);
                if (c->layout == FLOATS) {
                    for (int64_t i = 0; i < w->block / 16; i++) ((v16f *)(out + start * 4))[i] = v[i] * norm;
                    continue;
                }
                for (int64_t i = 0; i < w->block; i += c->chunk)
                    for (int64_t plane = 0; plane < c->planes; plane++) {
                        int8_t *to = q + plane * size;
                        ((float *)(to + w->padded + 128))[(start + i) / c->chunk] =
                            norm * quantize_chunk(v + i / 16, (int)c->chunk / 16, to + start + i, plane + 1 < c->planes);
                    }
            }
        for (int64_t plane = 0; plane < c->planes && c->layout != FLOATS; plane++, out += c->stride[set]) {
            const int8_t *from = q + plane * size;
            const float *sx = (const float *)(from + w->padded + 128);
            if (c->layout == NATURAL) {
                memcpy(out, from, (size_t)w->padded);
                memcpy(out + w->padded, sx, (size_t)c->chunks * 4);
            } else {
                arrange_lanes(c, from, sx, out, c->order[set]);
            }
        }
    }
    free(q);
    return 0;
}

// ---------------------------------------------------------------- any machine: expand a row, then dot products

typedef uint8_t v16u8 __attribute__((vector_size(16), aligned(1)));
typedef int32_t v8i __attribute__((vector_size(32), aligned(4)));
typedef float v8f __attribute__((vector_size(32), aligned(4)));

INLINE v16u8 copy_bytes(const uint8_t *p, const int count) {
    typedef uint64_t v2u64 __attribute__((vector_size(16)));
    uint64_t low = 0;
    memcpy(&low, p, (size_t)count);
    return (v16u8)(v2u64){low, 0};
}

// 16 fields of 1, 2 or 4 bits, lowest bits first, as bytes.
INLINE v16u8 fields(const uint8_t *p, const int bits) {
    if (bits == 4) {
        v16u8 v = copy_bytes(p, 8), low = v & 15, high = v >> 4;
        return __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    }
    if (bits == 2) {
        v16u8 v = copy_bytes(p, 4);
        v = __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const v16u8 one = {1, 4, 16, 64, 1, 4, 16, 64, 1, 4, 16, 64, 1, 4, 16, 64};
        return ((v16u8)((v & one) != 0) & 1) | ((v16u8)((v & (one << 1)) != 0) & 2);
    }
    v16u8 v = copy_bytes(p, 2);
    v = __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const v16u8 one = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    return (v16u8)((v & one) != 0) & 1;
}

// Integer levels of a row, in their natural order. table: the levels, in pieces of 16.
INLINE void expand_codes(const struct tqw_weight *w, const uint8_t *bytes, const int bits, const v16u8 *table, int8_t *out) {
    const int low = first_plane(bits), high = bits - low;
    for (int64_t start = 0; start < w->padded; start += w->group, bytes += w->group * bits / 8) {
        const uint8_t *second = bytes + w->group * low / 8;
        for (int64_t k = 0; k < w->group; k += 16) {
            v16u8 *to = (v16u8 *)(out + start + k);
            if (bits == 8) {
                *to = *(const v16u8 *)(bytes + k) ^ 0x80;
                continue;
            }
            v16u8 code = fields(bytes + k * low / 8, low);
            if (bits == 3) code |= fields(second + k / 8, 1) << 2;
            v16u8 level = __builtin_shuffle(table[0], code);
            if (low == 4 && high) {
                v16u8 top = fields(second + k * high / 8, high);
                for (int part = 1; part < 1 << high; part++) {
                    v16u8 mine = (v16u8)(top == (uint8_t)part);
                    level = (level & ~mine) | (__builtin_shuffle(table[part], code) & mine);
                }
            }
            *to = level;
        }
    }
}

INLINE void expand_row(const struct tqw_weight *w, const struct tqw_pass *p, int64_t row, int8_t *out) {
    v16u8 table[4] = {0};
    if (p->bits < 8) memcpy(table, p->levels, (size_t)1 << p->bits);
    const uint8_t *bytes = p->packed + row * (w->padded * p->bits / 8);
    switch (p->bits) {
#define CASE(bits) case bits: expand_codes(w, bytes, bits, table, out); break;
        CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8)
#undef CASE
    }
}

// sum[t] = 8 partial sums of a . b_t over n (32, 64 or 128) bytes, for `tokens` vectors b that lie `stride` bytes apart.
typedef void (*dot_function)(const int8_t *a, const int8_t *b, int64_t stride, int64_t n, const int tokens, v8i *sum);

INLINE void dot_portable(const int8_t *a, const int8_t *b, int64_t stride, int64_t n, const int tokens, v8i *sum) {
    typedef int8_t v8b __attribute__((vector_size(8), aligned(1)));
    for (int t = 0; t < tokens; t++) {
        sum[t] = (v8i){0};
        for (int64_t i = 0; i < n; i += 8)
            sum[t] += __builtin_convertvector(*(const v8b *)(a + i), v8i) * __builtin_convertvector(*(const v8b *)(b + t * stride + i), v8i);
    }
}

INLINE v8f dot_floats(const int8_t *levels, const float *x, int64_t n) {
    typedef int8_t v8b __attribute__((vector_size(8), aligned(1)));
    v8f sum = {0};
    for (int64_t i = 0; i < n; i += 8) sum += __builtin_convertvector(*(const v8b *)(levels + i), v8f) * *(const v8f *)(x + i);
    return sum;
}

// total[t] += the 8 partial sums of one row of one pass.
INLINE void row_times_tokens(const struct call *c, const int8_t *levels, const float *scale, const char *x, int64_t stride,
                             const int tokens, dot_function dot, v8f *total) {
    const struct tqw_weight *w = c->w;
    if (c->layout == FLOATS) {
        for (int64_t k = 0; k < w->padded; k += w->group)
            for (int t = 0; t < tokens; t++)
                total[t] += dot_floats(levels + k, (const float *)(x + t * stride) + k, w->group) * scale[k / w->group];
        return;
    }
    for (int64_t i = 0; i < c->chunks; i++) {
        v8i sum[4];
        dot(levels + i * c->chunk, (const int8_t *)x + i * c->chunk, stride, c->chunk, tokens, sum);
        float s = scale[i * c->chunk / w->group];
        for (int t = 0; t < tokens; t++)
            total[t] += __builtin_convertvector(sum[t], v8f) * (s * ((const float *)(x + t * stride + w->padded))[i]);
    }
}

INLINE float sum_eight(v8f v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

INLINE int rows_body(struct call *c, int64_t item, dot_function dot) {
    const struct tqw_weight *w = c->w;
    const int64_t groups = w->padded / w->group;
    int8_t *levels = malloc((size_t)(w->padded + (groups + 8 * c->columns) * 4));
    if (!levels) return NO_MEMORY;
    float *scale = (float *)(levels + w->padded);
    v8f *total = (v8f *)(scale + groups);
    for (int64_t row = item * c->rows_per_item; row < smaller((item + 1) * c->rows_per_item, w->out); row++) {
        memset(total, 0, (size_t)c->columns * sizeof *total);
        for (int64_t pass = 0; pass < w->passes; pass++) {
            const struct tqw_pass *p = &w->pass[pass];
            const int64_t stride = c->stride[c->set_of_pass[pass]];
            const char *x = c->activations[c->set_of_pass[pass]];
            expand_row(w, p, row, levels);
            for (int64_t g = 0; g < groups; g++) scale[g] = half_to_float(p->scale[row * groups + g]);
            int64_t t = 0;
            for (; t + 4 <= c->columns; t += 4) row_times_tokens(c, levels, scale, x + t * stride, stride, 4, dot, total + t);
            for (; t < c->columns; t++) row_times_tokens(c, levels, scale, x + t * stride, stride, 1, dot, total + t);
        }
        float b = c->bias ? load_one(c->bias, row, c->bias_dtype) : 0;
        for (int64_t t = 0; t < c->tokens; t++) {
            v8f sum = total[t * c->planes];
            if (c->planes == 2) sum += total[t * 2 + 1];
            store_one(c->y, t * w->out + row, sum_eight(sum) + b, c->dtype);
        }
    }
    free(levels);
    return 0;
}

// ---------------------------------------------------------------- rows of the dense weight

struct rows_call {
    const struct tqw_weight *w;
    const int64_t *ids;  // which rows, or NULL for all
    void *y;
    int64_t count, rows_per_item;
    int dtype;
};

INLINE void transposed_product(const float *matrix, v16f *v, int64_t block) {  // v <- Q^T v
    v16f out[8] = {0};
    float value[128];
    memcpy(value, v, (size_t)block * 4);
    for (int64_t i = 0; i < block; i++)
        for (int64_t j = 0; j < block / 16; j++) out[j] += *(const v16f *)(matrix + i * block + j * 16) * value[i];
    memcpy(v, out, (size_t)block * 4);
}

// dense[row] += ((scale * level) H) * a for one pass
INLINE void add_dense_pass(const struct tqw_weight *w, const struct tqw_pass *p, int64_t row, int8_t *levels, float *dense) {
    const float norm = w->rotation == HADAMARD ? 1 / sqrtf((float)w->block) : 1;
    const uint16_t *scale = p->scale + row * (w->padded / w->group);
    expand_row(w, p, row, levels);
    for (int64_t start = 0; start < w->padded; start += w->block) {
        v16f v[8];
        for (int64_t i = 0; i < w->block; i += 16)
            v[i / 16] = __builtin_convertvector(*(const v16b *)(levels + start + i), v16f) *
                        (norm * half_to_float(scale[(start + i) / w->group]));
        if (w->rotation == HADAMARD) walsh_hadamard(v, (int)(w->block / 16));
        else if (w->rotation == QR) transposed_product(w->matrix, v, w->block);
        const float *value = (const float *)v;
        for (int64_t i = 0; i < smaller(w->block, w->in - start); i++)
            dense[start + i] += value[i] * half_to_float((uint16_t)(p->channel[start + i] << 8));
    }
}

INLINE int dense_body(struct rows_call *c, int64_t item) {
    const struct tqw_weight *w = c->w;
    int8_t *levels = malloc((size_t)w->padded * 5);
    if (!levels) return NO_MEMORY;
    float *dense = (float *)(levels + w->padded);
    for (int64_t i = item * c->rows_per_item; i < smaller((item + 1) * c->rows_per_item, c->count); i++) {
        memset(dense, 0, (size_t)w->padded * 4);
        for (int64_t pass = 0; pass < w->passes; pass++) add_dense_pass(w, &w->pass[pass], c->ids ? c->ids[i] : i, levels, dense);
        for (int64_t k = 0; k < w->in; k++) store_one(c->y, i * w->in + k, dense[k], c->dtype);
    }
    free(levels);
    return 0;
}

static int dense_portable(void *job, int64_t item) { return dense_body(job, item); }
static int prologue_portable(void *job, int64_t token) { return prologue_body(job, token); }
static int rows_portable(void *job, int64_t item) { return rows_body(job, item, dot_portable); }

#if defined(__aarch64__)
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
DOTPROD INLINE void dot_neon(const int8_t *a, const int8_t *b, int64_t stride, int64_t n, const int tokens, v8i *sum) {
    for (int t = 0; t < tokens; t++) {
        int32x4_t low = vdupq_n_s32(0), high = low;
        for (int64_t i = 0; i < n; i += 32) {
            low = vdotq_s32(low, vld1q_s8(a + i), vld1q_s8(b + t * stride + i));
            high = vdotq_s32(high, vld1q_s8(a + i + 16), vld1q_s8(b + t * stride + i + 16));
        }
        vst1q_s32((int32_t *)&sum[t], low);
        vst1q_s32((int32_t *)&sum[t] + 4, high);
    }
}
DOTPROD static int rows_neon(void *job, int64_t item) { return rows_body(job, item, dot_neon); }
#endif

#if defined(__x86_64__)
// |a| <= 128 and |b| <= 127, so a pair of products stays below 2^15 and maddubs cannot saturate.
#define DOT_AVX2(name, features, step)                                                                               \
    __attribute__((target(features))) INLINE void name(const int8_t *a, const int8_t *b, int64_t stride, int64_t n,  \
                                                       const int tokens, v8i *out) {                                 \
        __m256i sum[4];                                                                                              \
        for (int t = 0; t < tokens; t++) sum[t] = _mm256_setzero_si256();                                            \
        for (int64_t i = 0; i < n; i += 32) {                                                                        \
            __m256i v = _mm256_loadu_si256((const __m256i *)(a + i)), u = _mm256_abs_epi8(v);                        \
            for (int t = 0; t < tokens; t++) {                                                                       \
                __m256i x = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *)(b + t * stride + i)), v);          \
                sum[t] = step;                                                                                       \
            }                                                                                                        \
        }                                                                                                            \
        for (int t = 0; t < tokens; t++) out[t] = (v8i)sum[t];                                                       \
    }
#define AVX2_FEATURES "avx2,fma,f16c"
#ifdef TQW_EVEX  // a test's build: what AVX-VNNI computes, in the encoding that machines with AVX-512 have
#define AVXVNNI_FEATURES AVX2_FEATURES ",avx512vl,avx512vnni"
#define DPBUSD _mm256_dpbusd_epi32
#else
#define AVXVNNI_FEATURES AVX2_FEATURES ",avxvnni"
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif
DOT_AVX2(dot_avx2, AVX2_FEATURES,
         _mm256_add_epi32(sum[t], _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1))))
DOT_AVX2(dot_avxvnni, AVXVNNI_FEATURES, DPBUSD(sum[t], u, x))
__attribute__((target(AVX2_FEATURES))) static int prologue_avx2(void *j, int64_t i) { return prologue_body(j, i); }
__attribute__((target(AVX2_FEATURES))) static int dense_avx2(void *j, int64_t i) { return dense_body(j, i); }
__attribute__((target(AVX2_FEATURES))) static int rows_avx2(void *j, int64_t i) { return rows_body(j, i, dot_avx2); }
__attribute__((target(AVXVNNI_FEATURES))) static int rows_avxvnni(void *j, int64_t i) {
    return rows_body(j, i, dot_avxvnni);
}

#include "cpu_avx512.h"
#endif

// ---------------------------------------------------------------- the call

#if defined(__x86_64__)
// Whether there are tiles of int8 and bfloat16; Linux lets a process have their 8 KiB of registers once it has asked.
static int has_amx(void) {
#if defined(__linux__)
    int a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const int tile = 1 << 24, int8 = 1 << 25, bfloat16 = 1 << 22, request_permission = 0x1023, tile_data = 18;
    return (d & tile) && (d & int8) && (d & bfloat16) && __builtin_cpu_supports("avx512bf16") &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}
#endif

static int detected_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return has_amx() ? AMX : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        int a = 7, b = 0, c = 1, d = 0;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        return a >> 4 & 1 ? AVXVNNI : AVX2;
    }
#elif defined(__APPLE__) && defined(__aarch64__)
    return NEON;
#elif defined(__linux__) && defined(__aarch64__)
    if (getauxval(AT_HWCAP) >> 20 & 1) return NEON;  // HWCAP_ASIMDDP: the dot product instructions
#endif
    return PORTABLE;
}

// The best instruction set of this machine, or whether it has the one asked for.
EXPORT int64_t tqw_isa(void) { return detected_isa(); }

static void choose_functions(struct call *c, int exact) {
    c->prologue = prologue_portable;
    c->tokens_per_item = 1;
    c->body = rows_portable;
#if defined(__x86_64__)
    if (c->isa >= AVX2) c->prologue = prologue_avx2, c->body = rows_avx2;
    if (c->isa == AVXVNNI) c->body = rows_avxvnni;
    if (c->isa >= AVX512) {
        c->prologue = prologue_avx512;
        if (!exact) c->body = c->layout == LANES ? lanes_avx512 : panels_avx512;
        if (c->layout == COLUMNS) c->prologue = columns_avx512, c->tokens_per_item = COLUMNS_TOKENS;
        if (c->layout == TILES) c->prologue = tokens_bf16, c->tokens_per_item = COLUMNS_TOKENS, c->body = panels_bf16;
    }
#elif defined(__aarch64__)
    if (c->isa == NEON) c->body = rows_neon;
    (void)exact;
#endif
}

// Tokens from which on AMX multiplies bfloat16. int8 is decoded faster, but costs more for each token, the smaller its
// chunks are; of 32 inputs they do not even fill tiles. bfloat16 is for weights of one plane only: codes of 6 bits and more
// lose too much by 8 significant bits.
static int64_t bfloat16_from(int64_t chunk) { return chunk == 32 ? 32 : chunk == 64 ? 64 : 192; }

// One set of activations for each (channel scale, order) among the passes.
static void plan_activations(struct call *c) {
    for (int64_t pass = 0; pass < c->w->passes; pass++) {
        const struct tqw_pass *p = &c->w->pass[pass];
        int order = c->layout >= LANES ? order_of((int)p->bits) : 1, set = 0;
        while (set < c->sets && (c->channel[set] != p->channel || c->order[set] != order)) set++;
        if (set == c->sets) {
            c->channel[set] = p->channel;
            c->order[set] = order;
            c->stride[set] = token_bytes(c, order);
            c->sets++;
        }
        c->set_of_pass[pass] = set;
    }
}

// Layers that read the same input, each with its own output.
struct family {
    struct call members[MAX_FAMILY];
    int64_t count;
    int64_t first[MAX_FAMILY + 1];  // item from which on each member's rows come
};

static int family_body(void *job, int64_t item) {
    struct family *f = job;
    int64_t m = 0;
    while (item >= f->first[m + 1]) m++;
    return f->members[m].body(&f->members[m], item - f->first[m]);
}

// Memory for all sets of T(x), which the members share; NULL when there is none.
static char *place_activations(struct family *f) {
    const struct call *c = f->members;
    int64_t total = 64;
    for (int set = 0; set < c->sets; set++) total += c->stride[set] * room(c);
    char *memory = malloc((size_t)total), *at = (char *)round_up((int64_t)(intptr_t)memory, 64);
    for (int set = 0; memory && set < c->sets; at += c->stride[set++] * room(c))
        for (int64_t m = 0; m < f->count; m++) f->members[m].activations[set] = at;
    return memory;
}

// A block of tokens from x to y, a call of its own: T(x) never leaves the cache of the core that made it.
static int block_body(void *job, int64_t item) {
    struct family f = *(const struct family *)job;
    const int64_t each = f.members[0].columns_per_item / f.members[0].planes, first = item * each;
    const int64_t tokens = smaller(each, f.members[0].tokens - first);
    for (int64_t m = 0; m < f.count; m++) {
        struct call *c = &f.members[m];
        c->x = (const char *)c->x + first * c->w->in * element_of(c);
        c->y = (char *)c->y + first * c->w->out * element_of(c);
        c->tokens = tokens, c->columns = tokens * c->planes;
    }
    char *memory = place_activations(&f);
    int failed = !memory;
    for (int64_t token = 0; token < tokens && !failed; token += f.members[0].tokens_per_item)
        failed = f.members[0].prologue(&f.members[0], token / f.members[0].tokens_per_item);
    for (int64_t m = 0; m < f.count && !failed; m++) failed = f.members[m].body(&f.members[m], 0);
    free(memory);
    return failed;
}

#define BLOCK_TOKENS 512  // at most, so that T(x) stays near

// Blocks of tokens that go from x to y, each with all rows, where to decode these again for each block costs less than to
// fetch what another core has transformed (measured with two cores): there are few, or bfloat16 multiplies them quickly by
// many tokens. 0: neither.
static int64_t divide_tokens(struct family *f, int64_t threads) {
    const struct call *c = f->members;
    int64_t rows = 0;
    for (int64_t m = 0; m < f->count; m++) rows += f->members[m].w->out;
    int64_t blocks = threads * ((c->tokens + threads * BLOCK_TOKENS - 1) / (threads * BLOCK_TOKENS));
    int64_t each = round_up((c->tokens + blocks - 1) / blocks, c->isa == AMX ? TILES_STEP : COLUMNS_STEP);
    int few = rows <= 1024 && each >= 128, quick = c->layout == TILES && each >= 256;
    if (c->layout < COLUMNS || !(few || quick)) return 0;
    for (int64_t m = 0; m < f->count; m++) {
        f->members[m].rows_per_item = round_up(f->members[m].w->out, 64);
        f->members[m].columns_per_item = each * c->planes;
    }
    return (c->tokens + each - 1) / each;
}

// Items of at least 16 KiB of codes, and several for each thread to even out their speeds. Returns their number.
static int64_t divide_rows(struct call *c, int64_t threads) {
    int64_t bytes = 0;
    for (int64_t pass = 0; pass < c->w->passes; pass++) bytes += c->w->out * (c->w->padded * c->w->pass[pass].bits / 8);
    int64_t items = smaller(bytes * smaller(c->tokens, 8) / (1 << 14) + 1, threads * 4);
    c->rows_per_item = round_up((c->w->out + items - 1) / items, c->layout >= COLUMNS ? 64 : 4);
    c->columns_per_item = c->columns;
    return (c->w->out + c->rows_per_item - 1) / c->rows_per_item;
}

// Few panels of rows divide badly among the threads: 9 between 2 leave one waiting for a tenth of the time. Then items
// are one panel and a part of the columns, as many parts as end soonest when to expand a panel takes as long as 4 columns,
// or 64 of bfloat16.
static int64_t divide_columns(struct call *c, int64_t threads) {
    const int64_t step = c->isa == AMX ? TILES_STEP : COLUMNS_STEP, panels = (c->w->out + 63) / 64;
    const int64_t decode = c->layout == TILES ? 64 : 4;
    int64_t items = divide_rows(c, threads);
    int64_t least = (items + threads - 1) / threads * c->rows_per_item * (c->columns + decode) * 31 / 32;
    for (int64_t parts = 1; parts <= 8 && c->columns / parts >= 48; parts++) {
        int64_t each = round_up((c->columns + parts - 1) / parts, step);
        int64_t count = panels * ((c->columns + each - 1) / each), time = (count + threads - 1) / threads * 64 * (each + decode);
        if (time < least) least = time, items = count, c->rows_per_item = 64, c->columns_per_item = each;
    }
    return items;
}

// y[i] = T(x) V_i^T + bias[i] for `count` weights that differ only in `out`, codes and weight scales: T(x) is that of
// the first.
EXPORT int64_t tqw_linears(const struct tqw_weight *const *w, int64_t count, const void *x, void *const *y,
                           const void *const *bias, int64_t tokens, int64_t dtype, int64_t bias_dtype, int64_t threads,
                           int64_t isa, int64_t exact) {
    if (tokens == 0) return 0;
    struct family f = {.count = count};
    struct call *first = &f.members[0];
    *first = (struct call){.w = w[0], .x = x, .tokens = tokens, .dtype = (int)dtype, .bias_dtype = (int)bias_dtype,
                           .isa = (int)isa};
    int64_t bits = 0;
    for (int64_t pass = 0; pass < w[0]->passes; pass++) bits += w[0]->pass[pass].bits;
    first->planes = !exact && bits >= TWO_PLANES_FROM ? 2 : 1;
    first->columns = tokens * first->planes;
    first->chunk = smaller(w[0]->group & -w[0]->group, w[0]->block);
    first->chunks = w[0]->padded / first->chunk;
    first->layout = exact ? FLOATS : isa < AVX512 ? NATURAL : first->columns <= STREAM_COLUMNS ? LANES : COLUMNS;
    if (first->layout == COLUMNS && isa == AMX && first->planes == 1 && tokens >= bfloat16_from(first->chunk)) first->layout = TILES;
    choose_functions(first, (int)exact);
    plan_activations(first);
    for (int64_t i = count; i-- > 0;) {
        f.members[i] = *first;
        f.members[i].w = w[i], f.members[i].y = y[i], f.members[i].bias = bias[i];
    }
    for (int64_t i = 0; i < count; i++) f.first[i + 1] = f.first[i] + divide_columns(&f.members[i], threads);
    int64_t items = (tokens + first->tokens_per_item - 1) / first->tokens_per_item, blocks = divide_tokens(&f, threads);
    if (blocks) return parallel(block_body, &f, blocks, threads);
    char *memory = place_activations(&f);
    if (!memory) return NO_MEMORY;
    int failed = parallel(first->prologue, first, items, tokens * w[0]->in < 1 << 14 ? 1 : threads);
    if (!failed) failed = parallel(family_body, &f, f.first[count], threads);
    free(memory);
    return failed;
}

EXPORT int64_t tqw_linear(const struct tqw_weight *w, const void *x, void *y, const void *bias, int64_t tokens,
                          int64_t dtype, int64_t bias_dtype, int64_t threads, int64_t isa, int64_t exact) {
    return tqw_linears(&w, 1, x, &y, &bias, tokens, dtype, bias_dtype, threads, isa, exact);
}

// y[i] = dense[ids[i]], or dense[i] without ids, for i < count.
EXPORT int64_t tqw_dense(const struct tqw_weight *w, const int64_t *ids, void *y, int64_t count, int64_t dtype,
                         int64_t threads, int64_t isa) {
    struct rows_call c = {.w = w, .ids = ids, .y = y, .count = count, .dtype = (int)dtype};
    task body = dense_portable;
#if defined(__x86_64__)
    if (isa >= AVX2) body = dense_avx2;
    if (isa >= AVX512 && w->rotation != QR) body = dense_avx512;
#endif
    c.rows_per_item = (1 << 16) / w->padded + 1;
    return parallel(body, &c, (count + c.rows_per_item - 1) / c.rows_per_item, threads);
}
