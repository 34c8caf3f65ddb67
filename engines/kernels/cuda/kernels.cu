// The entry points that the host looks up by name. params.h documents their parameters and launches.
#include "norm.cuh"
#include "quantize.cuh"
#include "reduce.cuh"
#include "rotary.cuh"
#include "row_norm.cuh"
#include "tiles.cuh"

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

// Blocks per multiprocessor, so registers: 80 are enough for float16; bfloat16, which the compiler unpacks ahead, would spill.
#define ROW_BLOCKS_f16 3
#define ROW_BLOCKS_bf16 2
#define QUANTIZE_ROWS(TYPE, BITS) \
  extern "C" __global__ void __launch_bounds__(THREADS, ROW_BLOCKS_##TYPE) quantize_rows_##TYPE##_i##BITS(RowNormParams p) { quantize_rows<TYPE, BITS>(p); }

#define CONVOLUTIONS(BM, BN, ...)                                \
  CONVOLUTION(false, , S4, s4, f16, BM, BN, __VA_ARGS__)         \
  CONVOLUTION(false, , U4, u4, f16, BM, BN, __VA_ARGS__)         \
  CONVOLUTION(false, , S8, s8, f16, BM, BN, __VA_ARGS__)         \
  CONVOLUTION(false, , S4, s4, bf16, BM, BN, __VA_ARGS__)        \
  CONVOLUTION(false, , U4, u4, bf16, BM, BN, __VA_ARGS__)        \
  CONVOLUTION(false, , S8, s8, bf16, BM, BN, __VA_ARGS__)
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
