// y = T(x) V^T + b for hundreds of tokens and more, on sm_90: appended to linear.cu and wgmma.cu, whose macros, decoders
// and instructions it uses.
//
// Arithmetic. T(x) is int8 with one scale for each token. V is int8 with one scale for each row, the largest of its
// weight scales (row_scale): a table for each row and group, made on the way, has level * weight_scale / row_scale in
// steps of 1/127 of the largest level. wgmma sums all inputs in int32, and nothing is scaled before the end: with a
// scale for each tile, as in middle.cu, that takes as long as the products, whose registers it has to read.
//
//     |y - exact| <= sum_k (|dx| |V| + |T(x)| |dV| + |dx| |dV|),  dx <= max |T(x)| / 254,  dV <= row_scale LARGEST / 254
//
// A CTA takes one tile of ROWS = 64 WARPGROUPS outputs and COLUMNS tokens after the other, so that no multiprocessor
// idles between them. A warpgroup of its own fetches T(x), codes and scales, a step of 128 inputs after the other, some
// steps ahead. The CTAs of a cluster have other rows and the same tokens, and each fetches a part of T(x) for all; or
// (SPLIT, for few tiles) the same rows and tokens and a share of the inputs each, and add up at the end.
//
// COLUMNS    tokens of a CTA: a multiple of 64, to 256       WARPGROUPS   that multiply
// SPLIT      1, or 2: CTAs of a cluster share the inputs     STAGES       stages of the ring
// EXPERTS    1: a token is a pair (token, expert), a tile's columns are pairs of one expert, brought together by
//            tqw_route

static_assert(TILE == 128 && SUBS == 1 && PASSES == 1 && COARSE, "a stage is 128 inputs with one scale to a row");
static constexpr int ROWS = 64 * WARPGROUPS, ROW_BYTES = TILE / 8 * WIDTH;
static constexpr int CODE_BYTES = ROWS * ROW_BYTES;
static constexpr int STAGE_BYTES = (X_BYTES + CODE_BYTES + 4 * ROWS + 1023) / 1024 * 1024;
static constexpr int STAGED = COLUMNS / 2;                 // tokens whose outputs are staged at once
static constexpr int OUTPUT_BYTES = STAGED * 128 * SPLIT;  // of a warpgroup: these, or the sums of half the tokens
static constexpr int STEPS_OF_CTA = STEPS_OF_ALL / SPLIT;
static constexpr int SHARING = CLUSTER / SPLIT;            // CTAs that fetch T(x) for each other
static constexpr int GROUPED = 4;                          // blocks of tokens that pass over rows together
static_assert(STEPS_OF_CTA % 2 == 0 && STEPS_OF_CTA >= STAGES, "registers take turns, and so do the scales of two tiles");

// A of the four k32 steps of a tile, from a stage's codes and scales. `odd`: whose of two groups the scales are.
__device__ __forceinline__ void prepare(const LaneLevels& levels, const float* inverse, const u8* codes, int row, int t,
                                        const int* odd, u32 keep, u32 (*a)[4]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const u8* from = codes + (row + 8 * h) * ROW_BYTES;
    u32 words[words_of(WIDTH, 0) + words_of(WIDTH, 1)];
    read_words<lane_bytes(WIDTH, 0)>(words, from + t * lane_bytes(WIDTH, 0));
    if constexpr (plane_count(WIDTH) == 2)
      read_words<lane_bytes(WIDTH, 1)>(words + SECOND, from + 4 * lane_bytes(WIDTH, 0) + t * lane_bytes(WIDTH, 1));
    u16 scale = *(const u16*)(codes + CODE_BYTES + 4 * (row + 8 * h) + 2 * odd[h]);
    RowLevels table;
    table.keep = keep;
    make_table(table, levels, half_to_float(scale) * inverse[h]);
#pragma unroll
    for (int s = 0; s < 4; s++) decode<WIDTH>(table, words, words + SECOND, s, a[s][h], a[s][h + 2]);
  }
}

// ----------------------------------------------------------------------------------------------------- the product

// Four 8x8 matrices of 16 bits, of which each lane holds two neighbours of a row, transposed: lanes 8 i to 8 i + 7 say
// where the rows of the i-th go.
__device__ __forceinline__ void store_transposed(u32 to, const u32* m) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(m[0]), "r"(m[1]),
               "r"(m[2]), "r"(m[3])
               : "memory");
}
__device__ __forceinline__ void barrier_of_warpgroup(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + number) : "memory");
}
__device__ __forceinline__ void arrive_at_rank(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

#if SPLIT > 1
// Sums of all inputs for this CTA's half of the tokens, to the first half of d: each CTA sends the other its half.
__device__ __forceinline__ void add_halves(int* d, int4* received, int share) {
  constexpr int HALF = COLUMNS / 4;
  static_assert(SPLIT == 2 && HALF % 4 == 0, "halves");
  u32 there = address_of_rank(shared_address(received), 1 - share);
#pragma unroll
  for (int i = 0; i < HALF; i += 4) {
    int v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[j] = share ? d[i + j] : d[HALF + i + j];
      if (share) d[i + j] = d[HALF + i + j];
    }
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there + i / 4 * 2048), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int i = 0; i < HALF; i += 4) {
    int4 v = received[i / 4 * 128];
    d[i] += v.x, d[i + 1] += v.y, d[i + 2] += v.z, d[i + 3] += v.w;
  }
}
#endif

__device__ __forceinline__ int pair_of(const Params& p, i64 column) {
#if EXPERTS
  return p.pair[column];
#else
  return column;
#endif
}

// What one CTA of a cluster does next.
struct Tile {
  int block, tokens, first_row;  // COLUMNS tokens; how many there are; ROWS outputs
  i64 before;                    // rows of other experts before these in memory
  __device__ __forceinline__ i64 row(const Params& p, int within) const { return before + min(first_row + within, p.out - 1); }
};
struct Tiles {
  int strips, blocks, neighbour;  // of ROWS for each of the SHARING CTAs, of COLUMNS tokens; which of these CTAs this is
  // CTAs that work at the same time share rows, whose codes come from memory once, or tokens.
  __device__ __forceinline__ Tile at(const Params& p, int tile) const {
    int group = tile / (strips * GROUPED), within = tile - group * strips * GROUPED;
    int blocks_here = min(GROUPED, blocks - group * GROUPED);
    int block = group * GROUPED + within % blocks_here, first_row = (within / blocks_here * SHARING + neighbour) * ROWS;
#if EXPERTS
    int2 expert = p.block[block];
    return {block, expert.y, first_row, (i64)expert.x * p.out};
#else
    return {block, min(COLUMNS, p.tokens - block * COLUMNS), first_row, 0};
#endif
  }
};

extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS + 128, 1) tqw_prefill(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 ring[];  // stages; outputs of each warpgroup; barriers; scales of the tokens
  constexpr int OUTPUTS = STAGES * STAGE_BYTES, BARRIERS = OUTPUTS + WARPGROUPS * OUTPUT_BYTES;
  int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, rank = blockIdx.x % CLUSTER;
  u32 stage0 = shared_address(ring), full = stage0 + BARRIERS, empty = full + 8 * STAGES;
  float* token_scale = (float*)(ring + BARRIERS + 16 * STAGES);  // of a tile and of the next
  int share = SPLIT > 1 ? rank : 0, neighbour = SPLIT > 1 ? 0 : rank;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 1 + 128);
      barrier_init(empty + 8 * i, (EVERY_LANE ? 128 : 4) * WARPGROUPS * SHARING);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_arrive();  // before one writes to another, both have their barriers
  allow_next_kernel();
#if EXPERTS
  wait_for_previous_kernel();  // whose weights these are is known only now
  int blocks = p.block[p.blocks].x;
#else
  int blocks = (p.tokens + COLUMNS - 1) / COLUMNS;
#endif
  Tiles tiles = {(p.out + SHARING * ROWS - 1) / (SHARING * ROWS), blocks, neighbour};
  int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER, end = tiles.strips * blocks;

  int stage = 0, parity = 0, slot = 0;
  auto advance = [&] {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };
  if (warp >= 4 * WARPGROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    int thread = threadIdx.x - 128 * WARPGROUPS;
    constexpr int PART = X_BYTES / SHARING;
    auto fetch_weights = [&](const Tile& tile, int step) {
      u32 to = stage0 + stage * STAGE_BYTES + X_BYTES;
      int k = min(share * STEPS_OF_CTA + step, TILES - 1) * TILE;
#pragma unroll
      for (int j = thread; j < ROWS * WIDTH; j += 128) {
        constexpr int FIRSTS = 4 * lane_bytes(WIDTH, 0) / 16;  // chunks of a row's first plane
        int chunk = j % WIDTH, second = chunk >= FIRSTS;
        int offset = second ? code_offset(WIDTH, 1, k, 0) + (chunk - FIRSTS) * 16 : code_offset(WIDTH, 0, k, 0) + chunk * 16;
        copy_async<16>(to + 16 * j, p.packed[0] + tile.row(p, j / WIDTH) * (IN_PADDED / 8 * WIDTH) + offset);
      }
#pragma unroll
      for (int j = thread; j < ROWS; j += 128) {
        i64 at = tile.row(p, j) * GROUPS + k / GROUP;  // the smallest copy has two scales
        copy_async<4>(to + CODE_BYTES + 4 * j, p.scale[0] + at / 2 * 2);
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full + 8 * stage) : "memory");
    };
    auto fetch_x = [&](const Tile& tile, int step) {
      u32 barrier = full + 8 * stage, to = stage0 + stage * STAGE_BYTES + neighbour * PART;
      const u8* x = p.planes + ((i64)tile.block * STEPS_OF_ALL + share * STEPS_OF_CTA + step) * X_BYTES + neighbour * PART;
      barrier_expect(barrier, X_BYTES + (step == 0 ? 4 * COLUMNS : 0));
      if (step == 0)
        copy_bulk(shared_address(token_scale + slot * COLUMNS), p.plane_scale + tile.block * COLUMNS, 4 * COLUMNS, barrier);
#if CLUSTER > SPLIT
      copy_bulk_to_all(to, x, PART, barrier);
#else
      copy_bulk(to, x, X_BYTES, barrier);
#endif
    };
    Tile tile;
    if (first < end) {  // weights need not wait for the kernel before
      tile = tiles.at(p, first);
      for (int step = 0; step < STAGES; step++) {
        fetch_weights(tile, step);
        advance();
      }
      stage = parity = 0;
    }
    cluster_wait();
    wait_for_previous_kernel();
    for (int i = first; i < end; i += step, slot ^= 1) {
      if (i != first) tile = tiles.at(p, i);
#pragma unroll 1
      for (int step = 0; step < STEPS_OF_CTA; step++) {
        if (i != first || step >= STAGES) {
          barrier_wait(empty + 8 * stage, parity ^ 1);
          fetch_weights(tile, step);
        }
        if (thread == 0) fetch_x(tile, step);
        __syncwarp();
        advance();
      }
    }
#if SPLIT > 1
    cluster_arrive();
    cluster_wait();
#endif
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const u32 keep = Levels<WIDTH>::keep ^ threadIdx.z;  // in a register that the compiler cannot take for a constant
    // Of the stage before; all lanes have read its codes before the products that are done now.
    auto release_last = [&] {
      u32 barrier = empty + 8 * (stage ? stage - 1 : STAGES - 1);
      for (int to = EVERY_LANE ? 0 : lane; to < SHARING; to += EVERY_LANE ? 1 : 32)
        arrive_at_rank(address_of_rank(barrier, SPLIT > 1 ? rank : to));
    };
    LaneLevels levels;
    keep_levels<0>(levels, t);
    u32 a[2][4][4];
    int d[COLUMNS / 2], row = warp * 16 + g, odd[2];  // the lane's rows are this one and the eighth after it
    float most[2], inverse[2];
    auto take_rows = [&](const Tile& tile) {
      i64 row0 = tile.row(p, row), row1 = tile.row(p, row + 8);
      row_scales(p, row0, row1, 0, TILES, t, most);
      odd[0] = row0 * GROUPS & 1, odd[1] = row1 * GROUPS & 1;
#pragma unroll
      for (int h = 0; h < 2; h++) inverse[h] = most[h] > 0.f ? 1.f / most[h] : 0.f;
    };
    // Of the stage that comes next.
    auto prepare_next = [&](int stage, int k, u32 (*a)[4]) {
      int group = min(share * STEPS_OF_CTA + k, TILES - 1) * TILE / GROUP & 1, side[2] = {odd[0] ^ group, odd[1] ^ group};
      prepare(levels, inverse, ring + stage * STAGE_BYTES + X_BYTES, row, t, side, keep, a);
    };
    Tile tile, next;
    if (first < end) {
      next = tiles.at(p, first);
      take_rows(next);
    }
    cluster_wait();
    if (first < end) {
      barrier_wait(full, 0);
      prepare_next(0, 0, a[0]);
    }
    for (int i = first; i < end; i += step, slot ^= 1) {
      bool last = i + step >= end;
      tile = next;
      if (!last) next = tiles.at(p, i + step);
      float of_row[2] = {most[0] * (1 / LIFT), most[1] * (1 / LIFT)};
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; i++) d[i] = 0;
      // Multiplies a tile of inputs while the next is decoded.
      auto work = [&](u32 (*now)[4], u32 (*then)[4], int k) {
        u64 b = descriptor(stage0 + stage * STAGE_BYTES);
        fence_sums();
#pragma unroll
        for (int s = 0; s < 4; s++) multiply_async(d, now[s], b + 2 * s);
        commit_products();
        wait_products<1>();  // the tile before is done
        if (k > 0) release_last();
        advance();
        if (k + 1 < STEPS_OF_CTA) {
          barrier_wait(full + 8 * stage, parity);
          prepare_next(stage, k + 1, then);
        } else if (!last) {
          take_rows(next);
          barrier_wait(full + 8 * stage, parity);
          prepare_next(stage, 0, then);
        }
      };
#pragma unroll 1
      for (int k = 0; k < STEPS_OF_CTA; k += 2) {
        work(a[0], a[1], k);
        work(a[1], a[0], k + 1);
      }
      float bias[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u16 bits = p.bias ? ((const u16*)p.bias)[tile.row(p, row + 8 * h)] : 0;
        bias[h] = X_TYPE == 1 ? half_to_float(bits) : __uint_as_float((u32)bits << 16);
      }
      wait_products<0>();
      release_last();

      constexpr int MINE = COLUMNS / SPLIT;  // tokens whose sums this CTA brings to their end
      int group = warp / 4, first_token = share * MINE;
      u8* staged = ring + OUTPUTS + group * OUTPUT_BYTES;
#if SPLIT > 1
      add_halves(d, (int4*)staged + threadIdx.x % 128, share);
#endif
      // A token's 64 outputs of a warpgroup are 128 bytes, chunks of 16 rotated so that eight tokens share no bank.
      const float* scale = token_scale + slot * COLUMNS + first_token + 2 * t;
      u32 to = shared_address(staged) + (lane & 7) * 128 + lane / 16 * 1024 + (warp % 4 * 2 + lane / 8 % 2 + lane & 7) * 16;
      int chunk = threadIdx.x % 8, begin = tile.first_row + group * 64 + chunk * 8;
#pragma unroll
      for (int done = 0; done < MINE; done += STAGED) {
        barrier_of_warpgroup(group);  // all have read what was here
#pragma unroll
        for (int j = done / 8; j < (done + STAGED) / 8; j += 2) {
          u32 m[4];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float2 s = *(const float2*)(scale + 8 * (j + i));
            const int* v = d + 4 * (j + i);
            m[2 * i] = pack_pair(fmaf(v[0], s.x * of_row[0], bias[0]), fmaf(v[1], s.y * of_row[0], bias[0]));
            m[2 * i + 1] = pack_pair(fmaf(v[2], s.x * of_row[1], bias[1]), fmaf(v[3], s.y * of_row[1], bias[1]));
          }
          store_transposed(to + (j - done / 8) * 1024, m);
        }
        barrier_of_warpgroup(group);
        int tokens = begin < p.out ? min(STAGED, tile.tokens - first_token - done) : 0;
#pragma unroll 4
        for (int i = threadIdx.x % 128 / 8; i < tokens; i += 16) {
          i64 column = tile.block * COLUMNS + first_token + done + i;
          if (EXPERTS) column = pair_of(p, column);
          *(uint4*)((u16*)p.y + column * p.out + begin) = *(const uint4*)(staged + i * 128 + (chunk + i) % 8 * 16);
        }
      }
    }
  }
#if SPLIT == 1
  cluster_arrive();  // none leaves while another still writes to it
  cluster_wait();
#endif
}
