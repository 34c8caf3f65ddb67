// Quantizers in front of a layer with a low-rank branch: while x is read for its codes, it is multiplied by the branch's first matrix.
// Source: Li et al., SVDQuant, arXiv 2411.05007, section 4.2 (the first product fused with the quantization of the layer's input).
//
// A block takes 32 pixels. It reads 256 channels of them at a time, an octet for each lane, so that a warp reads a pixel's 512 bytes at once; stores their codes, and the
// values as 16-bit numbers in shared memory, from where the tensor cores take them. Each of its eight warps sums 16 pixels and every fourth group of eight columns of `low`
// over all channels: no partial sums, and the same result in every run. `down` is read from the L2 cache, once for a block.
#pragma once
#include "row_norm.cuh"

constexpr int DOWN_PIXELS = 32, DOWN_CHANNELS = 256, DOWN_FRAGMENTS = 8;  // of eight columns, for each warp: a rank of 256 at most
constexpr int DOWN_ROW = DOWN_CHANNELS * 2, DOWN_TILE = DOWN_PIXELS * DOWN_ROW;
static_assert(BRANCH_BYTES == DOWN_TILE + DOWN_PIXELS * sizeof(float2), "the tile and the statistics");

// Bytes of shared memory to chunk c, 16 bytes, of pixel i. ldmatrix reads one column of eight consecutive pixels at once: unswizzled, all would be in the same banks.
__device__ __forceinline__ int place_of(int pixel, int chunk) { return pixel * DOWN_ROW + (chunk ^ (pixel % 8)) * 16; }

// S of params.h (quantize_rows_*) by one warp: the sums of the warps that share a token there, one after the other. term(number) is summed over a token's channels.
template <class T, class TERM>
__device__ __forceinline__ float token_sum(const T* x, int C, int lanes, TERM term) {
  float total = 0.0f;
  for (int warp = 0; warp < lanes / 32; ++warp) {
    float own = 0.0f;
    for (int c0 = (warp * 32 + threadIdx.x % 32) * CHANNELS; c0 < C; c0 += lanes * CHANNELS) {
      float v[CHANNELS];
      load_values(v, x + c0, CHANNELS, true);
#pragma unroll
      for (int e = 0; e < CHANNELS; ++e) own = __fadd_rn(own, term(v[e]));
    }
    own = row_sum(own, nullptr, 32);
    total = warp == 0 ? own : __fadd_rn(total, own);
  }
  return total;
}

// Mean and 1 / standard deviation of each of the block's pixels, four for each warp, which reads no others.
template <class T>
__device__ __forceinline__ void token_statistics(const BranchParams& p, const T* x, int pixel0, float2* statistics) {
  const float channels = __int2float_rn(p.C);
  for (int i = threadIdx.x / 32; i < DOWN_PIXELS; i += THREADS / 32) {
    const T* const token = x + static_cast<long long>(min(pixel0 + i, p.HW - 1)) * p.C;
    const float mean = p.rms ? 0.0f : token_sum(token, p.C, p.lanes, [](float v) { return v; }) / channels;
    const float squares = token_sum(token, p.C, p.lanes, [mean](float v) {
      const float distance = __fsub_rn(v, mean);
      return __fmul_rn(distance, distance);
    });
    if (threadIdx.x % 32 == 31) statistics[i] = float2{mean, 1.0f / sqrtf(__fadd_rn(squares / channels, p.eps))};
  }
  __syncwarp();
}

// As load_octet_of, the prologue chosen at run time, by all threads alike: it takes little beside the products, and kernels for each would take long to compile.
template <class T>
__device__ __forceinline__ void load_chosen(float (&v)[CHANNELS], const BranchParams& p, const T* x, int n, int c0) {
  switch (p.prologue) {
    case SILU: return load_octet_of<T, SILU>(v, p, x, n, c0, CHANNELS, true);
    case NORM: return load_octet_of<T, NORM>(v, p, x, n, c0, CHANNELS, true);
    case NORM_SILU: return load_octet_of<T, NORM_SILU>(v, p, x, n, c0, CHANNELS, true);
    case GELU: return load_octet_of<T, GELU>(v, p, x, n, c0, CHANNELS, true);
    case GELU_TANH: return load_octet_of<T, GELU_TANH>(v, p, x, n, c0, CHANNELS, true);
    case GEGLU: return load_octet_of<T, GEGLU>(v, p, x, n, c0, CHANNELS, true);
    default: return load_octet_of<T, PLAIN>(v, p, x, n, c0, CHANNELS, true);
  }
}

template <class T, int BITS, bool ROWS>
__device__ __forceinline__ void quantize_branch(const BranchParams& p) {
  byte_t* const memory = dynamic_shared();
  float2* const statistics = reinterpret_cast<float2*>(memory + DOWN_TILE);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, octets = p.Cb / BITS;
  const int pitch = !ROWS && p.prologue == GEGLU ? 2 * p.C : p.C;
  const int rows16 = warp % 2 * 16;  // this warp's pixels; its columns are 8 * (warp / 2), and every 32 from there
  for (int n = blockIdx.y; n < p.N; n += gridDim.y) {
    const Row row(p, n);
    const T* const x = static_cast<const T*>(p.x) + static_cast<long long>(n) * p.HW * pitch;
    for (int pixel0 = blockIdx.x * DOWN_PIXELS; pixel0 < p.HW; pixel0 += gridDim.x * DOWN_PIXELS) {
      if constexpr (ROWS) token_statistics<T>(p, x, pixel0, statistics);
      float sums[DOWN_FRAGMENTS][4] = {};
      for (int octet0 = 0; octet0 < octets; octet0 += 32) {
        const int octet = octet0 + lane, c0 = octet * CHANNELS;
#pragma unroll
        for (int i = warp; i < DOWN_PIXELS; i += THREADS / 32) {
          const int pixel = pixel0 + i;
          const bool exists = pixel < p.HW && c0 < p.C;
          float v[CHANNELS] = {};
          if (exists) {
            const T* const from = x + static_cast<long long>(pixel) * pitch;
            if constexpr (!ROWS) load_chosen(v, p, from, n, c0);
            if constexpr (ROWS) {
              load_values(v, from + c0, CHANNELS, true);
              const float2 of_token = statistics[i];
#pragma unroll
              for (int e = 0; e < CHANNELS; ++e) v[e] = __fmul_rn(__fsub_rn(v[e], of_token.x), of_token.y);
              scale_and_shift<T>(v, p, n, c0, CHANNELS, true);
            }
          }
          float rotated[CHANNELS];
#pragma unroll
          for (int e = 0; e < CHANNELS; ++e) rotated[e] = v[e];
          if (p.rotation) hadamard(rotated, p.rotation);
#pragma unroll
          for (int e = 0; e < CHANNELS; ++e) v[e] = p.low_rotated ? rotated[e] : v[e];
          *reinterpret_cast<uint4*>(memory + place_of(i, lane)) = uint4{to_pair<T>(v[0], v[1]), to_pair<T>(v[2], v[3]), to_pair<T>(v[4], v[5]), to_pair<T>(v[6], v[7])};
          if (pixel < p.HW && octet < octets) {
            int stored[CHANNELS];
#pragma unroll
            for (int e = 0; e < CHANNELS; ++e) stored[e] = exists ? encode(rotated[e], row) : 0;
            store_codes<BITS>(p.codes + (static_cast<long long>(n) * p.HW + pixel) * p.Cb + octet * BITS, stored);
          }
        }
        __syncthreads();  // the tile is complete
        for (int k = 0; k < 32 && (octet0 + k) * CHANNELS < p.C; k += 2) {  // 16 channels
          unsigned a[4];
          load_matrices(a, shared_address(memory + place_of(rows16 + lane % 16, k + lane / 16)));
          const int c = (octet0 + k) * CHANNELS + 2 * t;
#pragma unroll
          for (int f = 0; f < DOWN_FRAGMENTS; ++f) {
            const int column = (warp / 2 + f * 4) * 8;
            if (column >= p.rank) break;
            const T* const from = static_cast<const T*>(p.down) + static_cast<long long>(column + g) * p.C + c;
            multiply_add<T>(sums[f], a, *reinterpret_cast<const unsigned*>(from), c + CHANNELS < p.C ? *reinterpret_cast<const unsigned*>(from + CHANNELS) : 0u);
          }
        }
        __syncthreads();  // the next channels overwrite these
      }
#pragma unroll
      for (int f = 0; f < DOWN_FRAGMENTS; ++f) {
        const int column = (warp / 2 + f * 4) * 8 + 2 * t;
        if (column >= p.rank) break;
        float scale[2] = {1.0f, 1.0f};
        if (p.low_scale) {
          const T* const from = static_cast<const T*>(p.low_scale) + static_cast<long long>(n) * p.low_scale_stride + column;
          scale[0] = to_float(from[0]), scale[1] = to_float(from[1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = pixel0 + rows16 + g + half * 8;
          T* const to = static_cast<T*>(p.low) + (static_cast<long long>(n) * p.HW + pixel) * p.rank + column;
          if (pixel < p.HW) *reinterpret_cast<unsigned*>(to) = to_pair<T>(__fmul_rn(sums[f][half * 2], scale[0]), __fmul_rn(sums[f][half * 2 + 1], scale[1]));
        }
      }
    }
  }
}
