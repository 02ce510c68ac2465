// T(x) and V in 8 bits, for the products of middle.cu and prompt.cu. After wgmma.cu.
//
// The inputs are divided into SPREAD parts. T(x) is int8 with one scale for each token and part, V with one for each row
// and part, the largest of its weight scales (row_scale): a table for each row and group, made on the way, has level *
// weight_scale / row_scale in steps of 1/127 of the largest level. So one int32 sum runs over a part, and nothing is
// scaled before the end: int32 sums are in registers, which the tensor cores read and write for each product, so that to
// scale them for each tile takes as long as the products.
//
//     |y - exact| <= sum_k (|dx| |V| + |T(x)| |dV| + |dx| |dV|),  dx <= max |T(x)| / 254,  dV <= 9/8 row_scale LARGEST / 254
//
// (a rounding of the scale to fp16, by at most 2^-11 of 127 steps, makes half a step 9/16).
//
// In memory T(x) has COLUMNS rows of 128 bytes for each tile, in which lane t of a quad has bytes 32 s + 4 t and
// 32 s + 16 + 4 t of the s-th k32 (chunks of 16 swizzled). prompt.cu has an order and a tqw_spread of its own.
//
// COLUMNS    tokens that are side by side       SPREAD    parts of the inputs       SPREAD_THREADS    of a CTA of tqw_spread

static_assert(TILE == 128 && PASSES == 1 && ROTATE, "a tile is 128 inputs, rotated");
static constexpr int WIDTH = WIDTHS[0], SECOND = words_of(WIDTH, 0);

// Eight values times a scale, of at most 127, rounded: those that come first (i = 0) or last.
__device__ __forceinline__ u32 in_8_bits(const float (&v)[8], int i, float scale) {
  float four[4];
  int n[4];
  half_of_eight(v, i, four);
#pragma unroll
  for (int j = 0; j < 4; j++) n[j] = __float_as_int(fmaf(four[j], scale, __int_as_float(MAGIC)));  // n is in the lower byte
  return lower_bytes(n);
}

// The largest weight scales of two rows, for tiles [begin, end), by the lanes of a quad.
__device__ __forceinline__ void row_scales(const Params& p, i64 row0, i64 row1, int begin, int end, int t, float* most) {
  most[0] = most[1] = 0.f;
  int last = (end * TILE - 1) / GROUP;
#pragma unroll 8
  for (int group = begin * TILE / GROUP + t; group <= last; group += 4) {
    most[0] = fmaxf(most[0], fabsf(half_to_float(p.scale[0][row0 * GROUPS + group])));
    most[1] = fmaxf(most[1], fabsf(half_to_float(p.scale[0][row1 * GROUPS + group])));
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], bit));
  }
}

__device__ __forceinline__ float most_of_eight(const float (&v)[8], float most) {
#pragma unroll
  for (int i = 0; i < 8; i++) most = max_or_nan(most, fabsf(v[i]));
  return most;
}

// Of a token from its largest T(x) / NORM: T(x) = scale n, n = T(x) / NORM * inverse. A NaN or Inf makes the scale NaN
// and so every output of the token.
struct TokenScale {
  float scale, inverse;
};
__device__ __forceinline__ TokenScale token_scale(float most) {
  return {fmaf(most, NORM / 127, most - most), most > 0.f ? __fdividef(127.f, most) : 0.f};
}

#if !PROMPT
static constexpr int PART = (TILES + SPREAD - 1) / SPREAD * TILE;  // inputs of a part, at most

// T(x) of one token, or of a part of its inputs; with EXPERTS once for each of its pairs. x is read once.
extern "C" __global__ void __launch_bounds__(SPREAD_THREADS) tqw_spread(const __grid_constant__ Params p) {
  constexpr int STRIDE = 8 * SPREAD_THREADS, ROUNDS = (PART + STRIDE - 1) / STRIDE, KEPT = ROUNDS < 8 ? ROUNDS : 8;
  int part = blockIdx.x % SPREAD, lane = threadIdx.x & 31, t = lane / 4 % 4;
  int first = TILES * part / SPREAD * TILE + threadIdx.x * 8, end = TILES * (part + 1) / SPREAD * TILE;
  i64 token = blockIdx.x / SPREAD;
  auto input = [&](int r) {  // the lane's first one of a round
    int k = first + r * STRIDE;
    return k < end ? k : IN_PADDED;
  };
  allow_next_kernel();
  uint2 channel[KEPT];
  float v[KEPT][8], most = 0.f;
#pragma unroll
  for (int r = 0; r < KEPT; r++) channel[r] = channel_bytes(p, input(r));
  wait_for_previous_kernel();
#if APART
  clear_counts(p, blockIdx.x * SPREAD_THREADS + threadIdx.x, p.tokens * SPREAD * SPREAD_THREADS);
#endif
#pragma unroll
  for (int r = 0; r < KEPT; r++) scaled_inputs(p, token, input(r), channel[r], v[r]);
#pragma unroll
  for (int r = 0; r < KEPT; r++) hadamard_sums(v[r], lane), most = most_of_eight(v[r], most);
#pragma unroll 1
  for (int r = KEPT; r < ROUNDS; r++) {  // the rest is read again
    float w[8];
    scaled_inputs(p, token, input(r), w);
    hadamard_sums(w, lane), most = most_of_eight(w, most);
  }
  most = most_of_warps<SPREAD_THREADS / 32>(most);
  TokenScale of_token = token_scale(most);
  // Eight inputs in 8 bits; of a quad's neighbours t and t ^ 1 one takes all lower words, one the upper ones.
  auto rounded = [&](const float (&v)[8]) {
    u32 low = in_8_bits(v, 0, of_token.inverse), high = in_8_bits(v, 1, of_token.inverse);
    u32 other = __shfl_xor_sync(~0u, t & 1 ? low : high, 4);
    return t & 1 ? make_uint2(other, high) : make_uint2(low, other);
  };
  uint2 bytes[KEPT];
#pragma unroll
  for (int r = 0; r < KEPT; r++) bytes[r] = rounded(v[r]);
  int columns = (p.tokens + COLUMNS - 1) / COLUMNS * COLUMNS;
  auto store_column = [&](int column) {
    if (threadIdx.x == 0) p.plane_scale[part * columns + column] = of_token.scale;
    u8* block = p.planes + (i64)(column / COLUMNS) * TILES * STAGE_BYTES + column % COLUMNS * 128 + t / 2 * 8;
    auto store = [&](uint2 bytes, int k) {
      int chunk = k % 32 / 8 * 2 + (t & 1) ^ column & 7;
      if (k < end) *(uint2*)(block + k / TILE * STAGE_BYTES + chunk * 16) = bytes;
    };
#pragma unroll
    for (int r = 0; r < KEPT; r++) store(bytes[r], input(r));
#pragma unroll 1
    for (int r = KEPT; r < ROUNDS; r++) {
      float w[8];
      scaled_inputs(p, token, input(r), w);
      hadamard_sums(w, lane), store(rounded(w), input(r));
    }
  };
#if EXPERTS
  for (i64 pair = token * p.choices; pair < (token + 1) * p.choices; pair++) {
    int column = p.column[pair];
    if (column < 0)
      clear_outputs(p, pair);
    else
      store_column(column);
  }
#else
  store_column((int)token);  // a token is its own column
#endif
}
#endif

// ---------------------------------------------------------------------------------------------------- V in 8 bits

// With one scale to a row levels stay as they are; else the largest becomes 127.
static constexpr int LARGEST = level(WIDTH, (1 << WIDTH) - 1);
static constexpr float LIFT = GROUPS == 1 ? 1.f : 127.f / LARGEST;

// Steps of V of a row in the unit of its levels and weight scales: their number for 1, and the size of one.
__device__ __forceinline__ float steps_of_row(float row_scale) { return row_scale > 0.f ? LIFT / row_scale : 0.f; }
// Of a level in a group, in fp16, twice.
__device__ __forceinline__ u32 steps_of_level(float steps_of_row, u16 weight_scale) {
  u32 steps;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(steps) : "f"(steps_of_row * half_to_float(weight_scale)));
  return steps;
}
// 1536 + level steps, rounded: n in the lower byte. levels: in fp16, two.
__device__ __forceinline__ u32 in_steps(u32 levels, u32 steps) { return half2_fma(levels, steps, half2_of(1536)); }

// Codes of 6 and 8 bits become levels that are then scaled; for fewer a table of scaled levels is made for each group.
#if BITS >= 6
struct LaneLevels {};
struct RowLevels {
  u32 steps;  // of a level, in the row's group
};
__device__ __forceinline__ LaneLevels lane_levels(int t) { return {}; }
__device__ __forceinline__ RowLevels row_levels() { return {}; }
__device__ __forceinline__ void set_group(RowLevels& row, const LaneLevels& mine, u32 steps) { row.steps = steps; }
// V of the eight inputs of a step.
__device__ __forceinline__ void decode_row(const LaneLevels&, const RowLevels& row, const u32* codes, int step, u32& a, u32& b) {
#if BITS == 8
  auto scaled = [&](u32 biased, int upper) { return in_steps(half2_of_biased(biased, upper), row.steps); };
  auto four = [&](u32 biased) { return permute(scaled(biased, 0), scaled(biased, 1), 0x6420); };
  a = four(codes[2 * step]), b = four(codes[2 * step + 1]);  // codes are biased levels
#else
  u32 v[4];
  levels_of_pairs<WIDTH>(codes, codes + SECOND, step, v);
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = in_steps(half2_subtract(v[i], half2_of(1536)), row.steps);
  lower_bytes_of_pairs(v, a, b);
#endif
}
#else
struct RowLevels {  // of the row's group
  u32 words[1 << (WIDTH - 2)], keep;
  template <int FIRST>
  __device__ __forceinline__ u32 word() const {
    return words[FIRST / 4];
  }
};
// Lanes of a quad whose inputs are of one group make its table together: each the words t, t + TOGETHER, ...
static constexpr int WORDS = 1 << (WIDTH - 2), TOGETHER = WORDS < 4 / SUBS ? WORDS : 4 / SUBS;
struct LaneLevels {
  u32 level[WORDS / TOGETHER][2];  // in fp16, two and two
};
template <int FIRST>
__device__ __forceinline__ void keep_levels(LaneLevels& mine, int t) {
  if (FIRST / 4 % TOGETHER == t % TOGETHER) {
    u32 word = table_word<WIDTH, FIRST>();
#pragma unroll
    for (int i = 0; i < 2; i++) mine.level[FIRST / 4 / TOGETHER][i] = half2_of_biased(word ^ BIAS, i);
  }
  if constexpr (FIRST + 4 < 1 << WIDTH) keep_levels<FIRST + 4>(mine, t);
}
__device__ __forceinline__ LaneLevels lane_levels(int t) {
  LaneLevels mine;
  keep_levels<0>(mine, t);
  return mine;
}
__device__ __forceinline__ RowLevels row_levels() {
  return {{}, Levels<WIDTH>::keep ^ threadIdx.z};  // in a register that the compiler cannot take for a constant
}
__device__ __forceinline__ void set_group(RowLevels& row, const LaneLevels& mine, u32 steps) {
#pragma unroll
  for (int j = 0; j < WORDS; j += TOGETHER) {
    const u32* level = mine.level[j / TOGETHER];
    u32 word = permute(in_steps(level[0], steps), in_steps(level[1], steps), 0x6420);
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) row.words[j + i] = __shfl_sync(~0u, word, i, 4 / SUBS);
  }
}
// V of the eight inputs of a step.
__device__ __forceinline__ void decode_row(const LaneLevels&, const RowLevels& row, const u32* codes, int step, u32& a, u32& b) {
  decode<WIDTH, EVENS_FIRST>(row, codes, codes + SECOND, step, a, b);
}
#endif
