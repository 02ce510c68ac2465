// y = T(x) V^T + b for a few tokens, one launch or two. After codes.cu and inputs.cu.
//
// T(x) is held as fixed point with one scale for each token and tile of TILE inputs: 16 bits in two int8 planes,
// T(x) = s (256 high + low), or 8 bits in one. Weights are the A operand of mma.m16n8k32 (int8, exact int32 sums); the
// planes of one token are neighbouring columns of B, so one lane holds both sums and 256 high + low is local. One fp32
// multiply-add for each (row, token, tile) applies weight_scale * s. Codes become int8 levels by byte permutes.
//
// PLANES     of T(x): 2, or 1 with less work for many tokens
// NT         columns tiles of 8 / PLANES tokens      FUSED     1: of one token in the product; 0: tqw_transform comes first
// WARPS, SHARE       warps of a CTA, and those of them that share a strip's tiles: one takes share, share + SHARE, ...
// TURN_TILES         tiles side by side that a warp takes at once: 1 or 2
// RING, EARLY        turns whose codes a warp has on their way, and those that it asks for before x
// UNROLL             turns side by side in the loop: its instructions should fit in their cache
// HALVES             1: 4-bit codes as a sum of two products (fewer instructions for few tokens)
// MIN_CTAS           CTAs of one multiprocessor: 2 lets the next kernel fetch its codes while this one ends
// SMALL              1: fewer than 16 outputs

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

#if !FUSED
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
#endif

// ---------------------------------------------------------------------------------------------------------- the product

__device__ __forceinline__ void multiply(int* c, const u32* a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// To the shared memory of any CTA of the cluster.
__device__ __forceinline__ void store_shared(u32 to, float value) {
#if SPLIT > 1
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
#else
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
#endif
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
