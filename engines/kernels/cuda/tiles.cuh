// The tiles of convolutions, and an entry point for each: with a branch they are compiled apart from the others, in branch.cu.
#pragma once
#include "convolution.cuh"

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

// BRANCH is true or false, SUFFIX what it adds to the name.
#define CONVOLUTION(BRANCH, SUFFIX, KIND, NAME, TYPE, BM, BN, WARP_M, STAGES, THREADS_, BYTES, BLOCKS)                           \
  extern "C" __global__ void __launch_bounds__(THREADS_, BLOCKS) conv_##NAME##_##BM##x##BN##_##TYPE##SUFFIX(ConvParams p) {     \
    using Shape = Tile<BM, BN, WARP_M, STAGES>;                                                                                 \
    static_assert(Shape::THREADS == THREADS_ && Shape::SHARED_BYTES == BYTES, "the table of tiles above is wrong");             \
    convolve<KIND, Shape, TYPE, BRANCH>(p);                                                                                     \
  }
