// The quantizers in front of low-rank branches, compiled apart from the others: most engines do not use them. params.h documents their parameters and launches.
#include "down.cuh"

#define QUANTIZE_BRANCH(TYPE, BITS)                                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) quantize_branch_##TYPE##_i##BITS(BranchParams p) { quantize_branch<TYPE, BITS, false>(p); }        \
  extern "C" __global__ void __launch_bounds__(THREADS) quantize_branch_##TYPE##_i##BITS##_rows(BranchParams p) { quantize_branch<TYPE, BITS, true>(p); }
QUANTIZE_BRANCH(f16, 4)
QUANTIZE_BRANCH(f16, 8)
QUANTIZE_BRANCH(bf16, 4)
QUANTIZE_BRANCH(bf16, 8)
