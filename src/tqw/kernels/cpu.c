// y = T(x) V^T + b on the CPU, from the stored layout. Plain C ABI: loaded by cpu.py through ctypes.
//
//   T(x)[c] ~= sx[c] * q[c]      q int8, one scale for each chunk c of 32, 64 or 128 inputs
//   y[n]     = sum over chunks   weight_scale[n, group of c] * sx[c] * sum_k level[code[n, k]] * q[k]
//
// The inner sum is exact in int32. AVX-512 VNNI has its own kernels for few tokens (one pass over the packed bytes)
// and for many (panels of rows expanded to bytes, then an ordinary matrix product). Everything else expands one row
// at a time with a table and takes dot products. A row is always summed by one thread in one order, so results do not
// depend on the number of threads.
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#include <arm_neon.h>
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define MAX_PASSES 4

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { NONE, HADAMARD, QR };
enum { PORTABLE, NEON, AVX2, AVXVNNI, AVX512 };
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
// Workers spin for a moment before they sleep: the next layer usually calls within that time. The caller works too and
// never waits for a worker that has not begun. Two calls at once: the second runs on its own thread.

#define MAX_WORKERS 255
#define SPINS 20000

typedef int (*task)(void *job, int64_t index);

static struct {
    pthread_mutex_t owner, lock;
    pthread_cond_t wake;
    int workers;
    atomic_uint_fast64_t open;  // number of the running job, 0 between jobs
    atomic_int inside, sleepers, failed;
    uint64_t jobs;
    task run;
    void *job;
    int64_t count;
    int allowed;
    atomic_int_fast64_t next;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void work(void) {
    for (int64_t i; (i = atomic_fetch_add(&pool.next, 1)) < pool.count;)
        if (pool.run(pool.job, i)) atomic_store(&pool.failed, 1);
}

static void *worker(void *argument) {
    int id = (int)(intptr_t)argument;
    uint64_t last = 0, now;
    for (;;) {
        int spins = 0;
        while ((now = atomic_load(&pool.open)) == 0 || now == last) {
            if (++spins < SPINS) {
                PAUSE();
                continue;
            }
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleepers, 1);
            while ((now = atomic_load(&pool.open)) == 0 || now == last) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        atomic_fetch_add(&pool.inside, 1);
        now = atomic_load(&pool.open);  // once inside, the job stays until we leave
        if (now) {
            if (id < pool.allowed) work();
            last = now;
        }
        atomic_fetch_sub(&pool.inside, 1);
    }
    return NULL;
}

static void after_fork(void) {  // threads do not survive a fork: the child starts its own
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&pool.open, 0);
    atomic_store(&pool.inside, 0);
    atomic_store(&pool.sleepers, 0);
}

static void start_workers(int wanted) {
    static int registered;
    if (!registered) registered = !pthread_atfork(NULL, NULL, after_fork);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals belong to the program's own threads
    for (; registered && pool.workers < wanted && pool.workers < MAX_WORKERS; pool.workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.workers)) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int parallel(task run, void *job, int64_t count, int threads) {
    if (threads < 2 || count < 2 || pthread_mutex_trylock(&pool.owner)) {
        int failed = 0;
        for (int64_t i = 0; i < count; i++) failed |= run(job, i);
        return failed;
    }
    start_workers(threads - 1);
    pool.run = run;
    pool.job = job;
    pool.count = count;
    pool.allowed = threads - 1;
    atomic_store(&pool.failed, 0);
    atomic_store(&pool.next, 0);
    atomic_store(&pool.open, ++pool.jobs);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    work();
    atomic_store(&pool.open, 0);
    for (int spins = 0; atomic_load(&pool.inside);) {
        if (++spins < SPINS) PAUSE();
        else sched_yield();
    }
    int failed = atomic_load(&pool.failed);
    pthread_mutex_unlock(&pool.owner);
    return failed;
}

// ---------------------------------------------------------------- one call

// How the int8 activations of one rotation lie in memory.
//   NATURAL  q[padded], sx[chunks]
//   FLOATS   T(x) itself [padded]
//   LANES    for each tile of 128 (64 at 8 bits): q in the order in which the kernel unpacks codes, and for each of the
//            16 int32 lanes the start value -128 sum(q), which undoes the unsigned bytes' offset, and the scale
//   COLUMNS  q with each chunk in unpacking order, sx[chunks], -128 sum(q) [chunks]
enum { NATURAL, FLOATS, LANES, COLUMNS };

struct call {
    const struct tqw_weight *w;
    const void *x, *bias;
    void *y;
    int64_t tokens;
    int dtype, bias_dtype, layout, isa;
    int64_t chunk, chunks;
    int64_t rows_per_item;
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

static int64_t token_bytes(const struct call *c, int order) {
    int64_t padded = c->w->padded;
    if (c->layout == FLOATS) return padded * 4;
    if (c->layout == NATURAL) return round_up(padded + c->chunks * 4, 64);
    if (c->layout == COLUMNS) return round_up(padded + c->chunks * 8, 64);
    return (padded + tile_of(order) - 1) / tile_of(order) * (tile_of(order) + 128);
}

// ---------------------------------------------------------------- prologue: x -> T(x) -> int8

INLINE v16f butterfly(v16f v, v16f partner, v16f sign) { return v * sign + partner; }

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
    for (int half = 1; half < count; half *= 2)
        for (int i = 0; i < count; i += 2 * half)
            for (int j = i; j < i + half; j++) {
                v16f low = v[j], high = v[j + half];
                v[j] = low + high;
                v[j + half] = low - high;
            }
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
INLINE float quantize_chunk(const v16f *v, int count, int8_t *q) {
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

INLINE void arrange_columns(const struct call *c, const int8_t *q, const float *sx, char *out, int order) {
    float *scale = (float *)(out + c->w->padded);
    int32_t *bias = (int32_t *)(scale + c->chunks);
    for (int64_t i = 0; i < c->chunks; i++) {
        int32_t sum = 0;
        for (int64_t k = 0; k < c->chunk; k++) sum += q[i * c->chunk + k];
        reorder(q + i * c->chunk, (int8_t *)out + i * c->chunk, c->chunk, order);
        scale[i] = sx[i];
        bias[i] = -128 * sum;
    }
}

INLINE int prologue_body(struct call *c, int64_t token) {
    const struct tqw_weight *w = c->w;
    float norm = w->rotation == HADAMARD ? 1 / sqrtf((float)w->block) : 1;
    const char *x = (const char *)c->x + token * w->in * (c->dtype == FLOAT32 ? 4 : 2);
    int8_t *q = malloc((size_t)(w->padded + 128 + c->chunks * 4));
    if (!q) return NO_MEMORY;
    memset(q + w->padded, 0, 128);  // tiles may reach past the end
    float *sx = (float *)(q + w->padded + 128);
    v16f v[8];
    for (int set = 0; set < c->sets; set++) {
        char *out = c->activations[set] + token * c->stride[set];
        if (set == 0 || c->channel[set] != c->channel[set - 1])
            for (int64_t start = 0; start < w->padded; start += w->block) {
                transform_block(c, c->channel[set], x, start, v);
                if (c->layout == FLOATS) {
                    for (int64_t i = 0; i < w->block / 16; i++) ((v16f *)(out + start * 4))[i] = v[i] * norm;
                    continue;
                }
                for (int64_t i = 0; i < w->block; i += c->chunk)
                    sx[(start + i) / c->chunk] = norm * quantize_chunk(v + i / 16, (int)c->chunk / 16, q + start + i);
            }
        if (c->layout == NATURAL) {
            memcpy(out, q, (size_t)w->padded);
            memcpy(out + w->padded, sx, (size_t)c->chunks * 4);
        } else if (c->layout == LANES) {
            arrange_lanes(c, q, sx, out, c->order[set]);
        } else if (c->layout == COLUMNS) {
            arrange_columns(c, q, sx, out, c->order[set]);
        }
    }
    free(q);
    return 0;
}

// ---------------------------------------------------------------- any machine: expand a row, then dot products

// Integer levels of a row, in their natural order.
INLINE void expand_row(const struct tqw_weight *w, const struct tqw_pass *p, int64_t row, int8_t *out) {
    int bits = (int)p->bits, low = first_plane(bits), high = bits - low;
    const uint8_t *bytes = p->packed + row * (w->padded * bits / 8);
    const int8_t *levels = p->levels;
    for (int64_t start = 0; start < w->padded; start += w->group, bytes += w->group * bits / 8) {
        const uint8_t *second = bytes + w->group * low / 8;
        int8_t *o = out + start;
        switch (bits) {
        case 2:
            for (int64_t k = 0; k < w->group; k += 4)
                for (int f = 0; f < 4; f++) o[k + f] = levels[bytes[k / 4] >> 2 * f & 3];
            break;
        case 4:
            for (int64_t k = 0; k < w->group; k += 2) {
                o[k] = levels[bytes[k / 2] & 15];
                o[k + 1] = levels[bytes[k / 2] >> 4];
            }
            break;
        case 8:
            for (int64_t k = 0; k < w->group; k++) o[k] = (int8_t)(bytes[k] ^ 0x80);
            break;
        default:
            for (int64_t k = 0; k < w->group; k++) {
                int64_t l = k * low, h = k * high;
                int code = (bytes[l / 8] >> l % 8 & ((1 << low) - 1)) | (second[h / 8] >> h % 8 & ((1 << high) - 1)) << low;
                o[k] = levels[code];
            }
        }
    }
}

typedef int32_t (*dot_function)(const int8_t *, const int8_t *, int64_t);

INLINE int32_t dot_portable(const int8_t *a, const int8_t *b, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (int32_t)a[i] * b[i];
    return sum;
}

INLINE float dot_floats(const int8_t *levels, const float *x, int64_t n) {
    v16f sum = splat(0);
    for (int64_t i = 0; i < n; i += 16)
        sum += __builtin_convertvector(*(const v16b *)(levels + i), v16f) * *(const v16f *)(x + i);
    return sum_sixteen(sum);
}

INLINE int rows_body(struct call *c, int64_t item, dot_function dot) {
    const struct tqw_weight *w = c->w;
    int8_t *levels = malloc((size_t)(w->padded + c->tokens * 4));
    if (!levels) return NO_MEMORY;
    float *y = (float *)(levels + w->padded);
    int64_t groups = w->padded / w->group, per_group = w->group / c->chunk;
    for (int64_t row = item * c->rows_per_item; row < smaller((item + 1) * c->rows_per_item, w->out); row++) {
        float b = c->bias ? load_one(c->bias, row, c->bias_dtype) : 0;
        for (int64_t t = 0; t < c->tokens; t++) y[t] = b;
        for (int64_t pass = 0; pass < w->passes; pass++) {
            const struct tqw_pass *p = &w->pass[pass];
            int set = c->set_of_pass[pass];
            expand_row(w, p, row, levels);
            for (int64_t t = 0; t < c->tokens; t++) {
                const char *x = c->activations[set] + t * c->stride[set];
                const float *sx = (const float *)(x + w->padded);
                float total = 0;
                for (int64_t g = 0; g < groups; g++) {
                    float sum = 0;
                    if (c->layout == FLOATS) sum = dot_floats(levels + g * w->group, (const float *)x + g * w->group, w->group);
                    else
                        for (int64_t i = g * per_group; i < (g + 1) * per_group; i++)
                            sum += sx[i] * (float)dot(levels + i * c->chunk, (const int8_t *)x + i * c->chunk, c->chunk);
                    total += half_to_float(p->scale[row * groups + g]) * sum;
                }
                y[t] += total;
            }
        }
        for (int64_t t = 0; t < c->tokens; t++) store_one(c->y, t * w->out + row, y[t], c->dtype);
    }
    free(levels);
    return 0;
}

static int prologue_portable(void *job, int64_t token) { return prologue_body(job, token); }
static int rows_portable(void *job, int64_t item) { return rows_body(job, item, dot_portable); }

#if defined(__aarch64__)
__attribute__((target("+dotprod"))) INLINE int32_t dot_neon(const int8_t *a, const int8_t *b, int64_t n) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t i = 0; i < n; i += 16) sum = vdotq_s32(sum, vld1q_s8(a + i), vld1q_s8(b + i));
    return vaddvq_s32(sum);
}
__attribute__((target("+dotprod"))) static int rows_neon(void *job, int64_t item) { return rows_body(job, item, dot_neon); }
#endif

#if defined(__x86_64__)
// |w| <= 128 and |x| <= 127, so a pair of products stays below 2^15 and maddubs cannot saturate.
#define DOT_AVX2(name, features, step)                                                                        \
    __attribute__((target(features))) INLINE int32_t name(const int8_t *a, const int8_t *b, int64_t n) {      \
        __m256i sum = _mm256_setzero_si256();                                                                 \
        for (int64_t i = 0; i < n; i += 32) {                                                                 \
            __m256i w = _mm256_loadu_si256((const __m256i *)(a + i));                                         \
            __m256i x = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *)(b + i)), w);                    \
            w = _mm256_abs_epi8(w);                                                                           \
            sum = step;                                                                                       \
        }                                                                                                     \
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));             \
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));                                                     \
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));                               \
    }
#define AVX2_FEATURES "avx2,fma,f16c"
#define AVXVNNI_FEATURES AVX2_FEATURES ",avxvnni"
DOT_AVX2(dot_avx2, AVX2_FEATURES,
         _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))))
DOT_AVX2(dot_avxvnni, AVXVNNI_FEATURES, _mm256_dpbusd_avx_epi32(sum, w, x))
__attribute__((target(AVX2_FEATURES))) static int prologue_avx2(void *j, int64_t i) { return prologue_body(j, i); }
__attribute__((target(AVX2_FEATURES))) static int rows_avx2(void *j, int64_t i) { return rows_body(j, i, dot_avx2); }
__attribute__((target(AVXVNNI_FEATURES))) static int rows_avxvnni(void *j, int64_t i) {
    return rows_body(j, i, dot_avxvnni);
}

// ---------------------------------------------------------------- AVX-512 VNNI
// Weights are unsigned bytes level + 128, activations signed bytes: what vpdpbusd multiplies.

#define AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
#define FAST __attribute__((target(AVX512_FEATURES)))
#define FAST_INLINE FAST INLINE

// Constants of one pass for the loops below.
struct tables {
    __m512i level[4];        // 16 biased levels each, repeated in every 128 bits
    __m256i scale_of_lane;   // byte shuffle: the tile's scales -> one float16 for each lane
    int64_t bits, order, tile, tiles, group, group_bytes, row_bytes, padded, groups;
    int64_t per_tile;        // scales in a tile
    int pieces;              // groups in a tile whose planes lie apart
};

FAST_INLINE void make_tables(const struct tqw_weight *w, const struct tqw_pass *p, struct tables *t) {
    int bits = (int)p->bits, order = order_of(bits);
    for (int part = 0; part < 4; part++) {
        uint8_t row[16] = {0};
        for (int i = 0; bits < 8 && i < 16 && part * 16 + i < 1 << bits; i++) row[i] = (uint8_t)(p->levels[part * 16 + i] + 128);
        t->level[part] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)row));
    }
    t->bits = bits, t->order = order, t->tile = tile_of(order), t->padded = w->padded, t->group = w->group;
    t->tiles = (w->padded + t->tile - 1) / t->tile;
    t->group_bytes = w->group * bits / 8, t->row_bytes = w->padded * bits / 8, t->groups = w->padded / w->group;
    int several = w->group < t->tile && t->groups > 1;
    t->per_tile = several ? t->tile / w->group : 1;
    t->pieces = several && first_plane(bits) != bits;
    uint8_t lane[32];
    for (int i = 0; i < 16; i++) {
        int scale = several ? (int)(unit_of_lane(i, order) * 32 / w->group) : 0;
        lane[2 * i] = (uint8_t)(2 * scale), lane[2 * i + 1] = (uint8_t)(2 * scale + 1);
    }
    t->scale_of_lane = _mm256_loadu_si256((const __m256i *)lane);
}

FAST_INLINE __m512i load512(const uint8_t *p, int64_t n) {
    return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, p);
}
FAST_INLINE __m256i load256(const uint8_t *p, int64_t n) {
    return n >= 32 ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi8(((__mmask32)1 << n) - 1, p);
}
FAST_INLINE __m128i load128(const uint8_t *p, int64_t n) {
    return n >= 16 ? _mm_loadu_si128((const __m128i *)p) : _mm_maskz_loadu_epi8((__mmask16)((1 << n) - 1), p);
}

// Codes of one tile -> level + 128 as bytes, in unpacking order: `order` runs of tile / order bytes.
FAST_INLINE void decode(const struct tables *t, const int bits, const uint8_t *row, int64_t tile, __m512i out[2]) {
    int64_t start = tile * t->tile, codes = t->padded - start;
    const int low = first_plane(bits), high = bits - low;
    if (codes > t->tile) codes = t->tile;
    if (bits == 8) {
        out[0] = load512(row + start, codes);
        return;
    }
    const uint8_t *first, *second = NULL;
    uint8_t gathered[2][64];
    if (high && t->pieces) {  // planes of several small groups: bring each plane together
        int64_t a = t->group * low / 8, b = t->group * high / 8;
        const uint8_t *from = row + start / t->group * t->group_bytes;
        for (int64_t i = 0; i * t->group < codes; i++, from += t->group_bytes) {
            memcpy(gathered[0] + i * a, from, (size_t)a);
            memcpy(gathered[1] + i * b, from + a, (size_t)b);
        }
        first = gathered[0], second = gathered[1];
    } else if (high) {
        int64_t inside = start % t->group;
        const uint8_t *group = row + start / t->group * t->group_bytes;
        first = group + inside * low / 8;
        second = group + t->group * low / 8 + inside * high / 8;
    } else {
        first = row + start * low / 8;
    }
    if (low == 2) {
        const __m512i three = _mm512_set1_epi8(3);
        const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
        __m512i both = _mm512_broadcast_i64x4(load256(first, codes / 4));
        __m512i c0 = _mm512_and_si512(_mm512_srlv_epi16(both, shifts), three);
        __m512i c1 = _mm512_and_si512(_mm512_srlv_epi16(_mm512_srli_epi16(both, 4), shifts), three);
        if (high) {  // bit of code 4 j + f: bit 4 (j % 2) + f of byte j / 2
            const __m512i twice = _mm512_set_epi64(
                0x0f0f0e0e0d0d0c0c, 0x0b0b0a0a09090808, 0x0707060605050404, 0x0303020201010000,
                0x0f0f0e0e0d0d0c0c, 0x0b0b0a0a09090808, 0x0707060605050404, 0x0303020201010000);
            const __m512i bit0 = _mm512_inserti64x4(_mm512_set1_epi16(0x1001), _mm256_set1_epi16(0x2002), 1);
            const __m512i four = _mm512_set1_epi8(4);
            __m512i top = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load128(second, codes / 8)), twice);
            c0 = _mm512_mask_add_epi8(c0, _mm512_test_epi8_mask(top, bit0), c0, four);
            c1 = _mm512_mask_add_epi8(c1, _mm512_test_epi8_mask(top, _mm512_slli_epi16(bit0, 2)), c1, four);
        }
        out[0] = _mm512_shuffle_epi8(t->level[0], c0);
        out[1] = _mm512_shuffle_epi8(t->level[0], c1);
        return;
    }
    const __m512i fifteen = _mm512_set1_epi8(15);
    __m512i bytes = load512(first, codes / 2);
    __m512i c0 = _mm512_and_si512(bytes, fifteen), c1 = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), fifteen);
    out[0] = _mm512_shuffle_epi8(t->level[0], c0);
    out[1] = _mm512_shuffle_epi8(t->level[0], c1);
    if (bits == 5) {  // bit of code 2 j + f: bit 2 (j % 4) + f of byte j / 4
        const __m512i four_times = _mm512_set_epi64(
            0x0f0f0f0f0e0e0e0e, 0x0d0d0d0d0c0c0c0c, 0x0b0b0b0b0a0a0a0a, 0x0909090908080808,
            0x0707070706060606, 0x0505050504040404, 0x0303030302020202, 0x0101010100000000);
        __m512i top = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load128(second, codes / 8)), four_times);
        __mmask64 m0 = _mm512_test_epi8_mask(top, _mm512_set1_epi32(0x40100401));
        __mmask64 m1 = _mm512_test_epi8_mask(top, _mm512_set1_epi32((int)0x80200802));
        out[0] = _mm512_mask_shuffle_epi8(out[0], m0, t->level[1], c0);
        out[1] = _mm512_mask_shuffle_epi8(out[1], m1, t->level[1], c1);
    }
    if (bits == 6) {  // two bits of code 2 j + f: bits 4 (j % 2) + 2 f of byte j / 2
        __m512i top = _mm512_cvtepu8_epi16(load256(second, codes / 4));
        top = _mm512_or_si512(top, _mm512_slli_epi16(top, 8));
        for (int f = 0; f < 2; f++) {
            __m512i c = f ? c1 : c0;
            const __m512i bit = _mm512_set1_epi16((short)(f ? 0x4004 : 0x1001));
            __mmask64 b0 = _mm512_test_epi8_mask(top, bit), b1 = _mm512_test_epi8_mask(top, _mm512_slli_epi16(bit, 1));
            __m512i upper = _mm512_shuffle_epi8(t->level[2], c);
            out[f] = _mm512_mask_shuffle_epi8(out[f], b0, t->level[1], c);
            upper = _mm512_mask_shuffle_epi8(upper, b0, t->level[3], c);
            out[f] = _mm512_mask_mov_epi8(out[f], b1, upper);
        }
    }
}

FAST_INLINE __m512 scales_of_tile(const struct tables *t, const uint16_t *row, int64_t tile) {
    uint64_t raw = 0;
    if (t->per_tile == 1) raw = row[tile * t->tile / t->group];
    else {
        int64_t first = tile * t->per_tile, count = smaller(t->per_tile, t->groups - first);
        if (count == 4) memcpy(&raw, row + first, 8);
        else if (count == 2) memcpy(&raw, row + first, 4);
        else memcpy(&raw, row + first, (size_t)count * 2);
    }
    return _mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x((long long)raw), t->scale_of_lane));
}

// sum[r][t] += the lanes of rows x tokens of one pass.
FAST_INLINE void accumulate(const struct tables *t, const int bits, const struct tqw_pass *p, int64_t row,
                            const int rows, const char *x, int64_t stride, const int tokens, __m512 sum[4][4]) {
    const uint8_t *packed = p->packed + row * t->row_bytes;
    const uint16_t *scale = p->scale + row * t->groups;
    for (int64_t tile = 0; tile < t->tiles; tile++, x += t->tile + 128) {
        for (int r = 0; r < rows; r++) {
            __m512i w[2];
            decode(t, bits, packed + r * t->row_bytes, tile, w);
            if (bits != 8) __builtin_prefetch(packed + r * t->row_bytes + tile * 16 * bits + 1024);
            __m512 s = scales_of_tile(t, scale + r * t->groups, tile);
            for (int k = 0; k < tokens; k++) {
                const char *mine = x + k * stride;
                __m512i dot = _mm512_loadu_si512(mine + t->tile);
                dot = _mm512_dpbusd_epi32(dot, w[0], _mm512_loadu_si512(mine));
                if (bits != 8) dot = _mm512_dpbusd_epi32(dot, w[1], _mm512_loadu_si512(mine + 64));
                __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_loadu_ps((const float *)(mine + t->tile + 64)));
                sum[r][k] = _mm512_fmadd_ps(f, s, sum[r][k]);
            }
        }
    }
}

FAST_INLINE void rows_times_tokens(const struct call *c, const struct tables *tables, int64_t row, const int rows,
                                   int64_t token, const int tokens) {
    const struct tqw_weight *w = c->w;
    __m512 sum[4][4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < tokens; k++) sum[r][k] = _mm512_setzero_ps();
    for (int64_t pass = 0; pass < w->passes; pass++) {
        const struct tqw_pass *p = &w->pass[pass];
        int set = c->set_of_pass[pass];
        const char *x = c->activations[set] + token * c->stride[set];
        switch (p->bits) {
#define CASE(bits) case bits: accumulate(&tables[pass], bits, p, row, rows, x, c->stride[set], tokens, sum); break;
            CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8)
#undef CASE
        }
    }
    for (int r = 0; r < rows; r++) {
        float b = c->bias ? load_one(c->bias, row + r, c->bias_dtype) : 0;
        for (int k = 0; k < tokens; k++)
            store_one(c->y, (token + k) * w->out + row + r, _mm512_reduce_add_ps(sum[r][k]) + b, c->dtype);
    }
}

FAST static int lanes_avx512(void *job, int64_t item) {
    const struct call *c = job;
    struct tables tables[MAX_PASSES];
    for (int64_t pass = 0; pass < c->w->passes; pass++) make_tables(c->w, &c->w->pass[pass], &tables[pass]);
    int64_t row = item * c->rows_per_item, end = smaller(row + c->rows_per_item, c->w->out);
    for (; row < end;) {
        int rows = end - row >= 4 ? 4 : 1;
        for (int64_t token = 0; token < c->tokens;) {
            int64_t left = c->tokens - token;
            if (rows == 4 && left >= 4) rows_times_tokens(c, tables, row, 4, token, 4), token += 4;
            else if (rows == 4) rows_times_tokens(c, tables, row, 4, token, 1), token += 1;
            else if (left >= 4) rows_times_tokens(c, tables, row, 1, token, 4), token += 4;
            else rows_times_tokens(c, tables, row, 1, token, 1), token += 1;
        }
        row += rows;
    }
    return 0;
}
FAST static int prologue_avx512(void *job, int64_t token) { return prologue_body(job, token); }
#endif

// ---------------------------------------------------------------- the call

static int detected_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        int a = 7, b = 0, c = 1, d = 0;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        return a >> 4 & 1 ? AVXVNNI : AVX2;
    }
#elif defined(__aarch64__)
    return NEON;
#endif
    return PORTABLE;
}

// The best instruction set of this machine, or whether it has the one asked for.
EXPORT int64_t tqw_isa(void) { return detected_isa(); }

EXPORT int64_t tqw_linear(const struct tqw_weight *w, const void *x, void *y, const void *bias, int64_t tokens,
                          int64_t dtype, int64_t bias_dtype, int64_t threads, int64_t isa, int64_t exact) {
    if (tokens == 0 || w->out == 0) return 0;
    struct call c = {.w = w, .x = x, .y = y, .bias = bias, .tokens = tokens, .dtype = (int)dtype,
                     .bias_dtype = (int)bias_dtype, .isa = (int)isa};
    c.layout = exact ? FLOATS : isa == AVX512 ? LANES : NATURAL;
    c.chunk = smaller(w->group & -w->group, w->block);
    c.chunks = w->padded / c.chunk;
    c.prologue = prologue_portable;
    c.body = rows_portable;
#if defined(__x86_64__)
    if (isa >= AVX2) c.prologue = prologue_avx2, c.body = rows_avx2;
    if (isa == AVXVNNI) c.body = rows_avxvnni;
    if (isa == AVX512) {
        c.prologue = prologue_avx512;
        if (!exact) c.body = lanes_avx512;
    }
#elif defined(__aarch64__)
    if (isa == NEON) c.body = rows_neon;
#endif
    int64_t bytes = 0, total = 0;
    for (int64_t pass = 0; pass < w->passes; pass++) {
        int order = c.layout == LANES || c.layout == COLUMNS ? order_of((int)w->pass[pass].bits) : 1, set = 0;
        while (set < c.sets && (c.channel[set] != w->pass[pass].channel || c.order[set] != order)) set++;
        if (set == c.sets) {
            c.channel[set] = w->pass[pass].channel;
            c.order[set] = order;
            c.stride[set] = token_bytes(&c, order);
            total += c.stride[set] * tokens;
            c.sets++;
        }
        c.set_of_pass[pass] = set;
        bytes += w->out * (w->padded * w->pass[pass].bits / 8);
    }
    char *memory = malloc((size_t)total + 64), *at = (char *)round_up((int64_t)(intptr_t)memory, 64);
    if (!memory) return NO_MEMORY;
    for (int set = 0; set < c.sets; set++) {
        c.activations[set] = at;
        at += c.stride[set] * tokens;
    }
    int failed = parallel(c.prologue, &c, tokens, tokens * w->in < 1 << 14 ? 1 : (int)threads);
    // Items of at least 16 KiB of codes, and several for each thread to even out their speeds.
    int64_t items = smaller(bytes * smaller(tokens, 8) / (1 << 14) + 1, threads * 8);
    c.rows_per_item = round_up((w->out + items - 1) / items, 4);
    if (!failed) failed = parallel(c.body, &c, (w->out + c.rows_per_item - 1) / c.rows_per_item, items < 2 ? 1 : (int)threads);
    free(memory);
    return failed;
}
