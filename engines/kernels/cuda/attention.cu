// The entry points of attention, which are compiled apart from the others: most engines do not use them. params.h documents their parameters and launches.
#include "attention.cuh"

// X(width, warps, keys of a stage, threads, bytes of dynamic shared memory, blocks per multiprocessor): a head has the smallest width that it fits.
//
// 48    heads of 40: 64 bytes of codes, 48 elements of a value
// 64    SDXL, SD 3 and most others
// 80    heads of 72 and 80
// 128   FLUX. Sums of P V take 64 registers: half the keys, half the warps
// 160   the innermost blocks of SD 1.5
#define WIDTHS(X)                 \
  X(48, 8, 64, 256, 25088, 2)     \
  X(64, 8, 64, 256, 29184, 2)     \
  X(80, 8, 64, 256, 37376, 2)     \
  X(128, 4, 32, 128, 26880, 3)    \
  X(160, 4, 32, 128, 33024, 2)

#define ATTENTION(TYPE, WIDTH, WARPS, KEYS, THREADS_, BYTES, BLOCKS)                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS_, BLOCKS) attention_s8_##WIDTH##_##TYPE(AttentionParams p) {           \
    using Shape = AttentionTile<WIDTH, WARPS, KEYS>;                                                                          \
    static_assert(Shape::THREADS == THREADS_ && Shape::SHARED_BYTES == BYTES, "the table of widths above is wrong");          \
    attend<Shape, TYPE>(p);                                                                                                   \
  }
#define OF_F16(...) ATTENTION(f16, __VA_ARGS__)
#define OF_BF16(...) ATTENTION(bf16, __VA_ARGS__)
WIDTHS(OF_F16)
WIDTHS(OF_BF16)

#define KEYS_OF(TYPE)                                                                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_key_sums_##TYPE(AttentionParams p) { sum_keys<TYPE>(p); }     \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_key_codes_##TYPE(AttentionParams p) { encode_keys<TYPE>(p); }
KEYS_OF(f16)
KEYS_OF(bf16)
