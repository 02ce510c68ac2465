// y = T(x) V^T + b for prompts, on sm_90. After int8.cu, whose arithmetic it has with one part of the inputs.
//
// V is decoded once for all tokens, into memory that mostly stays in the L2 cache (middle.cu decodes it again for each
// 256 tokens, and what that takes of the card's power its products lack), by warps of the kernel that multiplies.
//
// In memory T(x) is [blocks of 128 tokens][tiles][128 tokens][128 bytes], V [blocks of 256 rows][tiles][256 rows][128
// bytes], bytes 64 i + 16 t + j of a row the inputs 32 t + 16 i + j, chunks of 16 bytes swizzled: a stage of the ring is
// two bulk copies.
//
// A cluster of two CTAs computes cells of 256 tokens times 256 rows, one after the other, each CTA half of the tokens: V
// comes by multicast, a half from each. Of a CTA's twelve warps eight multiply, two warpgroups with 64 tokens each; one
// fetches, up to STAGES tiles ahead, of the next cell, too, while the others store; three decode.
//
// Nobody waits for a CTA that does not run yet: strips of V go to whoever asks, and cells wait for strips only.
//
// DECODED    tiles of a strip of V       FETCHED    1: rows of x come to shared memory (as many inputs as to need it)

static constexpr int ROWS = 256, ROWS_BYTES = ROWS * TILE, STAGE = ROWS_BYTES + STAGE_BYTES;
static constexpr int ABREAST = 8;  // pairs of token blocks that pass over the rows together
static_assert(COLUMNS == 128 && CLUSTER == 2 && SPREAD == 1, "a cell is 256 tokens");

// --------------------------------------------------------------------------------------------------- T(x) in memory

// The largest weight scales of rows, two for each quad of lanes.
__device__ __forceinline__ void measure_rows(const Params& p, int cta) {
  int row = (cta * SPREAD_THREADS + threadIdx.x) / 4 * 2, t = threadIdx.x & 3;
  float most[2];
  row_scales(p, min(row, p.out - 1), min(row + 1, p.out - 1), 0, TILES, t, most);
  wait_for_previous_kernel();
  if (t < 2 && row + t < p.out) p.row_scale[row + t] = t ? most[1] : most[0];
}

// Of a warp: eight blocks of 128 inputs, each sixteen chunks of eight. The chunks are multiplied by H of 16 on the tensor
// cores. TF32 keeps 11 bits: all that bfloat16 times a channel scale of three bits has; of float16 the other three follow.
static constexpr int OF_WARP = 8 * 128, OF_CTA = OF_WARP * SPREAD_THREADS / 32;
// As many CTAs as have registers enough on a multiprocessor.
static constexpr int SPREAD_CTAS = OF_CTA < IN_PADDED ? 1 : (FETCHED ? 896 : 1024) / SPREAD_THREADS;
struct Chunks {
  float v[4][8];
};
// The first input of a lane's c-th chunk: before H, t + 4 c of block g; then, g + 8 (c / 2) of block 2 t + c % 2.
__device__ __forceinline__ int chunk_of_x(int c) { return (threadIdx.x >> 2 & 7) * 128 + ((threadIdx.x & 3) + 4 * c) * 8; }
__device__ __forceinline__ int chunk_of_sums(int c) {
  return (2 * (threadIdx.x & 3) + c % 2) * 128 + ((threadIdx.x >> 2 & 7) + c / 2 * 8) * 8;
}
// d = c + H x for two of a lane's chunks of x, the lower ones or (UPPER) the others; a, b: signs of H.
template <bool UPPER>
__device__ __forceinline__ void multiply_chunks(float* d, const float* c, u32 a, u32 b, float x0, float x1) {
  constexpr u32 FLIP = UPPER ? 1u << 31 : 0;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a), "r"(a ^ FLIP), "r"(b), "r"(b ^ FLIP), "r"(__float_as_uint(x0)), "r"(__float_as_uint(x1)), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
// H / NORM of x, and the largest of `most` and all sums.
__device__ __forceinline__ float hadamard_of_chunks(Chunks& x, float most) {
  int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
  u32 a = __float_as_uint(1.f) | __popc(g & t) << 31, b = __float_as_uint(1.f) | __popc(g & (t + 4)) << 31;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    constexpr float ZERO[4] = {};
    float d[4], v[4] = {x.v[0][i], x.v[1][i], x.v[2][i], x.v[3][i]};
    multiply_chunks<false>(d, ZERO, a, b, v[0], v[1]);
    multiply_chunks<true>(d, d, a, b, v[2], v[3]);
    if (X_TYPE != 2) {
#pragma unroll
      for (int c = 0; c < 4; c++) v[c] -= __uint_as_float(__float_as_uint(v[c]) & 0xFFFFE000u);
      multiply_chunks<false>(d, d, a, b, v[0], v[1]);
      multiply_chunks<true>(d, d, a, b, v[2], v[3]);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) x.v[c][i] = d[c];
  }
#pragma unroll
  for (int c = 0; c < 4; c++) hadamard_of_eight(x.v[c]), most = most_of_eight(x.v[c], most);
  return most;
}

// T(x) of some tokens for each CTA, one after the other; FETCHED and VECTORS: while the next two are on their way.
template <bool VECTORS>
__device__ __forceinline__ void spread_tokens(const Params& p, int ctas) {
  constexpr int ROW_BYTES = 2 * IN_PADDED;
  constexpr bool AHEAD = FETCHED && VECTORS;
  extern __shared__ __align__(128) u8 rows_of_x[];  // two; their barriers
  u32 row0 = shared_address(rows_of_x), arrived = row0 + 2 * ROW_BYTES;
  int first = threadIdx.x / 32 * OF_WARP;
  auto channel_of = [&](int k) {
    return !VECTORS ? channel_bytes(p, k) : k < p.in ? *(const uint2*)(p.channel + k) : make_uint2(0, 0);
  };
  uint2 channel[4];
  auto read_channels = [&](int from) {
#pragma unroll
    for (int c = 0; c < 4; c++) channel[c] = channel_of(from + chunk_of_x(c));
  };
  if (!FETCHED) read_channels(first);
  if (AHEAD) {
    if (threadIdx.x == 0) {
      barrier_init(arrived, 1), barrier_init(arrived + 8, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }
  wait_for_previous_kernel();
  auto fetch = [&](int token, int slot) {
    if (!AHEAD || threadIdx.x || token >= p.tokens) return;
    barrier_expect(arrived + 8 * slot, 2 * p.in);
    copy_bulk(row0 + slot * ROW_BYTES, (const u16*)p.x + (i64)token * p.x_stride, 2 * p.in, arrived + 8 * slot);
  };
  fetch(blockIdx.x, 0), fetch(blockIdx.x + ctas, 1);
  clear_counts(p, blockIdx.x * SPREAD_THREADS + threadIdx.x, ctas * SPREAD_THREADS);
  int chunk = chunk_of_sums(0) / 8 % 16, place_of_sums = chunk / 2 % 2 * 64 + chunk / 4 * 16 + chunk % 2 * 8;
  int turn = 0;
  for (int token = blockIdx.x; token < p.tokens; token += ctas, turn++) {
    int slot = turn & 1;
    i64 row = token * p.x_stride;
    auto read = [&](int from, Chunks& x) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        int k = from + chunk_of_x(c);
        Raw raw = {};
        if (!VECTORS)
          raw = load_raw(p, row, k);
        else if (k < p.in)
          read_words<16>(raw.words, AHEAD ? rows_of_x + slot * ROW_BYTES + 2 * k : (const u8*)((const u16*)p.x + row + k));
        scaled_values(raw, channel[c], x.v[c]);
      }
    };
    if (FETCHED) read_channels(first);  // kept, they would become floats, in four times as many registers
    if (AHEAD) barrier_wait(arrived + 8 * slot, turn >> 1 & 1);
    Chunks x;
    read(first, x);
    __syncwarp();  // or the compiler doubts that lanes are together
    float most = hadamard_of_chunks(x, 0.f);
    if constexpr (OF_CTA < IN_PADDED) {
#pragma unroll 1
      for (int from = first + OF_CTA; from < IN_PADDED; from += OF_CTA) {  // the rest is read again
        Chunks more;
        read_channels(from), read(from, more), most = hadamard_of_chunks(more, most);
      }
    }
    TokenScale of_token = token_scale(most_of_warps<SPREAD_THREADS / 32>(most, slot));
    if (OF_CTA >= IN_PADDED) fetch(token + 2 * ctas, slot);  // all have read the row
    if (threadIdx.x == 0) p.plane_scale[token] = of_token.scale;
    u8* column = p.planes + (i64)(token / COLUMNS) * TILES * STAGE_BYTES + token % COLUMNS * 128;
    auto store = [&](int from) {
      int k = from + chunk_of_sums(0), place = place_of_sums ^ token % 8 * 16;
#pragma unroll
      for (int c = 0; c < 4; c++) {  // 128 inputs further if odd, 64 in the upper half
        uint2 eight = make_uint2(in_8_bits(x.v[c], 0, of_token.inverse), in_8_bits(x.v[c], 1, of_token.inverse));
        if (k + c % 2 * 128 < IN_PADDED) *(uint2*)(column + (k / TILE + c % 2) * STAGE_BYTES + (place ^ c / 2 * 32)) = eight;
      }
    };
    store(first);
    if constexpr (OF_CTA < IN_PADDED) {
#pragma unroll 1
      for (int from = first + OF_CTA; from < IN_PADDED; from += OF_CTA) {
        read_channels(from), read(from, x), hadamard_of_chunks(x, 0.f), store(from);
      }
      __syncthreads();
      fetch(token + 2 * ctas, slot);
    }
    if (!FETCHED) break;  // a CTA for each
  }
}

// The last CTAs measure rows.
extern "C" __global__ void __launch_bounds__(SPREAD_THREADS, SPREAD_CTAS) tqw_spread(const __grid_constant__ Params p) {
  int ctas = gridDim.x - (2 * p.out + SPREAD_THREADS - 1) / SPREAD_THREADS;
  allow_next_kernel();
  if ((int)blockIdx.x >= ctas)
    measure_rows(p, blockIdx.x - ctas);
  else if (p.vectors)
    spread_tokens<true>(p, ctas);
  else
    spread_tokens<false>(p, ctas);
}

// ------------------------------------------------------------------------------------------------------ V in memory

// V is decoded by strips of 16 rows and DECODED tiles. Of the blocks of rows that are computed at the same time all have
// their first tiles first, so that products can begin.
static constexpr int PARTS = (TILES + DECODED - 1) / DECODED, STRIPS = ROWS / 16;

struct StripOfV {
  Unit units[DECODED];
  int block, part, row;  // the lane's first row in the slice; its other is 8 further
};
__device__ __forceinline__ int row_of(const Params& p, const StripOfV& strip, int half) {
  return min((int)p.first_row + strip.row + 8 * half, p.out - 1);
}
__device__ __forceinline__ void load_strip(const Params& p, StripOfV& strip, int n, int blocks_of_rows, int lane) {
  int together = (gridDim.x / 2 - 1) / min(ABREAST, (p.tokens + 255) / 256) + 1, of_group = together * STRIPS * PARTS;
  int first = n / of_group * together, within = n % of_group, strips = min(together, blocks_of_rows - first) * STRIPS;
  strip.part = within / strips, strip.block = first + within % strips / STRIPS;
  strip.row = strip.block * ROWS + within % STRIPS * 16 + lane / 4;
  int row0 = row_of(p, strip, 0), row1 = row_of(p, strip, 1);
#pragma unroll
  for (int i = 0; i < DECODED; i++)
    load_pass<0>(p, strip.units[i], row0, row1, min(strip.part * DECODED + i, TILES - 1) * TILE, lane & 3);
}
__device__ __forceinline__ void decode_strip(const Params& p, const StripOfV& strip, const LaneLevels& levels, RowLevels& row,
                                             int lane) {
  int t = lane & 3;
  u8* to = p.rows + (i64)strip.block * TILES * ROWS_BYTES + strip.row % ROWS * 128;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float steps = steps_of_row(p.row_scale[row_of(p, strip, h)]);
#pragma unroll
    for (int j = 0; j < DECODED; j++) {
      int tile = strip.part * DECODED + j;
      if (TILES % DECODED && tile >= TILES) break;
      u32 v[8];  // inputs 32 t to 32 t + 32
      const Unit& unit = strip.units[j];
      set_group(row, levels, steps_of_level(steps, unit.scales[h][0][0]));
#pragma unroll
      for (int s = 0; s < 4; s++) {
        if (WIDTH >= 5) __syncwarp();  // or the compiler works on more steps at once than it has registers for
        decode_row(levels, row, unit.codes[h], s, v[2 * s], v[2 * s + 1]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
        *(uint4*)(to + (i64)tile * ROWS_BYTES + h * 1024 + (4 * i + t ^ strip.row & 7) * 16) =
            make_uint4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    }
  }
}

// How many strips of a block of rows are decoded: of each part, then of all.
__device__ __forceinline__ int* counts_of(const Params& p, int block) { return p.arrived + 1 + block * (PARTS + 1); }
__device__ __forceinline__ void count_done(int* count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
}
// What was written before the count can be read by bulk copies after it.
__device__ __forceinline__ bool has_count(const int* count, int number) {
  int now;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\nfence.proxy.async;" : "=r"(now) : "l"(count) : "memory");
  return now >= number;
}

// ------------------------------------------------------------------------------------------------------ the product

// Where in the product the n-th cell is: cells that are computed at the same time share tokens and rows, so that both
// operands are in the L2 cache.
struct Cell {
  int rows, tokens;
};
__device__ __forceinline__ Cell cell_at(int n, int blocks_of_rows, int blocks_of_tokens) {
  int first = n / (blocks_of_rows * ABREAST) * ABREAST, within = n - first * blocks_of_rows;
  int blocks = min(ABREAST, blocks_of_tokens - first);
  return {within / blocks, first + within % blocks};
}

extern "C" __global__ void __launch_bounds__(384, 1) tqw_prompt(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 ring[];  // stages; barriers; of two cells in turns the scale and bias of each row
  float2* const of_rows = (float2*)(ring + STAGES * (STAGE + 16));
  u32 stage0 = shared_address(ring), full = stage0 + STAGES * STAGE, empty = full + 8 * STAGES;
  int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int rank = blockIdx.x % 2, blocks_of_rows = (p.slice + ROWS - 1) / ROWS, blocks_of_tokens = (p.tokens + 255) / 256;
  int cells = blocks_of_rows * blocks_of_tokens, strips = blocks_of_rows * STRIPS * PARTS;
  StripOfV strip;
  if (warp > 8 && (warp - 9) * gridDim.x + blockIdx.x < strips)  // into the L2 cache: who will decode it is not known yet
    load_strip(p, strip, (warp - 9) * gridDim.x + blockIdx.x, blocks_of_rows, lane);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, EVERY_LANE ? 512 : 16);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  allow_next_kernel();
  int stage = 0, parity = 0;
  auto advance = [&] {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };
  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    wait_for_previous_kernel();
    if (warp > 8) {
      LaneLevels levels = lane_levels(t);
      RowLevels row = row_levels();
      int n = __shfl_sync(~0u, lane == 0 ? atomicAdd(p.arrived, 1) : 0, 0);
      while (n < strips) {
        load_strip(p, strip, n, blocks_of_rows, lane);
        int next = lane == 0 ? atomicAdd(p.arrived, 1) : 0;
        decode_strip(p, strip, levels, row, lane);
        __syncwarp();
        if (lane < 2) count_done(counts_of(p, strip.block) + (lane ? PARTS : strip.part));
        n = __shfl_sync(~0u, next, 0);
      }
    } else if (lane == 0) {
      for (int n = blockIdx.x / 2; n < cells; n += gridDim.x / 2) {
        Cell here = cell_at(n, blocks_of_rows, blocks_of_tokens);
        const int* counts = counts_of(p, here.rows);
        bool decoded = has_count(counts + PARTS, PARTS * STRIPS);
        const u8* v = p.rows + (i64)here.rows * TILES * ROWS_BYTES + rank * (ROWS_BYTES / 2);
        int block = min(2 * here.tokens + rank, (p.tokens - 1) / COLUMNS);  // the last may be alone
        const u8* x = p.planes + (i64)block * TILES * STAGE_BYTES;
        for (int tile = 0; tile < TILES; tile++, advance()) {
          u32 to = stage0 + stage * STAGE, barrier = full + 8 * stage;
          while (!decoded && tile % DECODED == 0 && !has_count(counts + tile / DECODED, STRIPS)) {
          }
          barrier_wait(empty + 8 * stage, parity ^ 1);
          barrier_expect(barrier, STAGE);
          copy_bulk_to_all(to + rank * (ROWS_BYTES / 2), v + (i64)tile * ROWS_BYTES, ROWS_BYTES / 2, barrier);
          copy_bulk(to + ROWS_BYTES, x + (i64)tile * STAGE_BYTES, STAGE_BYTES, barrier);
        }
      }
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    wait_for_previous_kernel();
    // The last stage is done with. Both CTAs write to it, so both learn of it. Not at cluster scope: that a release there
    // waits for all earlier stores took more than the products, and only reads came before.
    auto release_last = [&] {
      u32 barrier = empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1);
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (EVERY_LANE || lane == i)
          asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_of_rank(barrier, i)) : "memory");
    };
    int turn = 0;
    for (int n = blockIdx.x / 2; n < cells; n += gridDim.x / 2, turn ^= 1) {
      Cell here = cell_at(n, blocks_of_rows, blocks_of_tokens);
      int token = (2 * here.tokens + rank) * COLUMNS + warp * 16 + g, first = (int)p.first_row + here.rows * ROWS;
      int row = min(first + (int)threadIdx.x, p.out - 1);
      float scale[2] = {p.plane_scale[min(token, p.tokens - 1)], p.plane_scale[min(token + 8, p.tokens - 1)]};
      float2 of_row = {p.row_scale[row] * (1 / LIFT), p.bias ? value_16(((const u16*)p.bias)[row]) : 0.f};
      Sum d[128];
      for (int tile = 0; tile < TILES; tile++) {
        u32 from = stage0 + stage * STAGE;
        u64 v = descriptor(from), x = descriptor(from + ROWS_BYTES + warp / 4 * (STAGE_BYTES / 2));
        barrier_wait(full + 8 * stage, parity);
        fence_sums();
#pragma unroll
        for (int s = 0; s < 4; s++) multiply_shared(d, x + 2 * s, v + 2 * s, tile + s > 0);
        commit_products();
        wait_products<1>();
        if (tile > 0) release_last();
        advance();
      }
      wait_products<0>();
      release_last();

      of_rows[turn * ROWS + threadIdx.x] = of_row;
      asm volatile("bar.sync 1, 256;" ::: "memory");
      u16* to[2] = {(u16*)p.y + (i64)token * p.out + first, (u16*)p.y + (i64)(token + 8) * p.out + first};
      int limit = p.out - first, tokens = p.tokens - token;
      // Outputs 8 j + 2 t and the next of a token.
      auto pair = [&](int j, int h) {
        float4 two = *(const float4*)(of_rows + turn * ROWS + 8 * j + 2 * t);
        const Sum* sum = d + 4 * j + 2 * h;
        return pack_pair(fmaf(sum[0] * scale[h], two.x, two.y), fmaf(sum[1] * scale[h], two.z, two.w));
      };
      if (p.out % 4 == 0 && (u64)p.y % 8 == 0) {
        // Of two neighbouring eights one lane of a pair takes four of the first, the other of the second.
        int column = 8 * (t & 1) + 4 * (t / 2);
#pragma unroll
        for (int j = 0; j < 32; j += 2) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            u32 low = pair(j, h), high = pair(j + 1, h), other = __shfl_xor_sync(~0u, t & 1 ? low : high, 1);
            uint2 four = t & 1 ? make_uint2(other, high) : make_uint2(low, other);
            if (8 * h < tokens && 8 * j + column < limit) *(uint2*)(to[h] + 8 * j + column) = four;
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < 64; j++) {
          int row = j / 2 * 8 + 2 * t, h = j % 2;
          u32 both = pair(j / 2, h);
          if (8 * h < tokens && row < limit) to[h][row] = (u16)both;
          if (8 * h < tokens && row + 1 < limit) to[h][row + 1] = (u16)(both >> 16);
        }
      }
    }
  }
  cluster_arrive();  // no CTA leaves while the other still writes to it
  cluster_wait();
}
