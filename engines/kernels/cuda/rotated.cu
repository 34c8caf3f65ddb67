// The quantizers that rotate their input in blocks of channels, compiled apart from the others: most engines do not use them. params.h documents their parameters and launches.
#include "quantize.cuh"
#include "row_norm.cuh"

#define ROTATED_LAST(TYPE, BITS, PROLOGUE, NAME)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS) quantize_last_##TYPE##_i##BITS##_##NAME##_rotated(QuantizeParams p) { \
    quantize_last<TYPE, BITS, PROLOGUE, true>(p);                                                                             \
  }
#define ROTATED_ROWS(TYPE, BITS)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) quantize_rows_##TYPE##_i##BITS##_rotated(RowNormParams p) { quantize_rows<TYPE, BITS, true>(p); }
#define ROTATED(TYPE, BITS)                       \
  ROTATED_LAST(TYPE, BITS, PLAIN, plain)          \
  ROTATED_LAST(TYPE, BITS, SILU, silu)            \
  ROTATED_LAST(TYPE, BITS, GELU, gelu)            \
  ROTATED_LAST(TYPE, BITS, GELU_TANH, gelu_tanh)  \
  ROTATED_LAST(TYPE, BITS, GEGLU, geglu)          \
  ROTATED_ROWS(TYPE, BITS)
ROTATED(f16, 4)
ROTATED(f16, 8)
ROTATED(bf16, 4)
ROTATED(bf16, 8)
