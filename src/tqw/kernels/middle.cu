// y = T(x) V^T + b for dozens of tokens and more, on sm_90. After fp16.cu or, COARSE, int8.cu.
//
// Decoded weights are the A operand, straight from registers; T(x) is the B operand in shared memory, where each stage is one
// bulk copy: tqw_spread writes it in that order.
//
// A CTA computes ROWS = 64 WARPGROUPS outputs of COLUMNS tokens over 1 / SPLIT of the inputs. The SPLIT CTAs add up, in a
// fixed order, as a cluster, each some of the columns, in its shared memory; or (APART) through global memory, where the
// last to come adds up: that takes longer, but clusters of more than two leave multiprocessors idle, and nobody waits for
// anybody.
//
// COLUMNS    tokens of a CTA: a multiple of 8, to 256   WARPGROUPS   1, 2
// SPLIT      parts of the inputs                        STAGES       stages of the ring
// COARSE     1: T(x) and V of 8 bits; one pass, PLANES = 1, SPREAD = SPLIT: scales for each part
// APART      1: the CTAs that share the inputs are no cluster (COARSE)
// EXPERTS    1: a token is a pair (token, expert), a CTA's columns are pairs of one expert, which tqw_route brings
//            together (SPREAD = SPLIT = 1); nothing on the host depends on the ids

static_assert(TILE == 128 && (COARSE || !APART), "a stage is 128 inputs");
static constexpr int THREADS = 128 * WARPGROUPS, ROWS = 64 * WARPGROUPS, COLUMN_BYTES = 2 * ROWS + 16;
// Sums of eight columns are added up and stored by one CTA of the cluster; each has at most OWNED of these octets.
static constexpr int OCTETS = COLUMNS / 8, OWNED = (OCTETS + CLUSTER - 1) / CLUSTER, OCTET_BYTES = 16 * THREADS;
__host__ __device__ constexpr int owner_of(int octet) { return octet * CLUSTER / OCTETS; }
__host__ __device__ constexpr int first_octet(int owner) { return (owner * OCTETS + CLUSTER - 1) / CLUSTER; }
// Behind what the other CTAs bring lie the outputs.
static constexpr int BROUGHT_BYTES = (CLUSTER - 1) * OWNED * OCTET_BYTES, END_BYTES = BROUGHT_BYTES + OWNED * 8 * COLUMN_BYTES;
static constexpr int RING_BYTES = STAGES * STAGE_BYTES > END_BYTES ? STAGES * STAGE_BYTES : END_BYTES;

// ------------------------------------------------------------------------------------------- operands and sums

#if COARSE
// A of two k32 steps of a tile, by the levels of its two rows.
__device__ __forceinline__ void prepare(const LaneLevels& levels, const RowLevels* rows, const Unit& unit, int half, u32 (*a)[4]) {
#pragma unroll
  for (int s = 0; s < 2; s++) {
#pragma unroll
    for (int h = 0; h < 2; h++) decode_row(levels, rows[h], unit.codes[h], 2 * half + s, a[s][h], a[s][h + 2]);
  }
}
#else
static constexpr bool ROOM = COLUMNS < 128 || MIN_CTAS == 1;  // registers for the words of the table

// A of the four k16 steps of half a tile, for pass I.
template <int I>
__device__ __forceinline__ void prepare(const KeptLevels<4, BIAS>& table, const Unit& unit, int half, u32 (*a)[4]) {
  constexpr int B = WIDTHS[I], FIRST = words_before(I), SECOND = FIRST + words_of(B, 0);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 scale = unit.scales[h][I][0] * 0x10001u;
#pragma unroll
    for (int s = 0; s < 2; s++) {
      u32 biased[2];
      if constexpr (PAIRS) {
        u32 v[4];
        levels_of_pairs<B>(unit.codes[h], unit.codes[h] + SECOND, 2 * half + s, v);
#pragma unroll
        for (int i = 0; i < 4; i++) a[2 * s + i / 2][h + i % 2 * 2] = half2_multiply(half2_subtract(v[i], half2_of(1536)), scale);
        continue;
      } else if constexpr (B == 4 && ROOM) {
        decode<B>(table, unit.codes[h] + FIRST, unit.codes[h] + SECOND, 2 * half + s, biased[0], biased[1]);
      } else {
        decode<B>(unit.codes[h] + FIRST, unit.codes[h] + SECOND, 2 * half + s, biased[0], biased[1]);
        biased[0] ^= BIAS, biased[1] ^= BIAS;
      }
      to_half(biased[0], scale, a[2 * s][h], a[2 * s][h + 2]);
      to_half(biased[1], scale, a[2 * s + 1][h], a[2 * s + 1][h + 2]);
    }
  }
}

// Issues half a tile of pass I and of the passes after it; two sets of A take turns, so that decoding the next overlaps.
template <int I>
__device__ __forceinline__ void multiply_half(const KeptLevels<4, BIAS>& table, const Unit& unit, int half, u64 b, float* d,
                                              u32 (*a)[4][4]) {
  prepare<I>(table, unit, half, a[half]);
  fence_sums();
#pragma unroll
  for (int s = 0; s < 4; s++) multiply_async(d, a[half][s], b + 2 * s);
  commit_products();
  if constexpr (I + 1 < PASSES) {
    wait_products<0>();
    multiply_half<I + 1>(table, unit, half, b, d, a);
  }
}
#endif

#if APART
// The sums of all CTAs that share a tile, in the one that comes last; false: in another.
__device__ __forceinline__ bool add_parts(const Params& p, int tile, int rank, float* sums, int* earlier) {
  float4* part = p.parts + (i64)tile * SPLIT * OCTETS * THREADS + threadIdx.x;
#pragma unroll
  for (int i = 0; i < OCTETS; i++)
    part[(rank * OCTETS + i) * THREADS] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *earlier = atomicAdd(p.arrived + tile, 1);
  __syncthreads();
  if (*earlier < SPLIT - 1) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < OCTETS; i++) {
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int r = 0; r < SPLIT; r++) {
      float4 v = __ldcg(part + (r * OCTETS + i) * THREADS);
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    sums[4 * i] = total.x, sums[4 * i + 1] = total.y, sums[4 * i + 2] = total.z, sums[4 * i + 3] = total.w;
  }
  return true;
}
#endif

#if CLUSTER > 1
// The sums of all CTAs of the cluster, in the owner of each octet: written to it, since to read there takes twice as long.
// Before, its ring is done with.
__device__ __forceinline__ void add_octets(u8* brought, int rank, float* sums) {
  u32 mine = shared_address(brought) + threadIdx.x * 16;
#pragma unroll
  for (int i = 0; i < OCTETS; i++) {
    const int owner = owner_of(i), place = i - first_octet(owner);
    if (rank != owner)
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                       address_of_rank(mine + ((rank - (rank > owner)) * OWNED + place) * OCTET_BYTES, owner)),
                   "f"(sums[4 * i]), "f"(sums[4 * i + 1]), "f"(sums[4 * i + 2]), "f"(sums[4 * i + 3])
                   : "memory");
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int i = 0; i < OCTETS; i++) {
    if (rank != owner_of(i)) continue;
    const u8* from = brought + threadIdx.x * 16 + (i - first_octet(rank)) * OCTET_BYTES;
#pragma unroll
    for (int other = 0; other < CLUSTER - 1; other++) {
      float4 v = *(const float4*)(from + other * OWNED * OCTET_BYTES);
      sums[4 * i] += v.x, sums[4 * i + 1] += v.y, sums[4 * i + 2] += v.z, sums[4 * i + 3] += v.w;
    }
  }
}
#endif

// 16 rows of eight columns, of a warp, transposed: a column's rows side by side. to: of a lane's column, of its eight rows.
__device__ __forceinline__ void store_transposed(u32 to, u32 upper, u32 lower) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(upper), "r"(lower) : "memory");
}

// What a CTA computes, or those that share the inputs: ROWS outputs of COLUMNS tokens. CTAs that run at the same time
// share rows, whose codes then come from memory once, and tokens.
struct Cell {
  int rows, block;
};
__device__ __forceinline__ Cell cell_of_cta() {
  int rows = blockIdx.x / SPLIT, block = blockIdx.y;
  if (EXPERTS || gridDim.y == 1) return {rows, block};
  constexpr int ABREAST = 4;  // blocks of tokens that pass over the rows together
  int of_block = gridDim.x / SPLIT, number = block * of_block + rows, first = number / (of_block * ABREAST) * ABREAST;
  int within = number - first * of_block, blocks = min(ABREAST, (int)gridDim.y - first);
  return {within / blocks, first + within % blocks};
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) tqw_middle(const __grid_constant__ Params given) {
  Cell here = cell_of_cta();
#if EXPERTS
  wait_for_previous_kernel();  // whose weights these are is known only now
  int tokens = given.block[blockIdx.y].y;
  if (tokens == 0) return;
  const Params p = of_expert(given);
#else
  const Params& p = given;
  int tokens = min(COLUMNS, p.tokens - here.block * COLUMNS);
#endif
  extern __shared__ __align__(1024) u8 ring[];  // stages, later sums and outputs; barriers; scales of the tokens
  float* scale_of = (float*)(ring + RING_BYTES + 16 * STAGES);
  int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int rank = blockIdx.x % SPLIT, first_row = here.rows * ROWS, first_token = here.block * COLUMNS;
  int begin = TILES * rank / SPLIT, end = TILES * (rank + 1) / SPLIT;
  int row0 = min(first_row + warp * 16 + g, p.out - 1), row1 = min(first_row + warp * 16 + g + 8, p.out - 1);
  u32 full = shared_address(ring + RING_BYTES), empty = full + 8 * STAGES, stage0 = shared_address(ring);

  constexpr int AHEAD = COARSE && WIDTHS[0] <= 4 ? 4 : 2;  // tiles whose codes are on their way
  Unit units[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) load_pass<0>(p, units[i], row0, row1, min(begin + i, end - 1) * TILE, t);
#if COARSE
  float steps[2];
  row_scales(p, row0, row1, begin, end, t, steps);
#pragma unroll
  for (int h = 0; h < 2; h++) steps[h] = steps_of_row(steps[h]);
#endif
  if (threadIdx.x == 0) {
    constexpr int ARRIVALS = (EVERY_LANE ? 128 : 4) * WARPGROUPS;
    for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, ARRIVALS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();
  const u8* x = p.planes + (i64)here.block * TILES * STAGE_BYTES;
  auto fill = [&](int stage, int tile) {
    barrier_expect(full + 8 * stage, STAGE_BYTES);
    copy_bulk(stage0 + stage * STAGE_BYTES, x + (i64)tile * STAGE_BYTES, STAGE_BYTES, full + 8 * stage);
  };
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES && begin + i < end; i++) fill(i, begin + i);
  const float* x_scales = p.plane_scale + (COARSE ? rank * gridDim.y * COLUMNS : 0) + first_token;
  for (int i = threadIdx.x; i < tokens; i += THREADS)  // needed at the end, and a long way off
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(scale_of + i)), "l"(x_scales + i)
                 : "memory");

  Sum d[COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) d[i] = 0;
  int stage = 0, parity = 0, tile = begin;
  auto stage_before = [&](int by) { return stage >= by ? stage - by : stage - by + STAGES; };
  // A stage is filled again LAG tiles after its own, when the slowest warp is likely to be done with it.
  constexpr int LAG = STAGES >= 4 ? 2 : 1;
  auto fill_again = [&] {
    int next = tile - LAG + STAGES, free = stage_before(LAG);
    if (threadIdx.x == 0 && tile >= begin + LAG && next < end) {
      barrier_wait(empty + 8 * free, parity ^ (free > stage));
      fill(free, next);
    }
    __syncwarp();
  };
  auto release_last = [&] {  // the tile before is done
    if (tile > begin && (EVERY_LANE || lane == 0)) barrier_arrive(empty + 8 * stage_before(1));
  };
  auto advance = [&] {
    if (++stage == STAGES) stage = 0, parity ^= 1;
    return ++tile < end;
  };
#if COARSE
  LaneLevels levels = lane_levels(t);
  RowLevels rows[2] = {row_levels(), row_levels()};
  u32 a[2][2][4];
  // Half a tile is multiplied while the next half is decoded.
  auto work = [&](Unit& unit) {
#pragma unroll
    for (int h = 0; h < 2; h++) set_group(rows[h], levels, steps_of_level(steps[h], unit.scales[h][0][0]));
    prepare(levels, rows, unit, 0, a[0]);
    barrier_wait(full + 8 * stage, parity);
    u64 b = descriptor(stage0 + stage * STAGE_BYTES);
    fence_sums();
#pragma unroll
    for (int s = 0; s < 2; s++) multiply_async(d, a[0][s], b + 2 * s);
    commit_products();
    wait_products<1>();
    release_last();
    fill_again();
    prepare(levels, rows, unit, 1, a[1]);
    load_pass<0>(p, unit, row0, row1, min(tile + AHEAD, end - 1) * TILE, t);
    fence_sums();
#pragma unroll
    for (int s = 0; s < 2; s++) multiply_async(d, a[1][s], b + 4 + 2 * s);
    commit_products();
    wait_products<1>();
    return advance();
  };
  while (work(units[0]) && work(units[1]) && work(units[2 % AHEAD]) && work(units[3 % AHEAD])) {
  }
#else
  u32 a[2][4][4];
  const KeptLevels<4, BIAS> table = kept_levels<4, BIAS>();
  auto work = [&](Unit& unit) {
    barrier_wait(full + 8 * stage, parity);
    u64 b = descriptor(stage0 + stage * STAGE_BYTES);
    multiply_half<0>(table, unit, 0, b, d, a);
    wait_products<1>();
    release_last();
    fill_again();
    multiply_half<0>(table, unit, 1, b + COLUMNS * 128 / 16, d, a);
    wait_products<1>();
    load_pass<0>(p, unit, row0, row1, min(tile, end - 3) * TILE + 2 * TILE, t);
    return advance();
  };
  while (work(units[0]) && work(units[1])) {
  }
#endif
  wait_products<0>();
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  auto column_of = [&](int i) { return i / 4 * 8 + 2 * t + i % 2; };
#if CLUSTER > 1
  cluster_arrive();
#endif
#if COARSE
  float step[2];
#pragma unroll
  for (int h = 0; h < 2; h++) step[h] = steps[h] > 0.f ? 1.f / steps[h] : 0.f;
#endif
  float total[COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) {
    total[i] = d[i] * scale_of[column_of(i)];
#if COARSE
    total[i] *= step[i % 4 / 2];
#endif
  }
#if APART
  if (!add_parts(p, here.block * (gridDim.x / SPLIT) + here.rows, rank, total, (int*)scale_of)) return;
#endif
#if CLUSTER > 1
  cluster_wait();
  add_octets(ring, rank, total);
#endif

  int owner = CLUSTER > 1 ? rank : 0, first_column = 8 * first_octet(owner);
  int columns = min(tokens, 8 * first_octet(owner + 1)) - first_column;
#if EXPERTS
  auto output = [&](int column) { return p.pair[first_token + first_column + column]; };
#else
  auto output = [&](int column) { return first_token + first_column + column; };
#endif
#if X_TYPE == 0
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) {
    int column = column_of(i) - first_column, row = first_row + warp * 16 + g + i % 4 / 2 * 8;
    if (owner_of(i / 4) == owner && column < columns && row < p.out) store_output(p, output(column), row, total[i]);
  }
#else
  // Through shared memory, so that rows are written side by side.
  const u16* biases = (const u16*)p.bias;
  float bias[2] = {biases ? value_16(biases[row0]) : 0.f, biases ? value_16(biases[row1]) : 0.f};
  u8* outputs = ring + BROUGHT_BYTES;
  u32 to = shared_address(outputs) + (lane & 7) * COLUMN_BYTES + (warp * 16 + (lane & 8)) * 2;
#pragma unroll
  for (int i = 0; i < OCTETS; i++) {
    const float* v = total + 4 * i;
    if (owner_of(i) == owner)
      store_transposed(to + (8 * i - first_column) * COLUMN_BYTES, pack_pair(v[0] + bias[0], v[1] + bias[0]),
                       pack_pair(v[2] + bias[1], v[3] + bias[1]));
  }
  __syncthreads();
  bool whole = p.out % 8 == 0 && (u64)p.y % 16 == 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < columns * (ROWS / 8); i += THREADS) {
    int column = i / (ROWS / 8), row = i % (ROWS / 8) * 8;
    const u8* from = outputs + column * COLUMN_BYTES + row * 2;
    u16* y = (u16*)p.y + (i64)output(column) * p.out + first_row + row;
    if (whole && first_row + row < p.out) *(uint4*)y = *(const uint4*)from;
    for (int j = 0; !whole && j < 8 && first_row + row + j < p.out; j++) y[j] = ((const u16*)from)[j];
  }
#endif
}
