// y = T(x) V^T + b for a few tokens, one launch or two. After inputs.cu and ring.cu.
//
// T(x) is held as fixed point with one scale for each token and tile of TILE inputs: 16 bits in two int8 planes,
// T(x) = s (256 high + low), or 8 bits in one. Weights are the A operand of mma.m16n8k32 (int8, exact int32 sums); the
// planes of one token are neighbouring columns of B, so one lane holds both sums and 256 high + low is local. One fp32
// multiply-add for each (row, token, tile) applies weight_scale * s. Codes become int8 levels by byte permutes.
//
// PLANES     of T(x): 2, or 1 with less work for many tokens
// NT         columns tiles of 8 / PLANES tokens      FUSED     1: of one token in the product; 0: tqw_transform comes first
// EARLY              of the turns whose codes a warp has on their way those that it asks for before x (ring.cu)
// UNROLL             turns side by side in the loop: its instructions should fit in their cache
// HALVES             1: 4-bit codes as a sum of two products (fewer instructions for few tokens)
// MIN_CTAS           CTAs of one multiprocessor: 2 lets the next kernel fetch its codes while this one ends

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
