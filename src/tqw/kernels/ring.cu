// How the decode kernel divides a weight among CTAs and warps, and the codes on their way to a warp. After codes.cu.
//
// A strip is 16 rows. The warps that share one take turns of a tile or two; each warp copies the codes of its next turns to
// shared memory, where only it reads them: a slot of the ring for each.
//
// WARPS, SHARE       warps of a CTA, and those of them that share a strip's tiles: one takes share, share + SHARE, ...
// TURN_TILES         tiles side by side that a warp takes at once: 1 or 2
// RING               turns whose codes a warp has on their way
// SMALL              1: fewer than 16 outputs

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
  if constexpr (W >= 4) {
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
  int other = 0;
  if (B == 2) other = SUB == 128 ? row & 2 : 0;
  if (B == 4) other = SUB == 128 ? (row & 1) * 4 : SUB == 64 ? row & 2 : row >> 1 & 3;
  if (B == 8) other = SUB == 128 ? 0 : SUB == 64 ? (row & 1) * 4 : (row & 3) * 2;
  if (B == 5 && SUB == 128) row = (row & ~3) + (row & 1) * 2 + (row >> 1 & 1);
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
// Byte offset within a strip of the first piece of a plane that a lane copies.
template <int B, int PLANE>
__device__ __forceinline__ i64 first_piece(const Params& p, const Place& place) {
  constexpr int OF_ROW = lane_bytes(B, PLANE) / 4;
  int row = OF_ROW == 1 ? place.lane % 16 : place.lane / OF_ROW;
  if (SMALL) row = min(row, p.out - 1);
  return row * ((i64)IN_PADDED / 8 * B) + code_offset(B, PLANE, place.first, 0) + place.lane % OF_ROW * 16;
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
  int t = place.lane & 3;
  strip.codes[I] = p.packed[I] + row * STRIDE;
  if constexpr (SIDE_BY_SIDE)
    strip.codes[I] += place.first / 8 * B;
  else if constexpr (BY_ROWS<B>)
    strip.codes[I] += first_piece<B, 0>(p, place);
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
    if constexpr (W1 > 0)
      stage_rows<W1>(p, at + 64 * W0, codes + (first_piece<B, 1>(p, place) - first_piece<B, 0>(p, place)), STRIDE, lane);
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
