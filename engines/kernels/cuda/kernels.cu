// The entry points that the host looks up by name. params.h documents their parameters and launches.
#include "convolution.cuh"
#include "norm.cuh"
#include "quantize.cuh"
#include "reduce.cuh"
#include "rotary.cuh"
#include "row_norm.cuh"

// X(BM, BN, warp's BM, stages, threads, bytes of dynamic shared memory, blocks per multiprocessor): the tiles, largest first. The host chooses among them.
//
// 128x128  Most reuse: 64 operations per byte loaded with 4 bits. 48 KB and at most 128 registers, so two blocks share a multiprocessor of an RTX 3090.
// 128x64   For 64 channels out, and where 128x128 leaves multiprocessors idle. Warps of 32x32 instead of 64x32: twice the warps hide more latency.
// 64x64    For 16x16 maps.
// 32x64    For 8x8 maps and linears of few rows; with the sum split, where even that leaves multiprocessors idle.
#define TILES(X)                     \
  X(128, 128, 64, 3, 256, 49152, 2)  \
  X(128, 64, 32, 4, 256, 49152, 2)   \
  X(64, 64, 32, 4, 128, 32768, 3)    \
  X(32, 64, 16, 4, 128, 24576, 4)

#define CONVOLUTION(KIND, NAME, TYPE, BM, BN, WARP_M, STAGES, THREADS_, BYTES, BLOCKS)                                   \
  extern "C" __global__ void __launch_bounds__(THREADS_, BLOCKS) conv_##NAME##_##BM##x##BN##_##TYPE(ConvParams p) {     \
    using Shape = Tile<BM, BN, WARP_M, STAGES>;                                                                         \
    static_assert(Shape::THREADS == THREADS_ && Shape::SHARED_BYTES == BYTES, "the table of tiles above is wrong");     \
    convolve<KIND, Shape, TYPE>(p);                                                                                     \
  }
#define REDUCTION(KIND, NAME, TYPE) \
  extern "C" __global__ void __launch_bounds__(THREADS) reduce_##NAME##_##TYPE(ConvParams p) { reduce<KIND, TYPE>(p); }
#define QUANTIZE_LAST(TYPE, BITS, PROLOGUE, NAME)                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) quantize_last_##TYPE##_i##BITS##_##NAME(QuantizeParams p) {        \
    quantize_last<TYPE, BITS, PROLOGUE>(p);                                                                                \
  }
#define QUANTIZE_FIRST(TYPE, BITS, WITH_SILU, NAME)                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) quantize_first_##TYPE##_i##BITS##_##NAME(QuantizeParams p) {       \
    quantize_first<TYPE, BITS, WITH_SILU>(p);                                                                              \
  }

#define QUANTIZE_ROWS(TYPE, BITS) \
  extern "C" __global__ void __launch_bounds__(THREADS, 3) quantize_rows_##TYPE##_i##BITS(RowNormParams p) { quantize_rows<TYPE, BITS>(p); }

#define CONVOLUTIONS(BM, BN, ...)                   \
  CONVOLUTION(S4, s4, f16, BM, BN, __VA_ARGS__)     \
  CONVOLUTION(U4, u4, f16, BM, BN, __VA_ARGS__)     \
  CONVOLUTION(S8, s8, f16, BM, BN, __VA_ARGS__)     \
  CONVOLUTION(S4, s4, bf16, BM, BN, __VA_ARGS__)    \
  CONVOLUTION(U4, u4, bf16, BM, BN, __VA_ARGS__)    \
  CONVOLUTION(S8, s8, bf16, BM, BN, __VA_ARGS__)
TILES(CONVOLUTIONS)

#define OF_TYPE_AND_BITS(TYPE, BITS)                     \
  QUANTIZE_LAST(TYPE, BITS, PLAIN, plain)                \
  QUANTIZE_LAST(TYPE, BITS, SILU, silu)                  \
  QUANTIZE_LAST(TYPE, BITS, NORM, norm)                  \
  QUANTIZE_LAST(TYPE, BITS, NORM_SILU, norm_silu)        \
  QUANTIZE_LAST(TYPE, BITS, GELU, gelu)                  \
  QUANTIZE_LAST(TYPE, BITS, GELU_TANH, gelu_tanh)        \
  QUANTIZE_LAST(TYPE, BITS, GEGLU, geglu)                \
  QUANTIZE_FIRST(TYPE, BITS, false, plain)               \
  QUANTIZE_FIRST(TYPE, BITS, true, silu)                 \
  QUANTIZE_ROWS(TYPE, BITS)
#define OF_TYPE(TYPE)                                                                                                     \
  REDUCTION(S4, s4, TYPE)                                                                                                 \
  REDUCTION(U4, u4, TYPE)                                                                                                 \
  REDUCTION(S8, s8, TYPE)                                                                                                 \
  OF_TYPE_AND_BITS(TYPE, 4)                                                                                               \
  OF_TYPE_AND_BITS(TYPE, 8)                                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS) rotary_##TYPE(RotaryParams p) { rotate<TYPE>(p); }                   \
  extern "C" __global__ void __launch_bounds__(THREADS) group_stats_partial_##TYPE(StatsParams p) { group_stats_partial<TYPE>(p); }
OF_TYPE(f16)
OF_TYPE(bf16)
extern "C" __global__ void __launch_bounds__(THREADS) group_stats_merge(StatsParams p) { merge_group_stats(p); }
