// Layers with a float low-rank branch, compiled apart from the others: most engines do not use them. params.h documents their parameters and launches.
#include "reduce.cuh"
#include "tiles.cuh"

#define REDUCTION_BRANCH(KIND, NAME, TYPE) \
  extern "C" __global__ void __launch_bounds__(THREADS) reduce_##NAME##_##TYPE##_branch(ConvParams p) { reduce<KIND, TYPE, true>(p); }

#define BRANCHES(BM, BN, ...)                                         \
  CONVOLUTION(true, _branch, S4, s4, f16, BM, BN, __VA_ARGS__)        \
  CONVOLUTION(true, _branch, U4, u4, f16, BM, BN, __VA_ARGS__)        \
  CONVOLUTION(true, _branch, S8, s8, f16, BM, BN, __VA_ARGS__)        \
  CONVOLUTION(true, _branch, S4, s4, bf16, BM, BN, __VA_ARGS__)       \
  CONVOLUTION(true, _branch, U4, u4, bf16, BM, BN, __VA_ARGS__)       \
  CONVOLUTION(true, _branch, S8, s8, bf16, BM, BN, __VA_ARGS__)
TILES(BRANCHES)

#define REDUCTIONS_BRANCH(TYPE)    \
  REDUCTION_BRANCH(S4, s4, TYPE)   \
  REDUCTION_BRANCH(U4, u4, TYPE)   \
  REDUCTION_BRANCH(S8, s8, TYPE)
REDUCTIONS_BRANCH(f16)
REDUCTIONS_BRANCH(bf16)
