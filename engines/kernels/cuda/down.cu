// The quantizers in front of low-rank branches, compiled apart from the others: most engines do not use them. params.h documents their parameters and launches.
#include "down.cuh"

#define QUANTIZE_BRANCH(TYPE, BITS, PROLOGUE, ROWS, NAME)                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS) quantize_branch_##TYPE##_i##BITS##_##NAME(BranchParams p) {   \
    quantize_branch<TYPE, BITS, PROLOGUE, ROWS>(p);                                                                   \
  }
#define QUANTIZE_BRANCHES(TYPE, BITS)                          \
  QUANTIZE_BRANCH(TYPE, BITS, PLAIN, false, plain)             \
  QUANTIZE_BRANCH(TYPE, BITS, SILU, false, silu)               \
  QUANTIZE_BRANCH(TYPE, BITS, NORM, false, norm)               \
  QUANTIZE_BRANCH(TYPE, BITS, NORM_SILU, false, norm_silu)     \
  QUANTIZE_BRANCH(TYPE, BITS, GELU, false, gelu)               \
  QUANTIZE_BRANCH(TYPE, BITS, GELU_TANH, false, gelu_tanh)     \
  QUANTIZE_BRANCH(TYPE, BITS, GEGLU, false, geglu)             \
  QUANTIZE_BRANCH(TYPE, BITS, PLAIN, true, rows)
QUANTIZE_BRANCHES(f16, 4)
QUANTIZE_BRANCHES(f16, 8)
QUANTIZE_BRANCHES(bf16, 4)
QUANTIZE_BRANCHES(bf16, 8)
