// Packed codes: where they are in memory (docs/format.md), and how they become int8 levels. After common.cu.
//
// The stored row-major bytes are read as they are. A tile is TILE inputs, a weight scale for SUB of them; lane t of a quad
// covers their codes [t SUB/4, (t+1) SUB/4), eight for each step of an mma, so the k order of the mma is a permutation of the
// inputs that is the identity within a lane, but for the order of eight (EVENS_FIRST).

__host__ __device__ constexpr int plane_width(int bits, int plane) {
  return plane == 0 ? (bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits) : bits == 6 ? 2 : 1;
}
__host__ __device__ constexpr int plane_count(int bits) { return bits == 3 || bits == 5 || bits == 6 ? 2 : 1; }

// ------------------------------------------------------------------------------------------------------ codes to levels

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

// ------------------------------------------------------------------------------------------------------- a lane's codes

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
