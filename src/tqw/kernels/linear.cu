// y = T(x) V^T + b for packed codes, one launch: T(x) = H (a * x), V[n,k] = weight_scale[n, k / G] * level[code[n,k]].
//
// Compiled at run time by NVRTC, one module for each set of the macros below (cuda_plan.py sets them), without any header.
//
// Arithmetic. T(x) is held as fixed point with one scale for each token and tile of TILE inputs: 16 bits in two int8
// planes, T(x) = s (256 high + low), or 8 bits in one. Weights are the A operand of mma.m16n8k32 (int8, exact int32
// sums); the planes of one token are neighbouring columns of B, so one lane holds both sums and 256 high + low is local.
// One fp32 multiply-add for each (row, token, tile) applies weight_scale * s. Codes become int8 levels by byte permutes.
//
// Layout. The stored row-major bytes are read as they are. A tile is TILE inputs, a weight scale for SUB of them; lane t
// of a quad covers their codes [t SUB/4, (t+1) SUB/4), eight for each mma step, so the k order of the mma is a
// permutation of the inputs that is the identity within a lane, but for the order of eight (EVENS_FIRST).
//
// BITS       widths of the passes, e.g. 4,4          PASSES    how many
// TILE       32 | 64 | 128                           BLOCK     rotation block 32 | 64 | 128
// ROTATE     0 none, 1 Hadamard                      SCALED    0: a = 1
// X_TYPE     of x and y: 0 float32, 1 float16, 2 bfloat16
// PLANES     of T(x): 2, or 1 with less work for many tokens
// NT         columns tiles of 8 / PLANES tokens      FUSED     1: of one token in the product; 0: tqw_transform comes first
// IN_PADDED, GROUP   padded number of inputs, inputs of one weight scale
// CLUSTER, SPLIT     CTAs of a cluster: 1, 2, 4; as many, which share the inputs, or 1: all have all (1, 1 before sm_90)
// WARPS, SHARE       warps of a CTA, and those of them that share a strip's tiles: one takes share, share + SHARE, ...
// TURN_TILES         tiles side by side that a warp takes at once: 1 or 2
// RING, EARLY        turns whose codes a warp has on their way, and those that it asks for before x
// UNROLL             turns side by side in the loop: its instructions should fit in their cache
// HALVES             1: 4-bit codes as a sum of two products (fewer instructions for few tokens)
// MIN_CTAS           CTAs of one multiprocessor: 2 lets the next kernel fetch its codes while this one ends
// SMALL              1: fewer than 16 outputs
// EXPERTS            1: stacked weights, row i of y is a token by expert ids[i]: decode takes one row for each
//                    blockIdx.y, middle.cu blocks of rows that have the same expert

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Params {
  const void* x;        // [tokens, in], rows x_stride elements apart
  const u8* channel;    // [in] e5m2
  const void* bias;     // [out] in the type of x, or null
  void* y;              // [tokens, out]
  const u8* packed[4];  // [out, in_padded * bits / 8] for each pass
  const u16* scale[4];  // fp16 [out, groups]
  u8* planes;           // T(x), made by a kernel before this one
  float* plane_scale;   // its scales
  const i64* ids;       // rows to read instead of 0, 1, ... (dequantize)
  i64 x_stride;
  i64 first_row;        // dequantize, PROMPT: first row of the slice
  int tokens, out, in, vectors, batch;
  int experts, choices;  // EXPERTS: weights stacked in `packed`, rows of y for each row of x
  int arrivals;          // APART, PROMPT: counters in `arrived`
  int* arrived;          // for each tile, how many CTAs have left their sums; PROMPT: strips of V, asked for and decoded
  float4* parts;         // these sums
  u8* rows;              // PROMPT: V of a slice of rows
  float* row_scale;      // [out] the largest weight scale of each row
  i64 slice;             // rows of the slice
#if EXPERTS && defined(COLUMNS)
  int blocks;   // places for blocks of at most COLUMNS pairs (token, expert) of one expert
  int2* block;  // [blocks] expert and number of pairs, 0 where there is no block
  int* pair;    // [blocks, COLUMNS] the pairs of a block
  int* column;  // [pairs] where among these the pair stands, -1: its expert does not exist
#endif
};

static constexpr int WIDTHS[PASSES] = {BITS};
__host__ __device__ constexpr bool at_most(int bits) {
  for (int width : WIDTHS)
    if (width > bits) return false;
  return true;
}
static constexpr int LANE = TILE / 4;    // codes of one lane in one tile and row
static constexpr int STEPS = TILE / 32;  // mma steps of one tile
// Of each eight inputs T(x) in 8 bits has the even ones first: in this order codes of 2 and 3 bits become levels.
static constexpr bool EVENS_FIRST = at_most(3);
static constexpr int SUB = GROUP < TILE ? GROUP : TILE, SUBS = TILE / SUB;  // inputs of a tile with one weight scale
static_assert(SUBS == 1 || TILE == 128, "a tile is one group, a part of one, or two or four groups");

__host__ __device__ constexpr int plane_width(int bits, int plane) {
  return plane == 0 ? (bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits) : bits == 6 ? 2 : 1;
}
__host__ __device__ constexpr int plane_count(int bits) { return bits == 3 || bits == 5 || bits == 6 ? 2 : 1; }

// ---------------------------------------------------------------------------------------------- small instructions

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ u16 float_to_bfloat(float f) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
// An input, output or bias of 16 bits.
__device__ __forceinline__ float value_16(u16 bits) {
  return X_TYPE == 1 ? half_to_float(bits) : __uint_as_float((u32)bits << 16);
}
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
__device__ __forceinline__ void multiply(int* c, const u32* a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// a & mask | bits in one instruction: at most one of its constants can be immediate, so `bits` is a register.
__device__ __forceinline__ u32 mask_or(u32 a, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}
// (a | b) & mask, likewise.
__device__ __forceinline__ u32 or_mask(u32 a, u32 b, u32 mask) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xA8;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Programmatic dependent launch: weights are constants, so they are fetched while the kernel before still runs.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In this order the kernel after the next takes no place that the next needs: it counts where every multiprocessor has
// one CTA (decode). Kernels that only prepare x for the next one let it in first.
__device__ __forceinline__ void take_over() {
  wait_for_previous_kernel();
  allow_next_kernel();
}

// ------------------------------------------------------------------------------------------------- codes to levels

__host__ __device__ constexpr int level(int bits, int code) {
  constexpr signed char two[] = {LEVELS_2}, three[] = {LEVELS_3}, four[] = {LEVELS_4}, five[] = {LEVELS_5},
                        six[] = {LEVELS_6};
  if (bits == 8) return code - 128;
  return bits == 2 ? two[code] : bits == 3 ? three[code] : bits == 4 ? four[code] : bits == 5 ? five[code] : six[code];
}
// Four levels of a table, from code `first` on, as the bytes of one register.
template <int B, int FIRST>
__host__ __device__ constexpr u32 table_word() {
  constexpr u32 word = (u32)(u8)level(B, FIRST) | (u32)(u8)level(B, FIRST + 1) << 8 |
                       (u32)(u8)level(B, FIRST + 2) << 16 | (u32)(u8)level(B, FIRST + 3) << 24;
  return word;
}
// Bits 0..7 of b to bits 2, 6, ..., others are left. Products, since shifts keep the unit busy that permutes.
__device__ __forceinline__ u32 spread_by_four(u32 b) {
  u32 x = b * 0x1001u & 0x000F000Fu;
  x = x * 0x41u & 0x03030303u;
  return x * 0x24u;
}
// The levels themselves, as a table for `decode`.
template <int B>
struct Levels {
  static constexpr u32 keep = 0x32103210u;
  template <int FIRST>
  __device__ __forceinline__ u32 word() const {
    return table_word<B, FIRST>();
  }
};
// table[FIRST + code] of four codes: `low` has their bits 0..2 as nibbles, `top` picks by bit 3.
template <int FIRST, typename Table>
__device__ __forceinline__ u32 look_up_16(const Table& table, u32 low, u32 top) {
  return permute(permute(table.template word<FIRST>(), table.template word<FIRST + 4>(), low),
                 permute(table.template word<FIRST + 8>(), table.template word<FIRST + 12>(), low), top);
}

__device__ __forceinline__ u32 half2_fma(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 half2_subtract(u32 a, u32 b) {
  u32 d;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// An fp16, twice: a normal number of at most eleven bits.
__host__ __device__ constexpr u32 half2_of(double value) {
  double magnitude = value < 0 ? -value : value;
  int exponent = 25;
  for (; magnitude < 1024; magnitude *= 2) exponent--;
  for (; magnitude >= 2048; magnitude /= 2) exponent++;
  return ((u32)(value < 0) << 15 | (u32)exponent << 10 | ((u32)magnitude & 1023)) * 0x10001u;
}
static constexpr u32 BIAS = 0x80808080u;  // makes levels + 128 of int8 levels
// Two of four biased levels in fp16, the lower ones or the upper ones: 0x6400 | byte is 1024 + byte.
__device__ __forceinline__ u32 half2_of_biased(u32 biased, int upper) {
  return half2_subtract(permute(biased, 0x64646464u, upper ? 0x4342 : 0x4140), half2_of(1024 + 128));
}
// 1536 + level, in fp16, of two codes of 5 or 6 bits, whose lower and upper bits are, among others, at PLACE and PLACE + 4 of
// two halves. Operations of integers, by which a table is read, have half the throughput of those of fp16, so u g(u^2 - 1/2) is
// computed, u = (2 code + 1) / 2^B - 1: rounded to an integer it is the level of every code (tests/test_cuda.py).
template <int B, int PLACE>
__device__ __forceinline__ u32 level_by_polynomial(u32 lower, u32 upper) {
  constexpr u16 five[] = {POLYNOMIAL_5}, six[] = {POLYNOMIAL_6};
  constexpr int DEGREE = (B == 5 ? sizeof five : sizeof six) / 2 - 1;
  constexpr u32 LOWER = 0x000F000Fu << PLACE, UPPER = (B == 5 ? 0x00100010u : 0x00300030u) << PLACE;
  constexpr double HALF = 1 << (B - 1), STEP = 1. / (1 << PLACE);
  constexpr u32 SCALE = half2_of(STEP / HALF), MIDDLE = half2_of((0.5 - HALF - 1024 * STEP) / HALF);
  u32 code = mask_or(upper, UPPER, mask_or(lower, LOWER, 0x64006400u));  // 1024 + code / STEP
  u32 u = half2_fma(code, SCALE, MIDDLE), z = half2_fma(u, u, half2_of(-0.5));
  u32 g = (B == 5 ? five[DEGREE] : six[DEGREE]) * 0x10001u;
#pragma unroll
  for (int i = DEGREE - 1; i >= 0; i--) g = half2_fma(g, z, (B == 5 ? five[i] : six[i]) * 0x10001u);
  return half2_fma(u, g, half2_of(1536));
}
// Of eight consecutive codes: v[i] of the codes i and i + 4; a level is in the lower byte.
template <int B>
__device__ __forceinline__ void levels_of_pairs(const u32* first, const u32* second, int step, u32* v) {
  u32 q = first[step];
  if constexpr (B == 5) {
    u32 upper = permute(second[step / 4], 0, 0x4440 + step % 4) * 0x00020020u;
    v[0] = level_by_polynomial<B, 1>(q << 1, upper), v[1] = level_by_polynomial<B, 2>(q >> 2, upper);
    v[2] = level_by_polynomial<B, 3>(q >> 5, upper), v[3] = level_by_polynomial<B, 4>(q >> 8, upper);
  } else {
    u32 upper = permute(second[step / 2], 0, step % 2 ? 0x4342 : 0x4140);
    v[0] = level_by_polynomial<B, 1>(q << 1, upper << 5), v[1] = level_by_polynomial<B, 3>(q >> 1, upper << 5);
    v[2] = level_by_polynomial<B, 2>(q >> 6, upper << 2), v[3] = level_by_polynomial<B, 4>(q >> 8, upper << 2);
  }
}

// Of v[i], with i and i + 4: the lower bytes in order.
__device__ __forceinline__ void lower_bytes_of_pairs(const u32* v, u32& a, u32& b) {
  u32 x = permute(v[0], v[1], 0x6240), y = permute(v[2], v[3], 0x6240);  // 0, 1, 4, 5 and 2, 3, 6, 7
  a = permute(x, y, 0x5410);
  b = permute(x, y, 0x7632);
}

// Eight consecutive codes of a row to two registers of int8 levels, 2 to 5 bits by a table; EVENS: the even ones to the first.
// `first` and `second` are the row's plane words of this tile, `step` the mma step.
template <int B, bool EVENS = false, typename Table>
__device__ __forceinline__ void decode(const Table& table, const u32* first, const u32* second, int step, u32& a, u32& b) {
  if constexpr (B == 8) {
    a = first[2 * step] ^ BIAS;
    b = first[2 * step + 1] ^ BIAS;
  } else if constexpr (B == 6) {
    u32 v[4];
    levels_of_pairs<B>(first, second, step, v);
    lower_bytes_of_pairs(v, a, b);
  } else if constexpr (B == 2 || B == 3) {  // of two steps at once: the compiler does it once for both
    u32 q = first[step / 2], even = 0, odd = 0, upper = 0;
    if constexpr (B == 3) {  // bits 0, 1, 2, 3, ... to bits 0, 1, 4, 5, ..., with others between
      u32 high = permute(second[step / 4], 0, step % 4 < 2 ? 0x4140 : 0x4342);
      high = or_mask(high, high << 4, 0x0F0F0F0Fu);
      high |= high << 2;
      even = high << 2 & 0x44444444u, odd = high << 1 & 0x44444444u;
      upper = table.template word<B == 3 ? 4 : 0>();
    }
    even = mask_or(q, 0x33333333u, even), odd = mask_or(q >> 2, 0x33333333u, odd);
    a = permute(table.template word<0>(), upper, even >> (step % 2 * 16));
    b = permute(table.template word<0>(), upper, odd >> (step % 2 * 16));
    if constexpr (!EVENS) {
      u32 e = a, o = b;
      a = permute(e, o, 0x5140);
      b = permute(e, o, 0x7362);
    }
  } else {
    u32 q = first[step];
    u32 low = q & 0x77777777u, top = mask_or(q >> 1, 0x44444444u, table.keep);
    u32 low2 = low >> 16, top2 = top >> 16;
    a = look_up_16<0>(table, low, top);
    b = look_up_16<0>(table, low2, top2);
    if constexpr (B == 5) {
      u32 fifth = mask_or(spread_by_four(permute(second[step / 4], 0, 0x4440 + step % 4)), 0x44444444u, table.keep);
      a = permute(a, look_up_16<16>(table, low, top), fifth);
      b = permute(b, look_up_16<16>(table, low2, top2), fifth >> 16);
    }
  }
}
template <int B, bool EVENS = false>
__device__ __forceinline__ void decode(const u32* first, const u32* second, int step, u32& a, u32& b) {
  decode<B, EVENS>(Levels<B>(), first, second, step, a, b);
}

// Levels of B bits, with the bits of FLIP inverted, as a table for `decode`: of the two words of a permute one is in a register
// that the compiler cannot take for a constant, to be made anew each time; the other is one in the instruction.
template <int B, u32 FLIP = 0>
struct KeptLevels {
  u32 first[1 << (B - 3)], keep;
  template <int FIRST>
  __device__ __forceinline__ u32 word() const {
    return FIRST % 8 ? table_word<B, FIRST>() ^ FLIP : first[FIRST / 8];
  }
};
template <int B, u32 FLIP = 0>
__device__ __forceinline__ KeptLevels<B, FLIP> kept_levels() {
  const u32 flip = FLIP ^ threadIdx.z;  // threadIdx.z is 0
  KeptLevels<B, FLIP> kept = {{table_word<B, 0>() ^ flip}, Levels<B>::keep ^ threadIdx.z};
  if constexpr (B >= 4) kept.first[1] = table_word<B, 8>() ^ flip;
  if constexpr (B == 5) kept.first[2] = table_word<B, 16>() ^ flip, kept.first[3] = table_word<B, 24>() ^ flip;
  return kept;
}

// Whether levels below the middle code are negative and the others are not, below 127.
__host__ __device__ constexpr bool splits(int bits) {
  for (int i = 0; i < 1 << bits; i++)
    if ((level(bits, i) < 0) != (i < 1 << (bits - 1)) || level(bits, i) > 126) return false;
  return true;
}
static_assert(splits(4), "decode_halves");
// `decode` of 4 bits as a sum, for less work: a permute whose selector has bit 3 set gives 8 times the sign of the byte.
// Codes below 8, with negative levels, are looked up by `a`, which makes -1 of the others; these are looked up, one more
// than they are, by `b`, which makes 0 of the former. Level = low + high: two products instead of one.
struct Halves {
  u32 a, b;
};
__device__ __forceinline__ Halves kept_halves() {
  return {table_word<4, 0>() ^ threadIdx.z, table_word<4, 8>() + 0x01010101u ^ threadIdx.z};
}
__device__ __forceinline__ void decode_halves(const Halves& halves, u32 q, u32* low, u32* high) {
  constexpr u32 LOWER = table_word<4, 4>(), UPPER = table_word<4, 12>() + 0x01010101u;
  u32 other = q ^ 0x88888888u;
  low[0] = permute(halves.a, LOWER, q), high[0] = permute(halves.b, UPPER, other);
  low[2] = permute(halves.a, LOWER, q >> 16), high[2] = permute(halves.b, UPPER, other >> 16);
}
// What the decoders of a kernel keep in registers.
struct Kept {
  Halves halves;
  KeptLevels<3> three;
  KeptLevels<4> four;
  KeptLevels<5> five;
};
__device__ __forceinline__ Kept kept_tables() { return {kept_halves(), kept_levels<3>(), kept_levels<4>(), kept_levels<5>()}; }
// In the order of T(x) in 8 bits.
template <int B>
__device__ __forceinline__ void decode(const Kept& kept, const u32* first, const u32* second, int step, u32& a, u32& b) {
  if constexpr (B == 3)
    decode<B, EVENS_FIRST>(kept.three, first, second, step, a, b);
  else if constexpr (B == 4)
    decode<B>(kept.four, first, second, step, a, b);
  else if constexpr (B == 5)
    decode<B>(kept.five, first, second, step, a, b);
  else
    decode<B, EVENS_FIRST>(first, second, step, a, b);
}

// Byte offset within a row of the codes t LANE to (t + 1) LANE of the tile at input k.
__device__ __forceinline__ int code_offset(int bits, int plane, int k, int t) {
  if (SUBS > 1) k += t * LANE, t = 0;
  int width = plane_width(bits, plane);
  int lane = t * (LANE * width / 8);
  if (plane_count(bits) == 1) return (k >> 3) * width + lane;  // 32 | k
  int group = k / GROUP, within = k % GROUP;
  int before = plane == 0 ? 0 : plane_width(bits, 0);
  return group * (GROUP / 8) * bits + GROUP / 8 * before + (within >> 3) * width + lane;
}

template <int BYTES>
__device__ __forceinline__ void read_words(u32* words, const u8* from) {
  if constexpr (BYTES >= 16) {
    for (int i = 0; i < BYTES / 16; i++) {
      uint4 v = ((const uint4*)from)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  } else if constexpr (BYTES == 8) {
    uint2 v = *(const uint2*)from;
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (BYTES == 4) {
    words[0] = *(const u32*)from;
  } else if constexpr (BYTES == 2) {
    words[0] = *(const u16*)from;
  } else {
    words[0] = *from;
  }
}

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

// ------------------------------------------------------------------------------------------- the input's transform

struct Raw {  // eight inputs as they are in memory
  u32 words[X_TYPE == 0 ? 8 : 4];
};
__device__ __forceinline__ Raw load_raw(const Params& p, i64 row, int k) {  // 0 beyond the last
  Raw raw;
#if X_TYPE == 0
  const u32* x = (const u32*)p.x + row;
#else
  const u16* x = (const u16*)p.x + row;
#endif
  if (p.vectors && k + 8 <= p.in) {
    read_words<sizeof(Raw)>(raw.words, (const u8*)(x + k));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u32 word = k + i < p.in ? x[k + i] : 0;
#if X_TYPE == 0
      raw.words[i] = word;
#else
      raw.words[i / 2] = i % 2 ? raw.words[i / 2] | word << 16 : word;
#endif
    }
  }
  return raw;
}
__device__ __forceinline__ void raw_values(const Raw& raw, float* v) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
#if X_TYPE == 0
    v[i] = __uint_as_float(raw.words[i]);
#elif X_TYPE == 1
    v[i] = half_to_float((u16)(raw.words[i / 2] >> (i % 2 * 16)));
#else
    v[i] = __uint_as_float(i % 2 ? raw.words[i / 2] & 0xFFFF0000u : raw.words[i / 2] << 16);
#endif
  }
}
__device__ __forceinline__ void load_inputs(const Params& p, i64 row, int k, float* v) { raw_values(load_raw(p, row, k), v); }

__device__ __forceinline__ uint2 channel_bytes(const Params& p, int k) {  // 0 beyond the last
  if (p.vectors && k + 8 <= p.in) return *(const uint2*)(p.channel + k);
  u32 words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (k + i < p.in) words[i / 4] |= (u32)p.channel[k + i] << (8 * (i % 4));
  return make_uint2(words[0], words[1]);
}
__device__ __forceinline__ void channel_values(uint2 bytes, float* a) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    u32 byte = (i < 4 ? bytes.x >> (8 * i) : bytes.y >> (8 * (i - 4))) & 0xFFu;
    a[i] = half_to_float((u16)(byte << 8));  // e5m2 is the upper byte of fp16
  }
}
__device__ __forceinline__ void channel_scales(const Params& p, int k, float* a) { channel_values(channel_bytes(p, k), a); }

static constexpr float NORM = BLOCK == 128 ? 0.08838834764831845f : BLOCK == 64 ? 0.125f : 0.17677669529663687f;

// The three butterfly stages of eight neighbours.
__device__ __forceinline__ void hadamard_of_eight(float* v) {
#pragma unroll
  for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (!(i & bit)) {
        float a = v[i], b = v[i | bit];
        v[i] = a + b, v[i | bit] = a - b;
      }
    }
  }
}
// H / NORM on eight neighbours a lane, the other stages across lanes.
__device__ __forceinline__ void hadamard_sums(float* v, int lane) {
  hadamard_of_eight(v);
#pragma unroll
  for (int bit = 1; bit < BLOCK / 8; bit *= 2) {
    float sign = lane & bit ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = fmaf(sign, v[i], __shfl_xor_sync(~0u, v[i], bit));
  }
}
__device__ __forceinline__ void hadamard(float* v, int lane) {
  hadamard_sums(v, lane);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= NORM;
}

// The largest of COUNT warps. Calls of a loop need memory in turns: warps still read when the first ones come again.
template <int COUNT>
__device__ __forceinline__ float most_of_warps(float most, int turn = 0) {
  __shared__ float memory[2][COUNT];
  float* most_of_warp = memory[turn];
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) most = max_or_nan(most, __shfl_xor_sync(~0u, most, bit));
  if (threadIdx.x % 32 == 0) most_of_warp[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < COUNT; w++) most = max_or_nan(most, most_of_warp[w]);
  return most;
}

// a * x of eight inputs.
__device__ __forceinline__ void scaled_values(const Raw& raw, uint2 channel, float (&v)[8]) {
  raw_values(raw, v);
#if SCALED
  float a[8];
  channel_values(channel, a);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= a[i];
#endif
}
__device__ __forceinline__ void scaled_inputs(const Params& p, int token, int k, uint2 channel, float (&v)[8]) {
  scaled_values(load_raw(p, token * p.x_stride, k), channel, v);
}
__device__ __forceinline__ void scaled_inputs(const Params& p, int token, int k, float (&v)[8]) {
  scaled_inputs(p, token, k, channel_bytes(p, k), v);
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
// Without waiting for the writes before: others learn only that this CTA has come so far.
__device__ __forceinline__ void cluster_signal() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// The same place in the shared memory of another CTA of the cluster.
__device__ __forceinline__ u32 address_of_rank(u32 address, int rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
// The barrier expects the bytes already.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
#if CLUSTER > SPLIT
// To the same place of every CTA of the cluster, whose barriers are in the same place, too.
__device__ __forceinline__ void copy_bulk_to_all(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1))
      : "memory");
}
#endif
#endif
// To the shared memory of any CTA of the cluster.
__device__ __forceinline__ void store_shared(u32 to, float value) {
#if SPLIT > 1
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
#else
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
#endif
}

static constexpr int MAGIC = 0x4B400000;  // the bits of 1.5 * 2^23 as a float: MAGIC + n are those of 1.5 * 2^23 + n

// T(x) = scale q of eight inputs of one token from v = a * x, |q| <= MOST, q in the lower 16 bits; the BLOCK / 8 lanes of a
// block do it together.
__device__ __forceinline__ float fixed_point(float (&v)[8], int (&q)[8]) {
#if ROTATE
  hadamard_sums(v, threadIdx.x & 31);
#endif
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) most = max_or_nan(most, fabsf(v[i]));
#pragma unroll
  for (int bit = 1; bit < TILE / 8; bit *= 2) most = max_or_nan(most, __shfl_xor_sync(~0u, most, bit));
  // 127 * 256: |high| <= 127. A NaN or Inf makes the tile's scale NaN and so every output NaN.
  constexpr float MOST = PLANES == 2 ? 127 * 256 : 127, UNIT = ROTATE ? NORM : 1.f;
  float scale = fmaf(most, UNIT / MOST, most - most);
  float inverse = scale > 0.f ? __fdividef(UNIT, scale) : 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) q[i] = __float_as_int(fmaf(v[i], inverse, __int_as_float(MAGIC)));  // within MOST: |v| <= most
  return scale;
}
__device__ __forceinline__ u32 lower_bytes(const int* n) {
  return permute(permute(n[0], n[1], 0x0040), permute(n[2], n[3], 0x0040), 0x5410);
}
// Which four of eight come first (i = 0) or last.
template <typename T>
__device__ __forceinline__ void half_of_eight(const T* eight, int i, T* four) {
#pragma unroll
  for (int j = 0; j < 4; j++) four[j] = eight[EVENS_FIRST ? 2 * j + i : 4 * i + j];
}
static constexpr int TOKENS = 8 * NT / PLANES;  // of all column tiles of the product

// One or two int8 planes and, for each tile, a scale (of each tile the token's one of TOKENS), of inputs k to k + 8.
// tile: the only one to be stored, or -1.
__device__ __forceinline__ void transform(float (&v)[8], int k, int tile, u8* planes, int pitch, float* scales) {
  int q[8];
  float scale = fixed_point(v, q);
  if (k >= IN_PADDED || (tile >= 0 && k / TILE != tile)) return;
  u32 l[2], h[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int n[4];
    half_of_eight(q, i, n);
    l[i] = lower_bytes(n);
    h[i] = permute(permute(n[0] + 128, n[1] + 128, 0x0051), permute(n[2] + 128, n[3] + 128, 0x0051), 0x5410);
  }
  *(uint2*)(planes + k) = PLANES == 2 ? make_uint2(h[0], h[1]) : make_uint2(l[0], l[1]);
  if (PLANES == 2) *(uint2*)(planes + pitch + k) = make_uint2(l[0], l[1]);
  if (k % TILE == 0) scales[k / TILE * TOKENS] = scale;
}

// T(x) of many tokens, once for all CTAs of the product: one warp for 256 inputs of one token.
extern "C" __global__ void __launch_bounds__(256) tqw_transform(const __grid_constant__ Params p) {
  allow_next_kernel();
  constexpr int CHUNKS = (IN_PADDED + 255) / 256;
  int item = blockIdx.x * 8 + threadIdx.x / 32;
  if (item >= CHUNKS * p.tokens) return;
  int token = item / CHUNKS, k = item % CHUNKS * 256 + (threadIdx.x & 31) * 8;
  u8* planes = p.planes + (i64)(PLANES * token) * IN_PADDED;
  float v[8];
  uint2 channel = channel_bytes(p, k);  // weights need not wait, and come from far off
  wait_for_previous_kernel();
  scaled_inputs(p, token, k, channel, v);
  transform(v, k, -1, planes, IN_PADDED, p.plane_scale + token);
}

// --------------------------------------------------------------------------------------------------- the product

static constexpr int TILES = IN_PADDED / TILE, GROUPS = IN_PADDED / GROUP;

__host__ __device__ constexpr int lane_bytes(int bits, int plane) {
  return plane < plane_count(bits) ? LANE * plane_width(bits, plane) / 8 : 0;
}
__host__ __device__ constexpr int words_of(int bits, int plane) { return (lane_bytes(bits, plane) + 3) / 4; }
__host__ __device__ constexpr int words_before(int pass) {
  int total = 0;
  for (int i = 0; i < pass; i++) total += words_of(WIDTHS[i], 0) + words_of(WIDTHS[i], 1);
  return total;
}

// What one lane holds of one tile of one strip: its codes of rows g and g + 8, and the two scales, of every pass.
struct Unit {
  u32 codes[2][words_before(PASSES)];
  u16 scales[2][PASSES][SUBS];
};

template <int BYTES>
__device__ __forceinline__ void load_stream(u32* words, const u8* from) {
  if constexpr (BYTES >= 16) {
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++)
      asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(words[4 * i]), "=r"(words[4 * i + 1]), "=r"(words[4 * i + 2]), "=r"(words[4 * i + 3])
                   : "l"(from + 16 * i));
  } else {
    read_words<BYTES>(words, from);
  }
}

template <int I>
__device__ __forceinline__ void load_pass(const Params& p, Unit& unit, int row0, int row1, int k, int t) {
  constexpr int B = WIDTHS[I], FIRST = words_before(I), COUNT = plane_count(B);
  constexpr int W0 = lane_bytes(B, 0), W1 = lane_bytes(B, 1);
  constexpr i64 STRIDE = (i64)IN_PADDED / 8 * B;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    i64 row = h ? row1 : row0;
    const u8* codes = p.packed[I] + row * STRIDE;
    constexpr int OF_GROUP = SUB / 8 * B, ALIGNED = OF_GROUP & -OF_GROUP, AT_ONCE = ALIGNED < W0 ? ALIGNED : W0;
#pragma unroll
    for (int i = 0; i < W0; i += AT_ONCE)
      load_stream<AT_ONCE>(unit.codes[h] + FIRST + i / 4, codes + code_offset(B, 0, k, t) + i);
    if constexpr (COUNT == 2) load_stream<W1>(unit.codes[h] + FIRST + words_of(B, 0), codes + code_offset(B, 1, k, t));
    int group = (SUBS > 1 ? k + t * LANE : k) / GROUP;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(unit.scales[h][I][0]) : "l"(p.scale[I] + row * GROUPS + group));
  }
  if constexpr (I + 1 < PASSES) load_pass<I + 1>(p, unit, row0, row1, k, t);
}

static constexpr int OF_LANE = 2 / PLANES;  // tokens of a column tile whose sums one lane holds

// total[nt][row half][token] += weight_scale * s * (256 high + low) of one tile of one pass.
template <int I>
__device__ __forceinline__ void multiply_pass(const Kept& kept, const Unit& unit, const u8* const* columns,
                                              const float (*x_scale)[OF_LANE], float (*total)[2][OF_LANE]) {
  constexpr int B = WIDTHS[I], FIRST = words_before(I), SECOND = FIRST + words_of(B, 0);
  int c[NT][4];
  constexpr int OF_SUB = STEPS / SUBS, AT_ONCE = OF_SUB < 2 ? 1 : 2;
#pragma unroll
  for (int step = 0; step < STEPS; step += AT_ONCE) {
    if (step % OF_SUB == 0) {
#pragma unroll
      for (int n = 0; n < NT; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = PLANES == 2 ? 0 : MAGIC;
    }
    u32 b[NT][2 * AT_ONCE];
#pragma unroll
    for (int n = 0; n < NT; n++) read_words<8 * AT_ONCE>(b[n], columns[n] + step / OF_SUB * SUB + step % OF_SUB * 8);
#pragma unroll
    for (int s = 0; s < AT_ONCE; s++) {
      u32 a[4];
      if constexpr (B == 4 && HALVES) {
        u32 high[4];
        decode_halves(kept.halves, unit.codes[0][FIRST + step + s], a, high);
        decode_halves(kept.halves, unit.codes[1][FIRST + step + s], a + 1, high + 1);
#pragma unroll
        for (int n = 0; n < NT; n++) multiply(c[n], high, b[n][2 * s], b[n][2 * s + 1]);
      } else {
        decode<B>(kept, unit.codes[0] + FIRST, unit.codes[0] + SECOND, step + s, a[0], a[2]);
        decode<B>(kept, unit.codes[1] + FIRST, unit.codes[1] + SECOND, step + s, a[1], a[3]);
      }
#pragma unroll
      for (int n = 0; n < NT; n++) multiply(c[n], a, b[n][2 * s], b[n][2 * s + 1]);
    }
    if ((step + AT_ONCE) % OF_SUB) continue;
    float s0 = half_to_float(unit.scales[0][I][step / OF_SUB]), s1 = half_to_float(unit.scales[1][I][step / OF_SUB]);
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < OF_LANE; i++) {
        auto sum = [&](int h) {  // 256 * 128^3 < 2^30, 128^3 < 2^22
          return PLANES == 2 ? (float)(256 * c[n][2 * h] + c[n][2 * h + 1]) : __int_as_float(c[n][2 * h + i]) - __int_as_float(MAGIC);
        };
        total[n][0][i] = fmaf(s0 * x_scale[n][i], sum(0), total[n][0][i]);
        total[n][1][i] = fmaf(s1 * x_scale[n][i], sum(1), total[n][1][i]);
      }
    }
  }
  if constexpr (I + 1 < PASSES) multiply_pass<I + 1>(kept, unit, columns, x_scale, total);
}

__device__ __forceinline__ void store_output(const Params& p, int token, int row, float value) {
  i64 index = (i64)token * p.out + row;
#if X_TYPE == 0
  if (p.bias) value += ((const float*)p.bias)[row];
  ((float*)p.y)[index] = value;
#elif X_TYPE == 1
  if (p.bias) value += value_16(((const u16*)p.bias)[row]);
  ((u16*)p.y)[index] = float_to_half(value);
#else
  if (p.bias) value += value_16(((const u16*)p.bias)[row]);
  ((u16*)p.y)[index] = float_to_bfloat(value);
#endif
}

#if EXPERTS
// The parameters of blockIdx.y: those of one token and one expert, or (middle.cu) with the weights of a block's expert.
__device__ __forceinline__ Params of_expert(const Params& all) {
  constexpr int SIZE = X_TYPE == 0 ? 4 : 2;
  Params p = all;
#ifdef COLUMNS
  i64 pair = 0, rows = (i64)all.block[blockIdx.y].x * all.out;
#else
  i64 pair = blockIdx.y, expert = min(max(all.ids[pair], (i64)0), (i64)all.experts - 1), rows = expert * all.out;
#endif
#pragma unroll
  for (int i = 0; i < PASSES; i++) {
    p.packed[i] = all.packed[i] + rows * (IN_PADDED / 8 * WIDTHS[i]);
    p.scale[i] = all.scale[i] + rows * GROUPS;
  }
  p.x = (const u8*)all.x + pair / all.choices * all.x_stride * SIZE;
  p.y = (u8*)all.y + pair * all.out * SIZE;
  if (all.bias) p.bias = (const u8*)all.bias + rows * SIZE;
  return p;
}
#endif

#ifndef COLUMNS
static_assert(TILES % (SPLIT * TURN_TILES) == 0 && WARPS % SHARE == 0 && WARPS / SHARE % SPLIT == 0, "shares are whole");
static_assert(TURN_TILES == 1 || (TILE == 128 && GROUP == TILE), "two tiles have two scales side by side");
static constexpr int RANK_TILES = TILES / SPLIT, RANK_IN = IN_PADDED / SPLIT;  // of one CTA
static constexpr int STRIPS = WARPS / SHARE;                                   // that a CTA works on at once
static constexpr int RANK_TURNS = RANK_TILES / TURN_TILES;                     // of all warps of a strip
static constexpr int TURNS = (RANK_TURNS + SHARE - 1) / SHARE;                 // of one warp
static constexpr int PITCH = RANK_IN + 16;                                     // 16: two columns share no bank
static constexpr int OF_TURN = TURN_TILES * TILE, ACROSS = SHARE * OF_TURN;    // inputs, and those to a warp's next turn
static constexpr int TURNS_OF_HALF = (TURNS + 1) / 2, HALF = TURNS > 1 ? TURNS_OF_HALF * ACROSS : RANK_IN;  // T(x) comes in two halves

// What a warp's turn needs of a strip, in shared memory: for each pass and plane the codes of the lanes, rows g and then
// rows g + 8 (of several groups or tiles, whose planes lie apart, the bytes of a row side by side), and for each row its scales.
static constexpr bool SIDE_BY_SIDE = SUBS * TURN_TILES > 1;
static constexpr int SCALES_PITCH = SUBS > 2 ? 2 * SUBS : 4;  // bytes
__host__ __device__ constexpr int staged_bytes(int passes) {
  int total = 0;
  for (int i = 0; i < passes; i++)
    total += 64 * TURN_TILES * (lane_bytes(WIDTHS[i], 0) + lane_bytes(WIDTHS[i], 1)) + 16 * SCALES_PITCH;
  return total;
}
static constexpr int UNIT_BYTES = staged_bytes(PASSES), SLOT_BYTES = WARPS * UNIT_BYTES;

// The W bytes of each lane of 8 rows; `from` is the lane's own.
template <int W>
__device__ __forceinline__ void stage_codes(u32 to, const u8* from, int lane) {
  if constexpr (W == 16) {
    copy_async<16>(to + lane * 16, from);
  } else if constexpr (W >= 4) {
    copy_async<W>(to + lane * W, from);
  } else if ((lane & 3) < W) {  // the smallest copy has 4 bytes: some lanes of a quad copy for all
    int t = lane & 3;
    copy_async<4>(to + (lane - t) * W + 4 * t, from + t * (4 - W));
  }
}

// What a lane reads, but for the strip and the turn: its rows within a strip, the first input of its warp's first tile.
struct Place {
  int lane, rows[2], first;
};
// Place of the 16 bytes `chunk` of a row that lies side by side: rows whose pieces would meet in a bank differ.
template <int B>
__device__ __forceinline__ int chunk_place(int row, int chunk) {
  constexpr int CHUNKS = OF_TURN * B / 128;
  int other = B == 4 ? (SUB == 64 ? row & 2 : row >> 1 & 3) : B == 8 ? (SUB == 64 ? (row & 1) * 4 : (row & 3) * 2) : 0;
  if (TURN_TILES > 1) other = B == 2 ? row & 2 : B == 4 ? (row & 1) * 4 : 0;
  if (TURN_TILES > 1 && B == 5) row = (row & ~3) + (row & 1) * 2 + (row >> 1 & 1);
  return row * CHUNKS + (chunk ^ other);
}
// Number of the (first) group that holds the tile of a turn.
__device__ __forceinline__ int group_of(int first, int turn) {
  return ACROSS % GROUP == 0 ? first / GROUP + turn * (ACROSS / GROUP) : (first + turn * ACROSS) / GROUP;
}

// Where a strip begins for a lane: the codes of its first turn and their scales, where what the lane adds is the same for
// all turns but for a constant (else those of the strip).
template <int B>
static constexpr bool LINEAR = SIDE_BY_SIDE || plane_count(B) == 1 || GROUP == TILE;
// The codes of each row come in pieces of 16 bytes, whichever lanes need them: fewer copies than of each lane's own.
template <int B>
static constexpr bool BY_ROWS = LINEAR<B> && TILE == 128 && !SIDE_BY_SIDE;
// Of a plane of which a lane has W bytes: the row and the byte of the first piece that a lane copies.
template <int W>
__device__ __forceinline__ int copied_row(const Params& p, int lane) {
  int row = W == 4 ? lane % 16 : lane / (W / 4);
  return SMALL ? min(row, p.out - 1) : row;
}
template <int W>
__device__ __forceinline__ int copied_byte(int lane) {
  return lane % (W / 4) * 16;
}
template <int W>
__device__ __forceinline__ void stage_rows(const Params& p, u32 to, const u8* from, i64 stride, int lane) {
  constexpr int OF_ROW = W / 4, PIECES = 16 * OF_ROW;
#pragma unroll
  for (int i = 0; i < PIECES; i += 32, to += 512) {
    int down = SMALL ? min((i + lane) / OF_ROW, p.out - 1) - min(lane / OF_ROW, p.out - 1) : i / OF_ROW;
    if (PIECES >= 32 || lane < PIECES) copy_async<16>(to + lane * 16, from + down * stride);
  }
}
static constexpr bool PAIRS = SUBS == 1 && GROUPS % 2 == 0 && ACROSS % (2 * GROUP) == 0;  // of scales, at a multiple of 4 bytes
struct Strip {
  const u8* codes[PASSES];
  const u16* scales[PASSES];
};
template <int I>
__device__ __forceinline__ void find_strip(const Params& p, Strip& strip, i64 row, const Place& place) {
  constexpr int B = WIDTHS[I];
  constexpr i64 STRIDE = (i64)IN_PADDED / 8 * B;
  int lane = place.lane, t = lane & 3;
  strip.codes[I] = p.packed[I] + row * STRIDE;
  if constexpr (SIDE_BY_SIDE)
    strip.codes[I] += place.first / 8 * B;
  else if constexpr (BY_ROWS<B>)
    strip.codes[I] += copied_row<lane_bytes(B, 0)>(p, lane) * STRIDE + code_offset(B, 0, place.first, 0) + copied_byte<lane_bytes(B, 0)>(lane);
  else if constexpr (LINEAR<B>)
    strip.codes[I] += place.rows[0] * STRIDE + code_offset(B, 0, place.first, t);
  strip.scales[I] = p.scale[I] + row * GROUPS;
  if constexpr (PAIRS) strip.scales[I] += ((t & 1 ? place.rows[1] : place.rows[0]) * GROUPS + place.first / GROUP) & ~1;
  if constexpr (I + 1 < PASSES) find_strip<I + 1>(p, strip, row, place);
}

// Begin to copy what a warp's turn needs.
template <int I>
__device__ __forceinline__ void stage_turn(const Params& p, u32 to, const Strip& strip, int turn, const Place& place) {
  constexpr int B = WIDTHS[I], W0 = lane_bytes(B, 0), W1 = lane_bytes(B, 1);
  constexpr i64 STRIDE = (i64)IN_PADDED / 8 * B;
  int lane = place.lane, t = lane & 3;
  const u8* codes = strip.codes[I] + (LINEAR<B> ? turn * (ACROSS / 8 * B) : 0);
  u32 at = to + staged_bytes(I);
  if constexpr (SIDE_BY_SIDE) {
    constexpr int CHUNKS = OF_TURN * B / 128;
#pragma unroll
    for (int i = 0; i < 16 * CHUNKS; i += 32) {
      int row = (i + lane) / CHUNKS, chunk = (i + lane) % CHUNKS;
      u32 from = (SMALL ? min(row, p.out - 1) : row) * (u32)STRIDE + chunk * 16;
      if (16 * CHUNKS % 32 == 0 || row < 16) copy_async<16>(at + chunk_place<B>(row, chunk) * 16, codes + from);
    }
  } else if constexpr (BY_ROWS<B>) {
    stage_rows<W0>(p, at, codes, STRIDE, lane);
    if constexpr (W1 > 0) {
      i64 second = (copied_row<W1>(p, lane) - copied_row<W0>(p, lane)) * STRIDE + code_offset(B, 1, place.first, 0) -
                   code_offset(B, 0, place.first, 0) + copied_byte<W1>(lane) - copied_byte<W0>(lane);
      stage_rows<W1>(p, at + 64 * W0, codes + second, STRIDE, lane);
    }
  } else if constexpr (LINEAR<B>) {
    int second = code_offset(B, 1, place.first, t) - code_offset(B, 0, place.first, t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u8* from = codes + h * (SMALL ? place.rows[1] - place.rows[0] : 8) * STRIDE;
      stage_codes<W0>(at + h * 32 * W0, from, lane);
      if constexpr (W1 > 0) stage_codes<W1>(at + 64 * W0 + h * 32 * W1, from + second, lane);
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 from = place.rows[h] * (u32)STRIDE;
      stage_codes<W0>(at + h * 32 * W0, codes + (from + code_offset(B, 0, place.first + turn * ACROSS, t)), lane);
      if constexpr (W1 > 0)
        stage_codes<W1>(at + 64 * W0 + h * 32 * W1, codes + (from + code_offset(B, 1, place.first + turn * ACROSS, t)), lane);
    }
  }
  at += 64 * TURN_TILES * (W0 + W1) + SCALES_PITCH * (8 * (t & 1) + (lane >> 2));
  u32 number = (t & 1 ? place.rows[1] : place.rows[0]) * GROUPS + group_of(place.first, turn);
  const u16* scales = strip.scales[I];
  if constexpr (SUBS > 1) {
    if (t < SUBS) copy_async<4>(at + t / 2 * 4, scales + number + t / 2 * 2);
  } else if constexpr (PAIRS) {
    if (t < 2) copy_async<4>(at, scales + turn * (ACROSS / GROUP));
  } else if constexpr (GROUPS % 2 == 0) {
    if (t < 2) copy_async<4>(at, scales + number / 2 * 2);
  } else if (t < 2) {  // 4 bytes around the scale of one row; none after the last scale is read
    i64 scale = (i64)(scales + number);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(scale & ~3ll), "r"(2 + (int)(scale & 2))
                 : "memory");
  }
  if constexpr (I + 1 < PASSES) stage_turn<I + 1>(p, to, strip, turn, place);
}
// Lane t's codes of a row, of one plane and all groups of the turn's j-th tile.
template <int B, int PLANE>
__device__ __forceinline__ void read_pieces(u32* words, const u8* rows, int row, int t, int j) {
  constexpr int BYTES = lane_bytes(B, PLANE) / SUBS, BEFORE = PLANE ? SUB / 8 * plane_width(B, 0) : 0;
#pragma unroll
  for (int s = 0; s < SUBS; s++) {
    int at = (j * SUBS + s) * (SUB / 8) * B + BEFORE + t * BYTES;
    const u8* from = rows + chunk_place<B>(row, at / 16) * 16 + at % 16;
    if constexpr (BYTES >= 4) {
      read_words<BYTES>(words + s * (BYTES / 4), from);
    } else {
      u32 piece, &word = words[s * BYTES / 4];
      read_words<BYTES>(&piece, from);
      word = s * BYTES % 4 ? word | piece << (s * BYTES % 4 * 8) : piece;
    }
  }
}
// What stage_turn has brought of the turn's j-th tile.
template <int I>
__device__ __forceinline__ void read_turn(const Params& p, const u8* from, Unit& unit, int row, int turn, int j,
                                          const Place& place) {
  constexpr int B = WIDTHS[I], W0 = lane_bytes(B, 0), W1 = lane_bytes(B, 1), FIRST = words_before(I);
  const u8* mine = from + staged_bytes(I);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if constexpr (SIDE_BY_SIDE) {
      int row = (place.lane >> 2) + 8 * h, t = place.lane & 3;
      read_pieces<B, 0>(unit.codes[h] + FIRST, mine, row, t, j);
      if constexpr (W1 > 0) read_pieces<B, 1>(unit.codes[h] + FIRST + words_of(B, 0), mine, row, t, j);
    } else {
      read_words<W0>(unit.codes[h] + FIRST, mine + h * 32 * W0 + place.lane * W0);
      if constexpr (W1 > 0) read_words<W1>(unit.codes[h] + FIRST + words_of(B, 0), mine + 64 * W0 + h * 32 * W1 + place.lane * W1);
    }
    const u8* scales = mine + 64 * TURN_TILES * (W0 + W1) + 8 * SCALES_PITCH * h + SCALES_PITCH * (place.lane >> 2);
    if constexpr (SUBS > 1) {
#pragma unroll
      for (int s = 0; s < SUBS; s += 2) {
        u32 both = *(const u32*)(scales + 2 * s);
        unit.scales[h][I][s] = (u16)both, unit.scales[h][I][SUBS > 1 ? s + 1 : 0] = (u16)(both >> 16);
      }
    } else {
      int number = TURN_TILES > 1 ? j : group_of(place.first, turn);
      if (GROUPS % 2) number += (int)((i64)p.scale[I] >> 1) + (row + place.rows[h]) * GROUPS;
      unit.scales[h][I][0] = *(const u16*)(scales + 2 * (number & 1));
    }
  }
  if constexpr (I + 1 < PASSES) read_turn<I + 1>(p, from, unit, row, turn, j, place);
}

// T(x) of a CTA's inputs in shared memory.
struct Inputs {
  u8* planes;     // [tokens][PLANES][PITCH]
  float* scales;  // [RANK_TILES][TOKENS]
};

static constexpr bool ALONE = STRIPS == 1;  // no other warp reads what a warp transforms

#if FUSED
// T(x) of one token by the warps that need it, two tiles or so in a round. With one strip at a time none waits for
// others, and each transforms tiles when their turn comes, while the codes of later ones are on their way.
struct Transformer {
  static constexpr int LANES = BLOCK / 8, AT_ONCE = 32 / LANES;
  static constexpr int OF_ALL = ALONE ? AT_ONCE : AT_ONCE * WARPS;  // tiles, of a warp or of all, in a round
  static constexpr int ROUNDS = ((ALONE ? TURNS * TURN_TILES : RANK_TILES) + OF_ALL - 1) / OF_ALL;
  static constexpr int MOST = X_TYPE == 0 ? 4 : 7;  // rounds whose inputs are on their way
  static constexpr int DEPTH = ROUNDS < MOST ? ROUNDS : MOST;

  const Params& p;
  const Inputs& to;
  int rank, warp, lane, round = 0;
  uint2 channel[DEPTH];
  Raw raw[DEPTH];

  __device__ __forceinline__ int tile(int round) const {
    int item = round * OF_ALL + (ALONE ? 0 : warp * AT_ONCE) + lane / LANES;
    int tile = ALONE ? (warp + item / TURN_TILES * SHARE) * TURN_TILES + item % TURN_TILES : item;
    return tile < RANK_TILES ? rank * RANK_TILES + tile : TILES;
  }
  // The first of a lane's eight inputs, of whose block only the tile is stored.
  __device__ __forceinline__ int input(int tile) const {
    return tile < TILES ? tile * TILE / BLOCK * BLOCK + lane % LANES * 8 : IN_PADDED;
  }
  // Channel scales are the first to be needed, and a long way off.
  __device__ __forceinline__ Transformer(const Params& p, const Inputs& to, int rank, int warp, int lane)
      : p(p), to(to), rank(rank), warp(warp), lane(lane) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) channel[i] = channel_bytes(p, input(tile(i)));
  }
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) raw[i] = load_raw(p, 0, input(tile(i)));
  }
  __device__ __forceinline__ void next() {
    float v[8];
    scaled_values(raw[0], channel[0], v);
#pragma unroll
    for (int i = 1; i < DEPTH; i++) raw[i - 1] = raw[i], channel[i - 1] = channel[i];
    if (ROUNDS > DEPTH) {
      int k = input(tile(round + DEPTH));
      raw[DEPTH - 1] = load_raw(p, 0, k), channel[DEPTH - 1] = channel_bytes(p, k);
    }
    int now = tile(round++);
    transform(v, input(now), now, to.planes - rank * RANK_IN, PITCH, to.scales - rank * RANK_TILES * TOKENS);
    __syncwarp();
  }
};
#endif

// T(x) as tqw_transform has left it, in two halves, in the order in which they are needed.
__device__ __forceinline__ void copy_inputs(const Params& p, const Inputs& to, int rank, u32 arrived) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x < 32) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int k = half * HALF, bytes = half ? RANK_IN - HALF : HALF;
      if (bytes == 0) break;
#if CLUSTER > SPLIT  // each CTA brings its share to all
      for (int i = threadIdx.x * CLUSTER + blockIdx.x % CLUSTER; i < PLANES * p.tokens; i += 32 * CLUSTER)
        copy_bulk_to_all(shared_address(to.planes + i * PITCH + k), p.planes + (i64)i * IN_PADDED + k, bytes, arrived + 8 * half);
#else
      for (int i = threadIdx.x; i < PLANES * p.tokens; i += 32)
        copy_bulk(shared_address(to.planes + i * PITCH + k), p.planes + (i64)i * IN_PADDED + rank * RANK_IN + k, bytes,
                  arrived + 8 * half);
#endif
    }
  }
#else
  auto copy = [&](u8* to, const u8* from, int bytes) {
#pragma unroll 4
    for (int i = threadIdx.x * 16; i < bytes; i += WARPS * 512) *(uint4*)(to + i) = *(const uint4*)(from + i);
  };
  for (int i = 0; i < PLANES * p.tokens; i++) copy(to.planes + i * PITCH, p.planes + (i64)i * IN_PADDED + rank * RANK_IN, RANK_IN);
#endif
  for (int i = threadIdx.x; i < RANK_TILES * TOKENS; i += WARPS * 32) to.scales[i] = p.plane_scale[rank * RANK_TILES * TOKENS + i];
}

// The SPLIT CTAs of a cluster share the inputs; a cluster owns every so-many-th set of STRIPS strips of 16 rows (the last
// strip may overlap the one before it: the same values twice). SHARE warps share a strip's tiles and leave their sums in
// the shared memory of the CTA that adds up the strip: one barrier for every p.batch sets (two buffers: no second one).
// Each warp has the codes of its next RING tiles on their way to shared memory, where only it reads them, so the memory
// never waits for a barrier.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS) tqw_decode(const __grid_constant__ Params given) {
#if EXPERTS
  wait_for_previous_kernel();  // it may have chosen the experts
  const Params p = of_expert(given);
#else
  const Params& p = given;
#endif
  extern __shared__ __align__(16) u8 shared[];  // ring | barriers | sums | planes | their scales
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int rank = SPLIT > 1 ? blockIdx.x % SPLIT : 0, cluster = blockIdx.x / SPLIT, clusters = gridDim.x / SPLIT;
  int share = warp % SHARE, lot = warp / SHARE;
  float* sums = (float*)(shared + RING * SLOT_BYTES + 16);
  int outputs = 16 * p.tokens;  // of one strip
  Inputs inputs;
  inputs.planes = (u8*)(sums + 2 * p.batch * WARPS * outputs);
  inputs.scales = (float*)(inputs.planes + PLANES * p.tokens * PITCH);
  int strips = (p.out + 15) / 16, sets = (strips + STRIPS - 1) / STRIPS;
  auto first_row = [&](int strip) { return SMALL ? 0 : min(strip * 16, p.out - 16); };
  auto has = [&](int turn) { return RANK_TURNS % SHARE == 0 || turn + 1 < TURNS || share + turn * SHARE < RANK_TURNS; };
  u32 arrived = shared_address(shared + RING * SLOT_BYTES);
#if !FUSED && __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    barrier_init(arrived, 1), barrier_init(arrived + 8, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    barrier_expect(arrived, PLANES * p.tokens * HALF), barrier_expect(arrived + 8, PLANES * p.tokens * (RANK_IN - HALF));
  }
  __syncwarp();
#endif
#if CLUSTER > 1
  cluster_signal();
#endif
#if FUSED
  Transformer transformer(p, inputs, rank, warp, lane);
#endif

  Place place{lane, {SMALL ? min(g, p.out - 1) : g, SMALL ? min(g + 8, p.out - 1) : g + 8}, rank * RANK_IN + share * OF_TURN};
  const u8* ring = shared + warp * UNIT_BYTES;
  int next_set = cluster, next_turn = 0;  // to be fetched
  Strip next_strip;
  auto find_next = [&] { find_strip<0>(p, next_strip, first_row(next_set * STRIPS + lot), place); };
  find_next();
  auto fetch_next = [&](int slot) {
    if (next_set * STRIPS + lot < strips && has(next_turn))
      stage_turn<0>(p, shared_address(ring + slot * SLOT_BYTES), next_strip, next_turn, place);
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (++next_turn == TURNS) {
      next_turn = 0, next_set += clusters;
      find_next();
    }
  };
#pragma unroll
  for (int i = 0; i < EARLY; i++) fetch_next(i);
  take_over();
  auto fetch_rest = [&] {
#pragma unroll
    for (int i = EARLY; i < RING; i++) fetch_next(i);
  };
#if CLUSTER > 1
  cluster_wait();  // every CTA of the cluster runs: its shared memory may be written
#elif !FUSED
  __syncthreads();  // the barriers are there
#endif
#if FUSED
  transformer.begin();
  fetch_rest();
  if (!ALONE) {
#pragma unroll 1
    for (int round = 0; round < Transformer::ROUNDS; round++) transformer.next();
    __syncthreads();
  }
#else
  copy_inputs(p, inputs, rank, arrived);
  fetch_rest();
  __syncthreads();
#endif

  // Columns beyond the last token repeat it: their sums are never stored.
  const u8* column[NT];
  const float* x_scales = inputs.scales + share * TURN_TILES * TOKENS + t * OF_LANE;
  auto token_of = [&](int n, int i) { return (4 * n + t) * OF_LANE + i; };
#pragma unroll
  for (int n = 0; n < NT; n++) {
    column[n] = inputs.planes + min(8 * n + g, PLANES * p.tokens - 1) * PITCH + t * (SUB / 4) + share * OF_TURN;
  }
  // The sums of one set in a CTA: of each strip that it adds up, one after the other, from each warp of the cluster.
  constexpr int PARTS = SPLIT * SHARE;
  u32 sums_at = shared_address(sums + ((lot / SPLIT * SPLIT + rank) * SHARE + share) * outputs + g);
#if SPLIT > 1
  sums_at = address_of_rank(sums_at, lot % SPLIT);
#endif
  const Kept kept = kept_tables();
  int buffer = 0, pending = 0, slot = 0;
#if !FUSED && __CUDA_ARCH__ >= 900
  auto wait_for_half = [&](int half) { barrier_wait(arrived + 8 * half, 0); };
  if (cluster >= sets) wait_for_half(0), wait_for_half(TURNS > 1);  // none leaves before what is on its way to it
#endif
#pragma unroll 1
  for (int set = cluster; set < sets; set += clusters) {
    float total[NT][2][OF_LANE];
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < OF_LANE; i++) total[n][0][i] = total[n][1][i] = 0.f;
    }
    int row = first_row(set * STRIPS + lot);
#pragma unroll UNROLL
    for (int turn = 0; turn < TURNS; turn++) {
      Unit units[TURN_TILES];
      asm volatile("cp.async.wait_group %0;" ::"n"(RING - 1) : "memory");
      __syncwarp();
      if (has(turn)) {
#pragma unroll
        for (int j = 0; j < TURN_TILES; j++) read_turn<0>(p, ring + slot * SLOT_BYTES, units[j], row, turn, j, place);
      }
      __syncwarp();
      fetch_next(slot);
      slot = slot + 1 == RING ? 0 : slot + 1;
#if !FUSED && __CUDA_ARCH__ >= 900
      if (set == cluster && turn % TURNS_OF_HALF == 0) wait_for_half(turn / TURNS_OF_HALF);
#elif FUSED
      if (ALONE && set == cluster && turn * TURN_TILES % Transformer::AT_ONCE == 0) transformer.next();
#endif
#pragma unroll
      for (int j = 0; j < TURN_TILES && has(turn); j++) {
        const u8* at[NT];
        float x_scale[NT][OF_LANE];
#pragma unroll
        for (int n = 0; n < NT; n++) {
          at[n] = column[n] + turn * ACROSS + j * TILE;
#pragma unroll
          for (int i = 0; i < OF_LANE; i++) x_scale[n][i] = x_scales[(turn * SHARE * TURN_TILES + j) * TOKENS + 4 * OF_LANE * n + i];
        }
        multiply_pass<0>(kept, units[j], at, x_scale, total);
      }
    }
    u32 to = sums_at + (buffer * p.batch + pending) * (WARPS * 4) * outputs;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < OF_LANE; i++) {
        if (token_of(n, i) < p.tokens) {
          store_shared(to + token_of(n, i) * 64, total[n][0][i]);
          store_shared(to + token_of(n, i) * 64 + 32, total[n][1][i]);
        }
      }
    }
    pending++;
    if (pending == p.batch || set + clusters >= sets) {
#if SPLIT > 1
      cluster_arrive();
      cluster_wait();
#else
      __syncthreads();
#endif
      constexpr int LOTS = STRIPS / SPLIT;  // strips of a set that this CTA adds up
      for (u32 i = threadIdx.x; i < pending * LOTS * outputs; i += WARPS * 32) {
        u32 which = i / (u32)outputs, output = i % (u32)outputs;
        const float* from = sums + (buffer * p.batch * LOTS + which) * PARTS * outputs + output;
        int strip = (set - (pending - 1 - (int)which / LOTS) * clusters) * STRIPS + (int)which % LOTS * SPLIT + rank;
        int row = first_row(strip) + output % 16;
        float value = 0.f;
#pragma unroll
        for (int w = 0; w < PARTS; w++) value += from[w * outputs];
        if (strip < strips && row < p.out) store_output(p, output / 16, row, value);
      }
      buffer ^= 1;
      pending = 0;
    }
  }
}
#endif

// ----------------------------------------------------------------------------------------- dense = (V H) * a, by rows

// B operand of out = levels H32 for one mma step: the part of H that acts on the input bits inside one step. Lane t of
// A holds inputs (t, n), n = 0..7; output column c of tile j stands for (c / 2, 2 j + c % 2). Identity without H.
__device__ __forceinline__ u32 hadamard_fragment(int j, int lane, int upper) {
  int column = lane >> 2, t = lane & 3, to_t = column >> 1, to_n = 2 * j + (column & 1);
  u32 word = 0;
  for (int i = 0; i < 4; i++) {
    int n = 4 * upper + i;
#if ROTATE
    u32 value = __popc((t & to_t) << 3 | (n & to_n)) & 1 ? 0xFFu : 1u;
#else
    u32 value = t == to_t && n == to_n;
#endif
    word |= value << (8 * i);
  }
  return word;
}

static constexpr int BLOCK_STEPS = BLOCK / 32, BLOCK_TILES = BLOCK / TILE;

// value += weight_scale * levels H32 of one block's tiles.
template <int I>
__device__ __forceinline__ void dense_pass(const Unit* units, const u32 (*fragment)[2], float (*value)[4][4]) {
  constexpr int B = WIDTHS[I], FIRST = words_before(I), SECOND = FIRST + words_of(B, 0);
#pragma unroll
  for (int tile = 0; tile < BLOCK_TILES; tile++) {
    const Unit& unit = units[tile];
    float scale[2] = {half_to_float(unit.scales[0][I][0]), half_to_float(unit.scales[1][I][0])};
    float offset[2] = {scale[0] * -__int_as_float(MAGIC), scale[1] * -__int_as_float(MAGIC)};  // exact: 1.5 * 2^23 has two bits, fp16 eleven
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 a[4];
      decode<B>(unit.codes[0] + FIRST, unit.codes[0] + SECOND, step, a[0], a[2]);
      decode<B>(unit.codes[1] + FIRST, unit.codes[1] + SECOND, step, a[1], a[3]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int c[4];
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
            : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(fragment[j][0]), "r"(fragment[j][1]), "r"(MAGIC));
        float* v = value[tile * STEPS + step][j];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float product = fmaf(scale[i / 2], __int_as_float(c[i]), offset[i / 2]);
          v[i] = I ? v[i] + product : product;
        }
      }
    }
  }
  if constexpr (I + 1 < PASSES) dense_pass<I + 1>(units, fragment, value);
}

__device__ __forceinline__ u32 pack_pair(float low, float high) {
  u32 d;
#if X_TYPE == 1
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
  return d;
}

__device__ __forceinline__ void store_dense(const Params& p, i64 row, int k, const float* v) {
  if (k >= p.in) return;
  i64 index = row * p.in + k;
#if X_TYPE == 0
  float* y = (float*)p.y + index;
  if (p.vectors) {
    ((float4*)y)[0] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4*)y)[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    for (int i = 0; i < 8; i++)
      if (k + i < p.in) y[i] = v[i];
  }
#else
  u16* y = (u16*)p.y + index;
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (k + i < p.in) y[i] = X_TYPE == 1 ? float_to_half(v[i]) : float_to_bfloat(v[i]);
#endif
}

// One warp: block k of every gridDim.y-th strip of 16 rows. The next strip's codes load while it works on one.
// BY_ROWS: 16-bit results go through `piece`, swizzled, so that rows are written side by side, 16 bytes a lane.
template <bool BY_ROWS>
__device__ __forceinline__ void dequantize_block(const Params& p, int k, u8* piece) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  Unit units[BLOCK_TILES];
  auto fetch = [&](int first) {
    i64 from[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      i64 read = min(first + g + 8 * h, p.tokens - 1);
      from[h] = p.ids ? p.ids[read] : p.first_row + read;
      if (p.ids && (from[h] < 0 || from[h] >= p.out)) __trap();  // as torch's own embedding: a device-side assertion
    }
#pragma unroll
    for (int i = 0; i < BLOCK_TILES; i++) load_pass<0>(p, units[i], (int)from[0], (int)from[1], k + i * TILE, t);
  };
  fetch(blockIdx.y * 16);
  u32 fragment[4][2];
#pragma unroll
  for (int j = 0; j < 4; j++)
    fragment[j][0] = hadamard_fragment(j, lane, 0), fragment[j][1] = hadamard_fragment(j, lane, 1);
#if SCALED  // a, with the normalisation of H
  const float norm = !ROTATE ? 1.f : BLOCK == 128 ? 0.08838834764831845f : BLOCK == 64 ? 0.125f : 0.17677669529663687f;
  float a[BLOCK_STEPS][8];
#pragma unroll
  for (int s = 0; s < BLOCK_STEPS; s++) {
    channel_scales(p, k + s / STEPS * TILE + t * LANE + s % STEPS * 8, a[s]);
#pragma unroll
    for (int i = 0; i < 8; i++) a[s][i] *= norm;
  }
#endif
#pragma unroll 1
  for (int first = blockIdx.y * 16; first < p.tokens; first += gridDim.y * 16) {
    float value[BLOCK_STEPS][4][4];
    dense_pass<0>(units, fragment, value);
    if (first + gridDim.y * 16 < p.tokens) fetch(first + gridDim.y * 16);
#if ROTATE
    // the input bits that number the steps
#pragma unroll
    for (int bit = 1; bit < BLOCK_STEPS; bit *= 2) {
#pragma unroll
      for (int s = 0; s < BLOCK_STEPS; s++) {
        if (s & bit) continue;
#pragma unroll
        for (int i = 0; i < 16; i++) {
          float low = value[s][i / 4][i % 4], high = value[s | bit][i / 4][i % 4];
          value[s][i / 4][i % 4] = low + high, value[s | bit][i / 4][i % 4] = low - high;
        }
      }
    }
#endif
#pragma unroll
    for (int s = 0; s < BLOCK_STEPS; s++) {
      int within = s / STEPS * TILE + t * LANE + s % STEPS * 8;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int row = g + 8 * h;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          v[i] = value[s][i / 2][2 * h + i % 2];
#if SCALED
          v[i] *= a[s][i];
#endif
        }
        if constexpr (BY_ROWS) {
          int chunk = within / 8 ^ within / 64 ^ (row & 1) * 2;
          *(uint4*)(piece + row * (BLOCK * 2) + chunk * 16) =
              make_uint4(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]), pack_pair(v[6], v[7]));
        } else if (first + row < p.tokens) {
          store_dense(p, first + row, k + within, v);
        }
      }
    }
    if constexpr (BY_ROWS) {
      constexpr int CHUNKS = BLOCK / 8, AT_ONCE = 32 / CHUNKS;  // of a row; rows of a store
      int chunk = lane % CHUNKS, row = lane / CHUNKS, rows = p.tokens - first;
      u8* to = (u8*)p.y + ((i64)(first + row) * p.in + k) * 2 + chunk * 16;
      __syncwarp();
      if (k + chunk * 8 >= p.in) rows = 0;
#pragma unroll
      for (int i = 0; i < 16 / AT_ONCE; i++, row += AT_ONCE) {
        uint4 q = *(const uint4*)(piece + row * (BLOCK * 2) + (chunk ^ chunk / 8 ^ (row & 1) * 2) * 16);
        if (row < rows) *(uint4*)(to + (i64)i * AT_ONCE * p.in * 2) = q;
      }
      __syncwarp();
    }
  }
}

#ifndef COLUMNS  // a module of middle.cu has only its own kernels
// Several passes, and from sm_100 on 6 bits, need more registers than three CTAs leave.
static constexpr bool THREE_CTAS = PASSES == 1 && (WIDTHS[0] != 6 || __CUDA_ARCH__ < 1000);
// y[r] = dense[first_row + r] (or dense[ids[r]]) for p.tokens rows.
extern "C" __global__ void __launch_bounds__(128, THREE_CTAS ? 3 : 2)
    tqw_dequantize(const __grid_constant__ Params p) {
  __shared__ __align__(16) u8 shared[4][16 * BLOCK * 2];
  int warp = threadIdx.x / 32, k = (blockIdx.x * 4 + warp) * BLOCK;
  take_over();
  if (k >= IN_PADDED) return;
  if (X_TYPE != 0 && p.vectors)
    dequantize_block<true>(p, k, shared[warp]);
  else
    dequantize_block<false>(p, k, shared[warp]);
}
#endif
