// AVX-512 VNNI and AMX kernels of cpu.c. Weights are unsigned bytes level + 128, activations signed bytes: what vpdpbusd
// multiplies. The offset is undone by accumulators that start at -128 sum(q).
//
//   up to 4 tokens each row is a stream: decode 128 codes, two vpdpbusd against the LANES activations
//   more tokens    64 rows at a time: decode 128 codes of each, transpose so that a vector holds 16 rows x 4 codes,
//                  and multiply by all tokens (COLUMNS activations) while those 8 KiB lie in the L1 cache

#define AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
#define FAST __attribute__((target(AVX512_FEATURES)))
#define FAST_INLINE FAST INLINE

// Constants of one pass for the loops below.
struct tables {
    __m512i level[4];        // 16 biased levels each, repeated in every 128 bits
    __m512i scale_of_lane;   // which of the tile's scales belongs to each lane
    int64_t tile, tiles, group, group_bytes, row_bytes, padded, groups;
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
    t->tile = tile_of(order), t->padded = w->padded, t->group = w->group;
    t->tiles = (w->padded + t->tile - 1) / t->tile;
    t->group_bytes = w->group * bits / 8, t->row_bytes = w->padded * bits / 8, t->groups = w->padded / w->group;
    int several = w->group < t->tile && t->groups > 1;
    t->per_tile = several ? t->tile / w->group : 1;
    t->pieces = several && first_plane(bits) != bits;
    int32_t lane[16];
    for (int i = 0; i < 16; i++) lane[i] = several ? (int)(unit_of_lane(i, order) * 32 / w->group) : 0;
    t->scale_of_lane = _mm512_loadu_si512(lane);
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


// ---- up to 4 tokens

// sum += 16 x 4 products. As an intrinsic, gcc moves the many accumulators of the loops below back and forth to memory.
FAST_INLINE void dot_add(__m512i *sum, __m512i w, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(w), "v"(x));
}

#define AHEAD 32768  // bytes; prefetches into L2 overlap with the arithmetic, those into L1 and the hardware's do not

// sum[r][k] += the lanes of one pass for rows row .. row + rows and all tokens. scale: room for rows x (groups + 16).
FAST_INLINE void stream_rows(const struct tables *t, const int bits, const int several, const struct tqw_pass *p,
                             int64_t row, const int rows, const char *x, int64_t stride, const int tokens, float *scale,
                             __m512 sum[4][4]) {
    const uint8_t *packed = p->packed + row * t->row_bytes;
    const int64_t room = round_up(t->groups, 16) + 16;
    for (int r = 0; r < rows; r++)
        for (int64_t g = 0; g < t->groups; g += 16) {
            __mmask16 valid = t->groups - g >= 16 ? 0xffff : (__mmask16)((1 << (t->groups - g)) - 1);
            __m256i half = _mm256_maskz_loadu_epi16(valid, p->scale + (row + r) * t->groups + g);
            _mm512_storeu_ps(scale + r * room + g, _mm512_cvtph_ps(half));
        }
    // A missed scale stalls everything that follows it, so scales are fetched 8 steps ahead.
    const char *scales = (const char *)(p->scale + row * t->groups);
    for (int64_t bytes = rows * t->groups * 2, i = 0; i < bytes; i += 64) _mm_prefetch(scales + 8 * bytes + i, _MM_HINT_T0);
    for (int64_t tile = 0; tile < t->tiles; tile++, x += t->tile + 128) {
        int64_t at = several ? tile * t->per_tile : tile * t->tile / t->group;
        __m512i w[4][2];
        __m512 s[4];
        for (int r = 0; r < rows; r++) {
            const uint8_t *mine = packed + r * t->row_bytes;
            decode(t, bits, mine, tile, w[r]);
            _mm_prefetch((const char *)mine + tile * (bits == 8 ? 64 : 16 * bits) + AHEAD, _MM_HINT_T1);
            const float *f = scale + r * room + at;
            s[r] = several ? _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(f)), t->scale_of_lane) : _mm512_set1_ps(*f);
        }
        for (int k = 0; k < tokens; k++) {
            const char *mine = x + k * stride;
            __m512i x0 = _mm512_loadu_si512(mine), x1 = bits == 8 ? x0 : _mm512_loadu_si512(mine + 64);
            __m512i start = _mm512_loadu_si512(mine + t->tile);
            __m512 sx = _mm512_loadu_ps((const float *)(mine + t->tile + 64));
            for (int r = 0; r < rows; r++) {
                __m512i dot = start;
                dot_add(&dot, w[r][0], x0);
                if (bits != 8) dot_add(&dot, w[r][1], x1);
                sum[r][k] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), sx), s[r], sum[r][k]);
            }
        }
    }
}

FAST_INLINE void few_tokens(const struct call *c, const struct tables *tables, int64_t row, const int rows,
                            const int tokens, float *scale) {
    const struct tqw_weight *w = c->w;
    __m512 sum[4][4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 4; k++) sum[r][k] = _mm512_setzero_ps();
    for (int64_t pass = 0; pass < w->passes; pass++) {
        const struct tqw_pass *p = &w->pass[pass];
        const struct tables *t = &tables[pass];
        const int set = c->set_of_pass[pass];
        const char *x = c->activations[set];
        switch (p->bits * 2 + (t->per_tile > 1)) {
#define CASE(bits)                                                                                                     \
    case bits * 2: stream_rows(t, bits, 0, p, row, rows, x, c->stride[set], tokens, scale, sum); break;                \
    case bits * 2 + 1: stream_rows(t, bits, 1, p, row, rows, x, c->stride[set], tokens, scale, sum); break;
            CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8)
#undef CASE
        }
    }
    for (int r = 0; r < rows; r++) {
        float b = c->bias ? load_one(c->bias, row + r, c->bias_dtype) : 0;
        for (int k = 0; k < c->tokens; k++) {
            __m512 total = sum[r][k * c->planes];
            if (c->planes == 2) total = _mm512_add_ps(total, sum[r][k * 2 + 1]);
            store_one(c->y, k * w->out + row + r, _mm512_reduce_add_ps(total) + b, c->dtype);
        }
    }
}

FAST_INLINE void stream_item(const struct call *c, const struct tables *tables, int64_t row, int64_t end, const int rows,
                             const int tokens, float *scale) {
    for (; row + rows <= end; row += rows) few_tokens(c, tables, row, rows, tokens, scale);
    for (; row < end; row++) few_tokens(c, tables, row, 1, tokens, scale);
}

FAST static int lanes_avx512(void *job, int64_t item) {
    const struct call *c = job;
    struct tables tables[MAX_PASSES];
    for (int64_t pass = 0; pass < c->w->passes; pass++) make_tables(c->w, &c->w->pass[pass], &tables[pass]);
    float *scale = malloc((size_t)(round_up(tables[0].groups, 16) + 16) * 16);
    if (!scale) return NO_MEMORY;
    int64_t row = item * c->rows_per_item, end = smaller(row + c->rows_per_item, c->w->out);
    switch (c->columns) {
    case 1: stream_item(c, tables, row, end, 4, 1, scale); break;
    case 2: stream_item(c, tables, row, end, 4, 2, scale); break;
    case 3: stream_item(c, tables, row, end, 2, 3, scale); break;
    case 4: stream_item(c, tables, row, end, 2, 4, scale); break;
    }
    free(scale);
    return 0;
}

// ---- more tokens

#define PANEL_ROWS 64
#define PANEL_TILE 128
#define PANEL_TOKENS 288  // whose sums should stay near; a multiple of COLUMNS_STEP and TILES_STEP

FAST_INLINE void transpose(__m512i v[16]) {  // 16 x 16 int32
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        __m512i d = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), e = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, d), t[i + 1] = _mm512_unpackhi_epi64(a, d);
        t[i + 2] = _mm512_unpacklo_epi64(b, e), t[i + 3] = _mm512_unpackhi_epi64(b, e);
    }
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), e = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        v[i] = _mm512_shuffle_i32x4(a, d, 0x88), v[i + 8] = _mm512_shuffle_i32x4(a, d, 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(b, e, 0x88), v[i + 12] = _mm512_shuffle_i32x4(b, e, 0xdd);
    }
}

// Where int32 `d` of decoded vector `f` goes among the 32 steps of a tile: units of 32 codes, 8 steps each (`unit_order`).
INLINE int step_of(int order, int f, int d) {
    if (order == 2) return d / 4 * 8 + f * 4 + d % 4;
    if (order == 4) return d % 8 / 2 * 8 + (2 * f + d / 8) * 2 + d % 2;
    return (2 * f + d / 8) * 8 + d % 8;
}

// Codes of 16 rows and one tile -> panel[step][16 rows][4 codes], steps `pitch` bytes apart. Rows past the end repeat.
FAST_INLINE void decode_panel(const struct tables *t, const int bits, const uint8_t *packed, int64_t rows, int64_t tile,
                              uint8_t *panel, int64_t pitch) {
    __m512i v[2][16];
    int64_t codes = smaller(t->padded - tile * PANEL_TILE, PANEL_TILE);
    for (int64_t r = 0; r < 16; r++) {
        const uint8_t *row = packed + smaller(r, rows - 1) * t->row_bytes;
        _mm_prefetch((const char *)row + (tile + 6) * 16 * bits, _MM_HINT_T1);
        if (bits == 8) _mm_prefetch((const char *)row + (tile + 6) * 16 * bits + 64, _MM_HINT_T1);
        if (bits == 4) {
            v[0][r] = load512(row + tile * 64, codes / 2);
        } else if (bits == 8) {
            decode(t, bits, row, 2 * tile, &v[0][r]);
            if (codes > 64) decode(t, bits, row, 2 * tile + 1, &v[1][r]);
            else v[1][r] = _mm512_setzero_si512();
        } else {
            __m512i w[2];
            decode(t, bits, row, tile, w);
            v[0][r] = w[0], v[1][r] = w[1];
        }
    }
    transpose(v[0]);
    if (bits != 4) transpose(v[1]);
    const __m512i fifteen = _mm512_set1_epi8(15);
    for (int d = 0; d < 16; d++) {
        __m512i low = v[0][d], high = v[1][d];
        if (bits == 4) {
            high = _mm512_shuffle_epi8(t->level[0], _mm512_and_si512(_mm512_srli_epi16(low, 4), fifteen));
            low = _mm512_shuffle_epi8(t->level[0], _mm512_and_si512(low, fifteen));
        }
        _mm512_store_si512(panel + step_of(order_of(bits), 0, d) * pitch, low);
        _mm512_store_si512(panel + step_of(order_of(bits), 1, d) * pitch, high);
    }
}

FAST_INLINE void add_scaled(float *y, __m512i dot, __m512 scale, __m512 mine) {
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, mine), _mm512_loadu_ps(y)));
}

// y[token][16 n rows] += scale[row] * sx[token] * (codes of one chunk . q[token]) for `m` tokens.
FAST_INLINE void multiply(const uint8_t *panel, int64_t steps, const int n, const int m, const char *q, const float *sx,
                          const int32_t *start, int64_t stride, const float *scale, float *y) {
    __m512i dot[6][4];
    for (int i = 0; i < m; i++) {
        __m512i first = _mm512_set1_epi32(*(const int32_t *)((const char *)start + i * stride));
        for (int j = 0; j < n; j++) dot[i][j] = first;
    }
    for (int64_t step = 0; step < steps; step++, panel += n * 64, q += 4) {
        __m512i w[4];
        for (int j = 0; j < n; j++) w[j] = _mm512_load_si512(panel + j * 64);
        for (int i = 0; i < m; i++) {
            __m512i x = _mm512_set1_epi32(*(const int32_t *)(q + i * stride));
            for (int j = 0; j < n; j++) dot_add(&dot[i][j], w[j], x);
        }
    }
    for (int i = 0; i < m; i++) {
        __m512 mine = _mm512_set1_ps(*(const float *)((const char *)sx + i * stride));
        for (int j = 0; j < n; j++) add_scaled(y + (i * n + j) * 16, dot[i][j], _mm512_loadu_ps(scale + j * 16), mine);
    }
}

FAST_INLINE void multiply_tokens(const uint8_t *panel, int64_t steps, const int n, int64_t tokens, const char *q,
                                 const float *sx, const int32_t *start, int64_t stride, const float *scale, float *y) {
    int64_t i = 0;
#define TIMES(m)                                                                                               \
    multiply(panel, steps, n, m, q + i * stride, (const float *)((const char *)sx + i * stride),               \
             (const int32_t *)((const char *)start + i * stride), stride, scale, y + i * n * 16)
    for (; i + 6 <= tokens; i += 6) TIMES(6);
    switch (tokens - i) {
    case 5: TIMES(5); break;
    case 4: TIMES(4); break;
    case 3: TIMES(3); break;
    case 2: TIMES(2); break;
    case 1: TIMES(1); break;
    }
#undef TIMES
}

// ---- the same with AMX tiles of 16 rows of 64 bytes: 16 tokens' q as they lie times 16 steps of a panel as they lie

#define AMX_FAST __attribute__((target(AVX512_FEATURES ",amx-tile,amx-int8")))

AMX_FAST static void tiles_begin(void) {
    struct { uint8_t palette, start_row, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));  // the intrinsic tells gcc of 8 of the 64 bytes only
}

AMX_FAST static void tiles_end(void) { _tile_release(); }

// dot[32 tokens][32 rows] of one chunk, without `start`. Of one half of the tokens only, if there are fewer.
AMX_FAST INLINE void dot_tiles(const uint8_t *panel, int64_t steps, const char *q, int64_t stride, const int halves,
                               int32_t dot[32][32]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step += 16, panel += 16 * PANEL_ROWS * 4, q += 64) {
        _tile_loadd(4, q, stride);
        _tile_loadd(6, panel, PANEL_ROWS * 4);
        _tile_loadd(7, panel + 64, PANEL_ROWS * 4);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (halves == 1) continue;
        _tile_loadd(5, q + 16 * stride, stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, dot[0], sizeof dot[0]);
    _tile_stored(1, dot[0] + 16, sizeof dot[0]);
    if (halves == 1) return;
    _tile_stored(2, dot[16], sizeof dot[0]);
    _tile_stored(3, dot[16] + 16, sizeof dot[0]);
}

// What `multiply` adds to y, for `tokens` tokens and 32 rows.
AMX_FAST INLINE void add_tiles(int32_t dot[32][32], int64_t tokens, const float *sx, const int32_t *start, int64_t stride,
                               const float *scale, float *y) {
    const __m512 low = _mm512_loadu_ps(scale), high = _mm512_loadu_ps(scale + 16);
    for (int64_t i = 0; i < tokens; i++, y += PANEL_ROWS) {
        const __m512i first = _mm512_set1_epi32(*(const int32_t *)((const char *)start + i * stride));
        const __m512 mine = _mm512_set1_ps(*(const float *)((const char *)sx + i * stride));
        add_scaled(y, _mm512_add_epi32(_mm512_load_si512(dot[i]), first), low, mine);
        add_scaled(y + 16, _mm512_add_epi32(_mm512_load_si512(dot[i] + 16), first), high, mine);
    }
}

// `multiply` for the 64 rows of a panel and as many tokens as fill tiles: returns how many. The same to the last bit. Each
// product starts before the previous one is added to y, which hides some of its latency.
AMX_FAST static int64_t multiply_tiles(const uint8_t *panel, int64_t steps, int64_t tokens, const char *q, const float *sx,
                                       const int32_t *start, int64_t stride, const float *scale, float *y) {
    int32_t dot[2][32][32] __attribute__((aligned(64)));
    const int64_t taken = tokens / 16 * 16, products = (taken + 31) / 32 * 2;
    for (int64_t next = 0; next <= products; next++) {
        if (next < products) {
            int64_t i = next / 2 * 32;
            dot_tiles(panel + next % 2 * 128, steps, q + i * stride, stride, taken - i < 32 ? 1 : 2, dot[next % 2]);
        }
        if (next > 0) {
            int64_t last = next - 1, i = last / 2 * 32, row = last % 2 * 32;
            add_tiles(dot[last % 2], smaller(taken - i, 32), (const float *)((const char *)sx + i * stride),
                      (const int32_t *)((const char *)start + i * stride), stride, scale + row, y + i * PANEL_ROWS + row);
        }
    }
    return taken;
}

// The scales of one group: float[16 n], rows past the end repeat.
FAST_INLINE void panel_scales(const struct tqw_pass *p, const struct tables *t, int64_t row, int64_t rows, const int n,
                              int64_t group, float *scale) {
    uint16_t half[PANEL_ROWS];
    for (int64_t r = 0; r < n * 16; r++) half[r] = p->scale[(row + smaller(r, rows - 1)) * t->groups + group];
    for (int j = 0; j < n; j++)
        _mm512_storeu_ps(scale + j * 16, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(half + j * 16))));
}

FAST_INLINE void panel_pass(const struct call *c, const struct tables *t, int64_t pass, const int bits, int64_t row,
                            int64_t rows, const int n, int64_t token, int64_t tokens, uint8_t *panel, float *y) {
    const struct tqw_pass *p = &c->w->pass[pass];
    const int set = c->set_of_pass[pass];
    const int64_t stride = c->stride[set], pitch = n * 64;
    const char *q = c->activations[set] + token * stride;
    const float *sx = (const float *)(q + c->w->padded);
    const int32_t *start = (const int32_t *)(sx + c->chunks);
    const int tiles = c->isa == AMX && c->chunk >= 64;
    float scale[PANEL_ROWS] = {0};
    int64_t group = -1;
    for (int64_t first = 0; first < t->padded; first += PANEL_TILE) {
        for (int j = 0; j < n; j++)
            decode_panel(t, bits, p->packed + (row + j * 16) * t->row_bytes, rows - j * 16, first / PANEL_TILE,
                         panel + j * 64, pitch);
        for (int64_t k = first; k < smaller(first + PANEL_TILE, t->padded); k += c->chunk) {
            if (k / t->group != group) panel_scales(p, t, row, rows, n, group = k / t->group, scale);
            const uint8_t *mine = panel + (k - first) / 4 * pitch;
            const int64_t steps = c->chunk / 4, i = k / c->chunk;
            int64_t done = 0;
            if (tiles && n * 16 == PANEL_ROWS)
                done = multiply_tiles(mine, steps, tokens, q + k, sx + i, start + i, stride, scale, y);
            multiply_tokens(mine, steps, n, tokens - done, q + k + done * stride,
                            (const float *)((const char *)(sx + i) + done * stride),
                            (const int32_t *)((const char *)(start + i) + done * stride), stride, scale, y + done * n * 16);
        }
    }
}

FAST_INLINE void store_panel(const struct call *c, int64_t row, int64_t rows, const int n, int64_t token, int64_t tokens,
                             const float *y) {
    float bias[PANEL_ROWS] = {0};
    for (int64_t r = 0; c->bias && r < rows; r++) bias[r] = load_one(c->bias, row + r, c->bias_dtype);
    for (int64_t i = 0; i < tokens; i += c->planes, y += c->planes * n * 16) {
        int64_t at = (token + i) / c->planes * c->w->out + row;
        const float *rest = c->planes == 2 ? y + n * 16 : NULL;
        for (int64_t r = 0; r < rows; r++) store_one(c->y, at + r, y[r] + (rest ? rest[r] : 0) + bias[r], c->dtype);
    }
}

FAST_INLINE void panel(const struct call *c, const struct tables *tables, int64_t row, int64_t rows, const int n,
                       int64_t token, int64_t end, uint8_t *memory) {
    float *y = (float *)(memory + PANEL_ROWS * PANEL_TILE);
    for (; token < end; token += PANEL_TOKENS) {
        int64_t tokens = smaller(end - token, PANEL_TOKENS);
        memset(y, 0, (size_t)(tokens * n * 64));
        for (int64_t pass = 0; pass < c->w->passes; pass++)
            switch (c->w->pass[pass].bits) {
#define CASE(bits) case bits: panel_pass(c, &tables[pass], pass, bits, row, rows, n, token, tokens, memory, y); break;
                CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8)
#undef CASE
            }
        store_panel(c, row, rows, n, token, tokens, y);
    }
}

struct part {
    int64_t row, end, token, last;  // of these rows and columns: the first, and behind the last
};

// Items: the first part of the columns for all rows, then the next part, so that the threads expand different rows.
static struct part part_of(const struct call *c, int64_t item) {
    const int64_t items = (c->w->out + c->rows_per_item - 1) / c->rows_per_item;
    const int64_t row = item % items * c->rows_per_item, token = item / items * c->columns_per_item;
    return (struct part){row, smaller(row + c->rows_per_item, c->w->out), token, smaller(token + c->columns_per_item, c->columns)};
}

FAST static int panels_avx512(void *job, int64_t item) {
    const struct call *c = job;
    struct tables tables[MAX_PASSES];
    for (int64_t pass = 0; pass < c->w->passes; pass++) make_tables(c->w, &c->w->pass[pass], &tables[pass]);
    const struct part p = part_of(c, item);
    uint8_t *memory = aligned_alloc(64, (size_t)(PANEL_ROWS * (PANEL_TILE + smaller(p.last - p.token, PANEL_TOKENS) * 4)));
    if (!memory) return NO_MEMORY;
    int64_t row = p.row;
    if (c->isa == AMX) tiles_begin();
    for (; p.end - row > 32; row += 64) panel(c, tables, row, smaller(p.end - row, 64), 4, p.token, p.last, memory);
    for (; row < p.end; row += 16) panel(c, tables, row, smaller(p.end - row, 16), 1, p.token, p.last, memory);
    if (c->isa == AMX) tiles_end();
    free(memory);
    return 0;
}

FAST static int prologue_avx512(void *job, int64_t token) { return prologue_body(job, token); }

// ---- prologue of more tokens: T(x) -> COLUMNS, a block stays in registers from the load to the stored bytes

#define COLUMNS_TOKENS 4  // of an item: they share the block's channel scales, and their reductions a tree

// Shuffles from 64 bytes that vpackssdw and vpacksswb left interleaved to units of 32 in the order in which these meet
// their 8 steps of 4 (see step_of): all first codes of the bytes, then all second codes, ...
struct unpacking {
    int32_t natural[16], dwords[16];
    int8_t bytes[16];
};

static const struct unpacking unpacking_of_order[5] = {
    [1] = {.natural = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15}},
    [2] = {.natural = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15},
           .bytes = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15},
           .dwords = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15}},
    [4] = {.natural = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15},
           .bytes = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15},
           .dwords = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15}},
};

FAST_INLINE __mmask16 existing(int64_t left) { return left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0; }

// 16 values of which `left` exist; the others are 0.
FAST_INLINE __m512 load_values(const char *x, int64_t i, int64_t left, int dtype) {
    __mmask16 valid = existing(left);
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(valid, x + i * 4);
    __m256i half = _mm256_maskz_loadu_epi16(valid, x + i * 2);
    return dtype == FLOAT16 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 16 values, those of `valid`.
FAST_INLINE void store_values(void *y, int64_t i, __m512 value, __mmask16 valid, int dtype) {
    if (dtype == FLOAT32) {
        _mm512_mask_storeu_ps((float *)y + i, valid, value);
    } else if (dtype == FLOAT16) {
        _mm256_mask_storeu_epi16((uint16_t *)y + i, valid, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {  // to the nearest, ties to even; not every AVX-512 has an instruction for it
        __m512i bits = (__m512i)value, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        _mm256_mask_storeu_epi16((uint16_t *)y + i, valid, _mm512_cvtepi32_epi16(bits));
    }
}

FAST_INLINE void channel_scales(const uint8_t *channel, int64_t left, const int count, v16f *scale) {
    for (int i = 0; i < count; i++) {
        __m128i bytes = _mm_maskz_loadu_epi8(existing(left - i * 16), channel + i * 16);
        scale[i] = (v16f)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));  // e5m2: a half's upper byte
    }
}

// `transform_block` with `count` known to the compiler, which then keeps v in registers.
FAST_INLINE void transform_in_registers(const struct call *c, const v16f *scale, const char *x, int64_t start,
                                        const int count, v16f *v) {
    const int64_t left = c->w->in - start;
    if (left >= count * 16 && c->dtype == BFLOAT16)  // no masks, no branches
        for (int i = 0; i < count; i++) v[i] = (v16f)load_values(x, start + i * 16, 16, BFLOAT16) * scale[i];
    else
        for (int i = 0; i < count; i++) v[i] = (v16f)load_values(x, start + i * 16, left - i * 16, c->dtype) * scale[i];
    if (c->w->rotation == HADAMARD) walsh_hadamard(v, count);
    else if (c->w->rotation == QR) matrix_product(c->w->matrix, v, count * 16);
}

// Lane k: the largest lane of v[k], or the sum of its lanes.
#define REDUCE_FOUR(name, op)                                                                                      \
    FAST_INLINE __m128i name(const __m512i *v) {                                                                   \
        __m512i a = _mm512_##op(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));             \
        __m512i b = _mm512_##op(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));             \
        a = _mm512_##op(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));                                 \
        __m256i half = _mm256_##op(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));                    \
        return _mm_##op(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));                          \
    }
REDUCE_FOUR(reduce_max, max_epu32)
REDUCE_FOUR(reduce_add, add_epi32)

// 16 count values times `inverse`, rounded, as bytes at `to` in unpacking order. Returns sums of 4 of them. `rest`: v
// becomes what the rounding left over.
FAST_INLINE __m512i round_values(v16f *v, const int count, __m512 inverse, const __m512 *rest, const struct unpacking *u,
                                 char *to) {
    __m512i rounded[8], sum = _mm512_setzero_si512();
    for (int i = 0; i < count; i++) rounded[i] = _mm512_cvtps_epi32((__m512)v[i] * inverse);
    if (rest)
        for (int i = 0; i < count; i++) v[i] -= (v16f)(_mm512_cvtepi32_ps(rounded[i]) * *rest);
    for (int i = 0; i < count; i += 4) {
        __m512i low = _mm512_packs_epi32(rounded[i], rounded[i + 1]);
        __m512i high = count == 2 ? _mm512_setzero_si512() : _mm512_packs_epi32(rounded[i + 2], rounded[i + 3]);
        __m512i bytes = _mm512_packs_epi16(low, high);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes);
        bytes = _mm512_permutexvar_epi32(_mm512_loadu_si512(u->natural), bytes);
        if (u->bytes[1]) {  // any order but the natural one
            __m512i inside = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)u->bytes));
            bytes = _mm512_permutexvar_epi32(_mm512_loadu_si512(u->dwords), _mm512_shuffle_epi8(bytes, inside));
        }
        if (count == 2) _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(bytes));
        else _mm512_storeu_si512(to + i * 16, bytes);
    }
    return sum;
}

// `quantize_chunk` of four tokens straight into their COLUMNS: q, and at `at` bytes from it sx and, `chunks` floats
// further, -128 sum(q).
FAST_INLINE void quantize_columns(v16f v[4][8], const int from, const int count, const struct unpacking *u, char *const *q,
                                  int64_t at, int64_t chunks, float norm, int rest) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);  // as integers, magnitudes order like floats, NaN above all
    __m512i largest[4], sum[4];
    for (int k = 0; k < 4; k++) {
        largest[k] = _mm512_and_si512((__m512i)v[k][from], magnitude);
        for (int i = 1; i < count; i++)
            largest[k] = _mm512_max_epu32(largest[k], _mm512_and_si512((__m512i)v[k][from + i], magnitude));
    }
    const __m128 top = _mm_castsi128_ps(reduce_max(largest));
    const __mmask8 finite = _mm_cmp_ps_mask(top, _mm_set1_ps(INFINITY), _CMP_LT_OQ);
    const __mmask8 some = _mm_mask_cmp_ps_mask(finite, top, _mm_set1_ps(1e-30f), _CMP_GT_OQ);
    const __m128 inverse = _mm_maskz_div_ps(some, _mm_set1_ps(127), top);
    const __m128 scale = _mm_maskz_mul_ps(some, top, _mm_set1_ps(1.0f / 127));
    float each[4], sx[4];
    int32_t start[4];
    _mm_storeu_ps(each, scale);
    _mm_storeu_ps(sx, _mm_mask_mul_ps(_mm_set1_ps(NAN), finite, scale, _mm_set1_ps(norm)));
    for (int k = 0; k < 4; k++) {
        __m512 one = _mm512_broadcastss_ps(_mm_permutevar_ps(inverse, _mm_set1_epi32(k)));
        __m512 left = _mm512_set1_ps(each[k]);
        sum[k] = round_values(v[k] + from, count, one, rest ? &left : NULL, u, q[k] + from * 16);
    }
    _mm_storeu_si128((__m128i *)start, _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), reduce_add(sum)), 7));
    for (int k = 0; k < 4; k++) {
        float *to = (float *)(q[k] + at);
        to[0] = sx[k];
        memcpy(to + chunks, &start[k], 4);
    }
}

// One block of four tokens; those from `tokens` on repeat the last.
FAST_INLINE void block_columns(const struct call *c, int set, const struct unpacking *u, int64_t token, int64_t tokens,
                               int64_t start, float norm, const int count, const int chunk) {
    const struct tqw_weight *w = c->w;
    v16f scale[8], v[4][8];
    channel_scales(c->channel[set] + start, w->in - start, count, scale);
    for (int k = 0; k < 4; k++) {
        int64_t at = (token + smaller(k, tokens - 1)) * w->in;
        transform_in_registers(c, scale, (const char *)c->x + at * element_of(c), start, count, v[k]);
    }
    for (int64_t plane = 0; plane < c->planes; plane++) {
        char *q[4];
        for (int k = 0; k < 4; k++)
            q[k] = c->activations[set] + ((token + smaller(k, tokens - 1)) * c->planes + plane) * c->stride[set] + start;
        for (int i = 0; i < count; i += chunk) {
            int64_t at = w->padded - start + (start + i * 16) / (chunk * 16) * 4;
            quantize_columns(v, i, chunk, u, q, at, c->chunks, norm, plane + 1 < c->planes);
        }
    }
}

FAST static int columns_avx512(void *job, int64_t item) {
    const struct call *c = job;
    const struct tqw_weight *w = c->w;
    const float norm = w->rotation == HADAMARD ? 1 / sqrtf((float)w->block) : 1;
    int64_t token = item * COLUMNS_TOKENS, tokens = smaller(c->tokens - token, COLUMNS_TOKENS);
    for (int set = 0; set < c->sets; set++) {
        const struct unpacking *u = &unpacking_of_order[c->order[set]];
        for (int64_t start = 0; start < w->padded; start += w->block)
            switch (w->block + c->chunk / 32) {
#define CASE(block, chunk)                                                                  \
    case block + chunk / 32:                                                                \
        block_columns(c, set, u, token, tokens, start, norm, block / 16, chunk / 16); break;
                CASE(32, 32) CASE(64, 32) CASE(64, 64) CASE(128, 32) CASE(128, 64) CASE(128, 128)
#undef CASE
            }
    }
    return 0;
}

// ---- rows of the dense weight

// Levels of one row and pass, in order: int8[padded], whole tiles.
FAST_INLINE void expand_tiles(const struct tables *t, const int bits, const uint8_t *packed, int8_t *levels) {
    const int order = order_of(bits);
    for (int64_t tile = 0; tile < t->tiles; tile++, levels += t->tile) {
        __m512i out[2], v[2];
        decode(t, bits, packed, tile, out);
        __m128i *to = (__m128i *)levels;
        for (int f = 0; f < (order == 1 ? 1 : 2); f++) out[f] = _mm512_xor_si512(out[f], _mm512_set1_epi8(-128));
        if (order == 1) {
            _mm512_storeu_si512(to, out[0]);
        } else if (order == 2) {  // out[f] has codes 2 j + f
            v[0] = _mm512_unpacklo_epi8(out[0], out[1]), v[1] = _mm512_unpackhi_epi8(out[0], out[1]);
            const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi64(v[0], low, v[1]));
            _mm512_storeu_si512(to + 4, _mm512_permutex2var_epi64(v[0], high, v[1]));
        } else {  // the halves of out[f] have codes 4 j + 2 f and 4 j + 2 f + 1
            __m256i pair[2][2];
            for (int f = 0; f < 2; f++) {
                __m256i a = _mm512_castsi512_si256(out[f]), b = _mm512_extracti64x4_epi64(out[f], 1);
                pair[f][0] = _mm256_unpacklo_epi8(a, b), pair[f][1] = _mm256_unpackhi_epi8(a, b);
            }
            for (int i = 0; i < 4; i++) {
                __m256i a = pair[0][i / 2], b = pair[1][i / 2];
                __m256i four = i % 2 ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
                _mm_storeu_si128(to + i, _mm256_castsi256_si128(four));
                _mm_storeu_si128(to + 4 + i, _mm256_extracti128_si256(four, 1));
            }
        }
    }
}

FAST static void expand_tiles_of(const struct tables *t, int bits, const uint8_t *packed, int8_t *levels) {
    switch (bits) {
#define CASE(bits) case bits: expand_tiles(t, bits, packed, levels); break;
        CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8)
#undef CASE
    }
}

// What the rows of an item share, and one of them; each array holds all passes after one another.
struct dense_row {
    struct tables tables[MAX_PASSES];
    int64_t pitch;   // inputs of one pass: whole tiles
    float *channel;  // a, with the normalisation of H
    float *scale;    // of each 16 inputs
    int8_t *levels;
};

// Inputs start to start + 16 count of the row whose y starts at `at`.
FAST_INLINE void dense_block(const struct rows_call *c, const struct dense_row *r, int64_t start, int64_t at, const int count) {
    const struct tqw_weight *w = c->w;
    v16f sum[8], v[8];
    for (int64_t pass = 0; pass < w->passes; pass++) {
        const int64_t from = pass * r->pitch + start;
        for (int i = 0; i < count; i++) {
            __m512i level = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(r->levels + from + i * 16)));
            v[i] = (v16f)_mm512_cvtepi32_ps(level) * r->scale[from / 16 + i];
        }
        if (w->rotation == HADAMARD) walsh_hadamard(v, count);
        for (int i = 0; i < count; i++) {
            v[i] *= (v16f)_mm512_loadu_ps(r->channel + from + i * 16);
            sum[i] = pass ? sum[i] + v[i] : v[i];
        }
    }
    for (int i = 0; i < count; i++) store_values(c->y, at + start + i * 16, (__m512)sum[i], existing(w->in - start - i * 16), c->dtype);
}

FAST static void dense_blocks(const struct rows_call *c, const struct dense_row *r, int64_t at) {
    for (int64_t start = 0; start < c->w->padded; start += c->w->block) switch (c->w->block) {
#define CASE(block) case block: dense_block(c, r, start, at, block / 16); break;
            CASE(32) CASE(64) CASE(128)
#undef CASE
        }
}

FAST static int dense_avx512(void *job, int64_t item) {
    const struct rows_call *c = job;
    const struct tqw_weight *w = c->w;
    struct dense_row r = {.pitch = round_up(w->padded, 128)};
    const float norm = w->rotation == HADAMARD ? 1 / sqrtf((float)w->block) : 1;
    r.channel = malloc((size_t)(w->passes * r.pitch) * 6);
    if (!r.channel) return NO_MEMORY;
    r.scale = r.channel + w->passes * r.pitch;
    r.levels = (int8_t *)(r.scale + w->passes * r.pitch / 16);
    for (int64_t pass = 0; pass < w->passes; pass++) {
        make_tables(w, &w->pass[pass], &r.tables[pass]);
        v16f a;
        for (int64_t i = 0; i < w->padded; i += 16) {
            channel_scales(w->pass[pass].channel + smaller(i, w->in), w->in - i, 1, &a);
            _mm512_storeu_ps(r.channel + pass * r.pitch + i, (__m512)(a * norm));
        }
    }
    for (int64_t i = item * c->rows_per_item; i < smaller((item + 1) * c->rows_per_item, c->count); i++) {
        const int64_t row = c->ids ? c->ids[i] : i;
        for (int64_t pass = 0; pass < w->passes; pass++) {
            const struct tqw_pass *p = &w->pass[pass];
            expand_tiles_of(&r.tables[pass], (int)p->bits, p->packed + row * r.tables[pass].row_bytes, r.levels + pass * r.pitch);
            float *to = r.scale + pass * r.pitch / 16;
            for (int64_t g = 0; g < r.tables[pass].groups; g++)
                for (int64_t k = 0; k < w->group; k += 16) *to++ = half_to_float(p->scale[row * r.tables[pass].groups + g]);
        }
        dense_blocks(c, &r, i * w->in);
    }
    free(r.channel);
    return 0;
}

// ---- many tokens with AMX: T(x) and V rounded to bfloat16, float32 sums in the tiles from the first input to the last
//
// A tile takes 16 tokens' 32 inputs and multiplies them by 16 rows' 32 inputs, which lie as 16 pairs of inputs x 16 rows.
// Neither has a scale of its own, so nothing is added to y between chunks: with int8 and chunks of 64 that takes six times
// as long as the products. To decode a weight takes longer, as its scale is multiplied in and rounded. The order of
// summation depends on the inputs only, not on the other tokens or the items.

#define BF16_FAST __attribute__((target(AVX512_FEATURES ",avx512bf16,amx-tile,amx-bf16")))
#define BF16_INLINE BF16_FAST INLINE
#define TILE_BYTES 1024
#define BF16_BLOCK 640   // inputs: 32 decoded rows of them stay in the L1 cache
#define BF16_TOKENS 512  // whose sums of BF16_ROWS rows stay in the L2 cache
#define BF16_ROWS 256

// Inputs of a block, a multiple of PANEL_TILE: all blocks about as large.
INLINE int64_t bf16_block(int64_t padded) {
    return round_up((padded + (padded - 1) / BF16_BLOCK) / ((padded - 1) / BF16_BLOCK + 1), PANEL_TILE);
}

// Where 2 bytes of 32 inputs go, for the order in which decoding meets pairs of inputs (see `pair_of`).
static const uint16_t pairs_of_order[5][32] = {
    [2] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15, 16, 24, 17, 25, 18, 26, 19, 27, 20, 28, 21, 29, 22, 30, 23, 31},
    [4] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31},
};

// One block of a few tokens, which share its channel scales.
BF16_INLINE void block_bf16(const struct call *c, int set, int64_t token, int64_t tokens, int64_t start, float norm,
                            const int count) {
    const struct tqw_weight *w = c->w;
    const __m512i order = _mm512_loadu_si512(pairs_of_order[c->order[set]]);
    v16f scale[8], v[8];
    channel_scales(c->channel[set] + start, w->in - start, count, scale);
    for (int i = 0; i < count; i++) scale[i] *= norm;
    for (int64_t k = token; k < token + tokens; k++) {
        transform_in_registers(c, scale, (const char *)c->x + k * w->in * element_of(c), start, count, v);
        char *to = c->activations[set] + k / 16 * 16 * c->stride[set] + start / 32 * TILE_BYTES + k % 16 * 64;
        for (int i = 0; i < count; i += 2, to += TILE_BYTES) {
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[i + 1], (__m512)v[i]);
            _mm512_store_si512(to, _mm512_permutexvar_epi16(order, both));
        }
    }
}

BF16_FAST static int tokens_bf16(void *job, int64_t item) {
    const struct call *c = job;
    const struct tqw_weight *w = c->w;
    const float norm = w->rotation == HADAMARD ? 1 / sqrtf((float)w->block) : 1;
    int64_t token = item * COLUMNS_TOKENS, tokens = smaller(c->tokens - token, COLUMNS_TOKENS);
    for (int set = 0; set < c->sets; set++)
        for (int64_t start = 0; start < w->padded; start += w->block)
            switch (w->block) {
#define CASE(block) case block: block_bf16(c, set, token, tokens, start, norm, block / 16); break;
                CASE(32) CASE(64) CASE(128)
#undef CASE
            }
    return 0;
}

FAST_INLINE void transpose_pairs(__m512i v[8]) {  // 8 x 8 int64
    __m512i t[8];
    for (int i = 0; i < 8; i += 2) t[i] = _mm512_unpacklo_epi64(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi64(v[i], v[i + 1]);
    for (int i = 0; i < 2; i++) {
        __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 2], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 2], 0xdd);
        __m512i d = _mm512_shuffle_i32x4(t[i + 4], t[i + 6], 0x88), e = _mm512_shuffle_i32x4(t[i + 4], t[i + 6], 0xdd);
        v[i] = _mm512_shuffle_i32x4(a, d, 0x88), v[i + 4] = _mm512_shuffle_i32x4(a, d, 0xdd);
        v[i + 2] = _mm512_shuffle_i32x4(b, e, 0x88), v[i + 6] = _mm512_shuffle_i32x4(b, e, 0xdd);
    }
}

// The scales of one group for 16 rows, each for two lanes. Rows past the end repeat.
FAST_INLINE void scale_pairs(const uint16_t *from, int64_t groups, int64_t rows, __m512 scale[2]) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    uint16_t half[16];
    for (int64_t r = 0; r < 16; r++) half[r] = from[smaller(r, rows - 1) * groups];
    __m512 each = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)half));
    scale[0] = _mm512_permutexvar_ps(twice, each);
    scale[1] = _mm512_permutexvar_ps(_mm512_add_epi32(twice, _mm512_set1_epi32(8)), each);
}

// Codes lie in int64s of which the two int32s hold the two inputs of a pair. Pair `i` of int64 `q` of decoded vector `f`
// is pair `pair_of` of the tile's 64, 16 to a unit of 32 inputs.
INLINE int pair_of(int order, int f, int q, int i) {
    return order == 4 ? q % 4 * 16 + i * 4 + f * 2 + q / 4 : q * 8 + i * 2 + f;
}

// Codes of 16 rows and one tile of 128 inputs -> scale * level as bfloat16, panel[unit of 32 inputs][16 pairs][16 rows][2],
// units 2 TILE_BYTES apart.
BF16_INLINE void decode_bf16(const struct tables *t, const int bits, const struct tqw_pass *p, __m512 table, int64_t row,
                             int64_t rows, int64_t tile, uint8_t *panel) {
    const int order = order_of(bits);
    const int64_t units = smaller(t->padded - tile * PANEL_TILE, PANEL_TILE) / 32;
    const uint8_t *packed = p->packed + row * t->row_bytes;
    __m512i v[2][16];
    for (int64_t r = 0; r < 16; r++) {
        const uint8_t *mine = packed + smaller(r, rows - 1) * t->row_bytes;
        _mm_prefetch((const char *)mine + 32 * t->row_bytes + tile * 16 * bits, _MM_HINT_T1);  // what comes next
        if (bits == 4) {
            v[0][r] = load512(mine + tile * 64, units * 16);
        } else {
            __m512i w[2];
            decode(t, bits, mine, tile, w);
            v[0][r] = w[0], v[1][r] = w[1];
        }
    }
    for (int f = 0; f < (bits == 4 ? 1 : 2); f++) transpose_pairs(v[f]), transpose_pairs(v[f] + 8);
    __m512 scale[2] = {0}, offset[2] = {0};
    int64_t group = -1;
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t mine = (tile * PANEL_TILE + unit * 32) / t->group;
        if (mine != group) {
            scale_pairs(p->scale + row * t->groups + (group = mine), t->groups, rows, scale);
            for (int j = 0; j < 2; j++) offset[j] = _mm512_mul_ps(scale[j], _mm512_set1_ps(-128));
        }
        uint8_t *to = panel + unit * 2 * TILE_BYTES;
        if (bits == 4) {
            for (int64_t q = 2 * unit; q < 2 * unit + 2; q++)
                for (int i = 0; i < 8; i++, to += 64) {  // the lowest 4 bits of a lane pick its level
                    __m512 low = _mm512_permutexvar_ps(_mm512_srli_epi32(v[0][q], 4 * i), table);
                    __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(v[0][q + 8], 4 * i), table);
                    low = _mm512_mul_ps(low, scale[0]), high = _mm512_mul_ps(high, scale[1]);
                    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
                }
        } else {  // bytes level + 128; (level + 128) * scale - 128 * scale is exact in float32
            const __m512i byte = _mm512_set1_epi32(255);
            for (int f = 0; f < 2; f++)
                for (int half = 0; half < 2; half++) {
                    const int64_t q = order == 4 ? half * 4 + unit : 2 * unit + half;
                    for (int i = 0; i < 4; i++) {
                        __m512i a = _mm512_and_si512(_mm512_srli_epi32(v[f][q], 8 * i), byte);
                        __m512i b = _mm512_and_si512(_mm512_srli_epi32(v[f][q + 8], 8 * i), byte);
                        __m512 low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), scale[0], offset[0]);
                        __m512 high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), scale[1], offset[1]);
                        _mm512_store_si512(to + pair_of(order, f, (int)q, i) % 16 * 64,
                                           (__m512i)_mm512_cvtne2ps_pbh(high, low));
                    }
                }
        }
    }
}

// The 32 rows from `row` on of BF16_BLOCK inputs: panel[unit][2][TILE_BYTES].
BF16_INLINE void decode_rows(const struct tables *t, const int bits, const struct tqw_pass *p, int64_t row, int64_t rows,
                             int64_t first, int64_t end, uint8_t *panel) {
    const __m512 table = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p->levels)));
    for (int64_t k = first; k < end; k += PANEL_TILE, panel += PANEL_TILE / 32 * 2 * TILE_BYTES)
        for (int j = 0; j * 16 < rows; j++)
            decode_bf16(t, bits, p, table, row + j * 16, rows - j * 16, k / PANEL_TILE, panel + j * TILE_BYTES);
}

// x passes by the L1 cache (`stream`), where the panel stays: 1.3 times as fast.
// y[16 tokens of each half][32: 16 rows of each column] += or (first) = `units` units of 32 inputs.
BF16_INLINE void multiply_bf16(const char *x, int64_t next_half, const uint8_t *panel, int64_t units, const int first,
                               const int halves, const int columns, float *y) {
    float *const low = y, *const high = y + 16 * 32;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!first) {
        _tile_loadd(0, low, 128);
        if (columns == 2) _tile_loadd(1, low + 16, 128);
        if (halves == 2) _tile_loadd(2, high, 128);
        if (halves == 2 && columns == 2) _tile_loadd(3, high + 16, 128);
    }
    for (int64_t unit = 0; unit < units; unit++, x += TILE_BYTES, panel += 2 * TILE_BYTES) {
        _tile_stream_loadd(4, x, 64);
        _tile_loadd(6, panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (columns == 2) _tile_loadd(7, panel + TILE_BYTES, 64);
        if (columns == 2) _tile_dpbf16ps(1, 4, 7);
        if (halves == 2) _tile_stream_loadd(5, x + next_half, 64);
        if (halves == 2) _tile_dpbf16ps(2, 5, 6);
        if (halves == 2 && columns == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, low, 128);
    if (columns == 2) _tile_stored(1, low + 16, 128);
    if (halves == 2) _tile_stored(2, high, 128);
    if (halves == 2 && columns == 2) _tile_stored(3, high + 16, 128);
}

BF16_FAST static void multiply_any(const char *x, int64_t next_half, const uint8_t *panel, int64_t units, int first,
                                   int halves, int columns, float *y) {
    switch (first * 4 + (halves - 1) * 2 + columns - 1) {
#define CASE(first, halves, columns)                                                              \
    case first * 4 + (halves - 1) * 2 + columns - 1:                                              \
        multiply_bf16(x, next_half, panel, units, first, halves, columns, y); break;
        CASE(0, 1, 1) CASE(0, 1, 2) CASE(0, 2, 1) CASE(0, 2, 2) CASE(1, 1, 1) CASE(1, 1, 2) CASE(1, 2, 1) CASE(1, 2, 2)
#undef CASE
    }
}

// y[panel of 32 rows, `pitch` floats each][tokens][32] + bias -> the outputs of `rows` rows, token by token: those
// of the next token are as far away as memory goes from row to row.
BF16_INLINE void finish_rows(const struct call *c, int64_t token, int64_t tokens, int64_t row, int64_t rows, const int dtype,
                             const float *y, int64_t pitch) {
    float bias[BF16_ROWS] = {0};
    for (int64_t r = 0; c->bias && r < rows; r++) bias[r] = load_one(c->bias, row + r, c->bias_dtype);
    for (int64_t i = 0, at = token * c->w->out + row; i < tokens; i++, y += 32, at += c->w->out)
        for (int64_t r = 0; r < rows; r += 32) {
            const float *from = y + r / 32 * pitch;
            const __m512 low = _mm512_add_ps(_mm512_load_ps(from), _mm512_loadu_ps(bias + r));
            const __m512 high = _mm512_add_ps(_mm512_load_ps(from + 16), _mm512_loadu_ps(bias + r + 16));
            if (dtype == BFLOAT16 && rows - r >= 32) {
                _mm512_storeu_si512((uint16_t *)c->y + at + r, (__m512i)_mm512_cvtne2ps_pbh(high, low));
                continue;
            }
            store_values(c->y, at + r, low, existing(rows - r), dtype);
            if (rows - r > 16) store_values(c->y, at + r + 16, high, existing(rows - r - 16), dtype);
        }
}

BF16_FAST static void finish_bf16(const struct call *c, int64_t token, int64_t tokens, int64_t row, int64_t rows,
                                  const float *y, int64_t pitch) {
    switch (c->dtype) {
#define CASE(dtype) case dtype: finish_rows(c, token, tokens, row, rows, dtype, y, pitch); break;
        CASE(FLOAT32) CASE(BFLOAT16) CASE(FLOAT16)
#undef CASE
    }
}

// y += or (is_first) = 32 rows times the inputs `from` .. `to` of one pass.
BF16_FAST static void block_product(const struct call *c, int set, int64_t from, int64_t to, int is_first, int64_t rows,
                                    int64_t token, int64_t tokens, const uint8_t *panel, float *y) {
    const int64_t stride = c->stride[set], units = (to - from) / 32;
    const char *x = c->activations[set] + token * stride + from / 32 * TILE_BYTES;
    for (int64_t i = 0; i < tokens; i += 32, y += 1024)
        multiply_any(x + i * stride, 16 * stride, panel, units, is_first, tokens - i > 16 ? 2 : 1, rows > 16 ? 2 : 1, y);
}

// All rows of a part, first one block of the inputs, then the next: T(x) of a block then stays near.
BF16_FAST static void rows_bf16(const struct call *c, const struct tables *tables, int64_t row, int64_t rows, int64_t token,
                                int64_t tokens, uint8_t *panel, float *y) {
    const int64_t padded = c->w->padded, passes = c->w->passes, block = bf16_block(padded), pitch = round_up(tokens, 32) * 32;
    for (int64_t pass = 0; pass < passes; pass++)
        for (int64_t first = 0; first < padded; first += block)
            for (int64_t r = 0; r < rows; r += 32) {
                const struct tqw_pass *p = &c->w->pass[pass];
                const int64_t end = smaller(first + block, padded), some = smaller(rows - r, 32);
                switch (p->bits) {
#define CASE(bits) case bits: decode_rows(&tables[pass], bits, p, row + r, some, first, end, panel); break;
                    CASE(2) CASE(3) CASE(4) CASE(5)
#undef CASE
                }
                block_product(c, c->set_of_pass[pass], first, end, pass == 0 && first == 0, some, token, tokens, panel,
                              y + r / 32 * pitch);
            }
    finish_bf16(c, token, tokens, row, rows, y, pitch);
}

BF16_FAST static int panels_bf16(void *job, int64_t item) {
    const struct call *c = job;
    struct tables tables[MAX_PASSES];
    for (int64_t pass = 0; pass < c->w->passes; pass++) make_tables(c->w, &c->w->pass[pass], &tables[pass]);
    const struct part p = part_of(c, item);
    const int64_t tokens = smaller(p.last - p.token, BF16_TOKENS), rows = smaller(p.end - p.row, BF16_ROWS);
    const size_t panel = (size_t)bf16_block(c->w->padded) * 32 * 2;
    uint8_t *memory = aligned_alloc(64, panel + (size_t)(round_up(tokens, 32) * round_up(rows, 32)) * 4);
    if (!memory) return NO_MEMORY;
    tiles_begin();
    for (int64_t t = p.token; t < p.last; t += BF16_TOKENS)
        for (int64_t r = p.row; r < p.end; r += BF16_ROWS)
            rows_bf16(c, tables, r, smaller(p.end - r, BF16_ROWS), t, smaller(p.last - t, BF16_TOKENS), memory,
                      (float *)(memory + panel));
    tiles_end();
    free(memory);
    return 0;
}
