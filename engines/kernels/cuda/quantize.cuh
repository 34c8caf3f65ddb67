// From float16 or bfloat16 to packed codes: the prologue, the rounding, the packing. Bound by memory, so every kernel uses wide, coalesced accesses.
#pragma once
#include "hadamard.cuh"

constexpr int CHANNELS = OCTET;  // per thread: 16 bytes of input; 4 bytes (4 bits) or 8 bytes (8 bits) of codes, so as many bytes as a code has bits

// The table row of one sample.
struct Row {
  float inv_scale, low, high;
  int offset;  // subtracted from the code before it is stored

  template <class Params>
  __device__ __forceinline__ Row(const Params& p, int n) {
    const int row = p.row[n];
    inv_scale = p.inv_scale[row];
    low = __int2float_rn(p.qmin[row]);
    high = __int2float_rn(p.qmax[row]);
    offset = p.unsigned_codes ? p.qmin[row] : 0;
  }
};

// The code of one value, as it is stored. To round, 1.5 * 2^23 is added: at that size a float32 has no fraction bits left, so the addition itself rounds to an
// integer, half to even, and the low bits of the sum are the integer. Clipping first gives the same result, as the bounds are integers, and keeps the sum in range.
// fmaxf and fminf return the other operand for NaN: NaN becomes qmin. -0.0 + 1.5 * 2^23 is the code 0.
__device__ __forceinline__ int encode(float value, const Row& row) {
  const float clipped = fminf(fmaxf(__fmul_rn(value, row.inv_scale), row.low), row.high);
  return __float_as_int(__fadd_rn(clipped, 12582912.0f)) - 0x4B400000 - row.offset;
}

// x / (1 + exp(-x)), by 2^(-x log2 e). The power's argument is rounded, too: up to |x| * 2^-23 of relative error in the power. Where x > 0 the power is below 1 and
// contributes little; where x < 0 it dominates the result: 2^-20 in total above -8, 2^-17 above -64, where the result itself is negligible.
// From -89 on exp overflows to infinity and the result is -0, the limit.
__device__ __forceinline__ float silu(float x) { return x * reciprocal_approx(1.0f + exp2_approx(-1.4426950408889634f * x)); }

// x * Phi(x) = x * (1 / 2 + x * P(x^2)), Phi the cumulative normal distribution. P is the minimax polynomial of degree 12 for |x| < 5 (its argument scaled to
// [-1, 1]; error of Phi 2^-22.6), fitted by Lawson's iteration; from 5 on Phi is 1, and 0 below -5, 2^-21.7 from the truth. Only fused multiply-adds, which round
// once and are the same everywhere, so that the result is defined bit for bit, unlike erff's. NaN stays NaN.
__device__ __forceinline__ float gelu(float x) {
  constexpr float P[13] = {0.14136378467082977f,   -0.0702962800860405f,  0.05152052268385887f,  -0.040442608296871185f, 0.031442172825336456f,
                           -0.023268653079867363f, 0.016402173787355423f, -0.011164339259266853f, 0.006410510279238224f,  -0.002685575047507882f,
                           0.0017227994976565242f, -0.001613265136256814f, 0.0006087272777222097f};
  const float s = fmaf(__fmul_rn(x, x), 0.08f, -1.0f);
  float p = P[12];
#pragma unroll
  for (int k = 11; k >= 0; --k) p = fmaf(p, s, P[k]);
  return fabsf(x) >= 5.0f ? fmaxf(x, 0.0f) : __fmul_rn(x, fmaf(x, p, 0.5f));
}

// x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3), as silu.
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = x * (1.0f + 0.044715f * (x * x));
  return x * reciprocal_approx(1.0f + exp2_approx(-2.3022081978f * u));  // 2 sqrt(2 / pi) log2(e)
}

// Eight consecutive float32 of a column with one number per channel, as load_values.
__device__ __forceinline__ void load_column(float (&v)[CHANNELS], const float* column, int count, bool wide) {
  if (wide) {
    const float4 low = reinterpret_cast<const float4*>(column)[0], high = reinterpret_cast<const float4*>(column)[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  } else {
#pragma unroll
    for (int e = 0; e < CHANNELS; ++e) v[e] = e < count ? column[e] : 0.0f;
  }
}

// Second half of GroupNorm, on the statistics of group_stats: channels c0 .. c0 + 7 of sample n. They may span several groups.
template <class Params>
__device__ __forceinline__ void normalize(float (&v)[CHANNELS], const Params& p, int n, int c0, int count) {
  const int size = p.C / p.groups;
  int group = c0 / size, left = size - (c0 - group * size);
  float mean = p.mean[n * p.groups + group], rstd = p.rstd[n * p.groups + group], column[CHANNELS];
#pragma unroll
  for (int e = 0; e < CHANNELS; ++e) {
    if (e >= count) break;
    if (left == 0) {
      ++group, left = size;
      mean = p.mean[n * p.groups + group], rstd = p.rstd[n * p.groups + group];
    }
    --left;
    v[e] = __fmul_rn(__fsub_rn(v[e], mean), rstd);
  }
  if (p.gamma) {
    load_column(column, p.gamma + c0, count, p.C % CHANNELS == 0 && aligned_16(p.gamma));
#pragma unroll
    for (int e = 0; e < CHANNELS; ++e) v[e] = __fmul_rn(v[e], column[e]);
  }
  if (p.beta) {
    load_column(column, p.beta + c0, count, p.C % CHANNELS == 0 && aligned_16(p.beta));
#pragma unroll
    for (int e = 0; e < CHANNELS; ++e) v[e] = __fadd_rn(v[e], column[e]);
  }
}

// What is rounded: channels c0 .. c0 + 7 of a pixel of sample n, whose first element is `x`, behind the operations of a prologue. count > 0.
template <class T, Prologue PROLOGUE, class Params>
__device__ __forceinline__ void load_octet_of(float (&v)[CHANNELS], const Params& p, const T* x, int n, int c0, int count, bool wide) {
  float gate[CHANNELS];
  load_values(v, x + c0, count, wide);
  if constexpr (PROLOGUE == GEGLU) load_values(gate, x + p.C + c0, count, wide);
  if constexpr (PROLOGUE == NORM || PROLOGUE == NORM_SILU) normalize(v, p, n, c0, count);
#pragma unroll
  for (int e = 0; e < CHANNELS; ++e) {
    if constexpr (PROLOGUE == SILU || PROLOGUE == NORM_SILU) v[e] = silu(v[e]);
    if constexpr (PROLOGUE == GELU) v[e] = gelu(v[e]);
    if constexpr (PROLOGUE == GELU_TANH) v[e] = gelu_tanh(v[e]);
    if constexpr (PROLOGUE == GEGLU) v[e] = __fmul_rn(v[e], gelu(gate[e]));
  }
}

// Packs eight codes, the first lowest, and writes them: one 4-byte or 8-byte store.
template <int BITS>
__device__ __forceinline__ void store_codes(byte_t* to, const int (&codes)[CHANNELS]) {
  unsigned words[BITS / 4] = {};
#pragma unroll
  for (int e = 0; e < CHANNELS; ++e) words[e * BITS / 32] |= (static_cast<unsigned>(codes[e]) & ((1u << BITS) - 1)) << (e * BITS % 32);
  if constexpr (BITS == 4) *reinterpret_cast<unsigned*>(to) = words[0];
  if constexpr (BITS == 8) *reinterpret_cast<uint2*>(to) = uint2{words[0], words[1]};
}

// Channels last. Neighbouring threads take neighbouring octets of channels: a warp reads 512 and writes 128 or 256 contiguous bytes. Padding channels become 0 bits.
// Every lane of a warp takes part in a rotation, those past the last item too.
template <class T, int BITS, Prologue PROLOGUE, bool ROTATED = false>
__device__ __forceinline__ void quantize_last(const QuantizeParams& p) {
  const unsigned octets = p.Cb / BITS, items = p.HW * octets;  // Cb bytes are Cb * 8 / BITS channels, an eighth of that many octets
  const bool wide = p.C % CHANNELS == 0 && aligned_16(p.x);
  const int pitch = PROLOGUE == GEGLU ? 2 * p.C : p.C;
  for (int n = blockIdx.y; n < p.N; n += gridDim.y) {
    const Row row(p, n);
    const T* x = static_cast<const T*>(p.x) + static_cast<long long>(n) * p.HW * pitch;
    byte_t* codes = p.codes + static_cast<long long>(n) * p.HW * p.Cb;
    for (unsigned item = blockIdx.x * THREADS + threadIdx.x; item - (ROTATED ? threadIdx.x % 32 : 0) < items; item += gridDim.x * THREADS) {
      const unsigned pixel = item / octets;
      const int c0 = (item - pixel * octets) * CHANNELS, count = item < items ? min(max(p.C - c0, 0), CHANNELS) : 0;
      int stored[CHANNELS] = {};
      float v[CHANNELS] = {};
      if (count > 0) {
        load_octet_of<T, PROLOGUE>(v, p, x + static_cast<long long>(pixel) * pitch, n, c0, count, wide);
      }
      if constexpr (ROTATED) {
        hadamard(v, p.rotation);
        if (item >= items) continue;
      }
#pragma unroll
      for (int e = 0; e < CHANNELS; ++e) stored[e] = e < count ? encode(v[e], row) : 0;
      store_codes<BITS>(codes + static_cast<long long>(item) * BITS, stored);
    }
  }
}

// Channels first: a block transposes 64 pixels x 64 channels in shared memory. Reading, a warp takes 32 neighbouring pixels of one channel (64 contiguous
// bytes); writing, four neighbouring threads (4 bits: 4 x 8 bytes) take one pixel's channels. In shared memory a code is a byte, at a pitch of 68 bytes = 17 words:
// odd, so 32 lanes that write one column hit 32 banks.
constexpr int TURN = 64, PITCH = TURN + 4;

template <class T, int BITS, bool WITH_SILU>
__device__ __forceinline__ void quantize_first(const QuantizeParams& p) {
  byte_t* const turned = fixed_shared<TURN * PITCH>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channels = p.Cb / BITS * CHANNELS;
  const int pixel_tiles = divide_up(p.HW, TURN), channel_tiles = divide_up(channels, TURN);
  for (int n = blockIdx.z; n < p.N; n += gridDim.z) {
    const Row row(p, n);
    const T* x = static_cast<const T*>(p.x) + static_cast<long long>(n) * p.C * p.HW;
    byte_t* codes = p.codes + static_cast<long long>(n) * p.HW * p.Cb;
    for (int tile_y = blockIdx.y; tile_y < channel_tiles; tile_y += gridDim.y) {
      for (int tile_x = blockIdx.x; tile_x < pixel_tiles; tile_x += gridDim.x) {
        const int c0 = tile_y * TURN, pixel0 = tile_x * TURN;
#pragma unroll
        for (int i = 0; i < TURN * TURN / THREADS; ++i) {  // a warp takes every eighth channel, its lanes 32 pixels, then the next 32
          const int c = warp + i / 2 * (THREADS / 32), pixel = lane + i % 2 * 32;
          int code = 0;
          if (c0 + c < p.C && pixel0 + pixel < p.HW) {
            float v = to_float(x[static_cast<long long>(c0 + c) * p.HW + pixel0 + pixel]);
            if constexpr (WITH_SILU) v = silu(v);
            code = encode(v, row);
          }
          turned[pixel * PITCH + c] = static_cast<byte_t>(code);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TURN * TURN / CHANNELS / THREADS; ++i) {
          const int octet = threadIdx.x + i * THREADS, pixel = octet / (TURN / CHANNELS), c = octet % (TURN / CHANNELS) * CHANNELS;
          int stored[CHANNELS];
#pragma unroll
          for (int e = 0; e < CHANNELS; ++e) stored[e] = turned[pixel * PITCH + c + e];
          if (c0 + c < channels && pixel0 + pixel < p.HW)
            store_codes<BITS>(codes + static_cast<long long>(pixel0 + pixel) * p.Cb + (c0 + c) / CHANNELS * BITS, stored);
        }
        __syncthreads();  // the next tile overwrites this one
      }
    }
  }
}
