// dense = (V H) * a, by rows. After codes.cu and inputs.cu.

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
