// Convolution as one matrix product (implicit GEMM), on the integer tensor cores: y[m][k] = sum over j of A[m][j] * B[k][j], where
//
//   m   an output pixel (n, p, q)              M = N * P * Q
//   k   an output channel                      K
//   j   a 16-byte chunk of the sum: filter tap (r, s), then chunk c of the input's channels        R * S * Cb / 16 chunks
//
//   A[m][j] = codes[n][p * stride + r - padding][q * stride + s - padding][16c ..]     gathered while loading; never stored unrolled
//   B[k][j] = weight[k][r * S + s][16c ..]                                             stored in this order
//
// The sum runs over chunks regardless of where a tap ends, so a layer of 32 or 96 channels has no padding (one tile per tap would). 4 and 8 bits differ only in the
// instruction multiply_add; a chunk is 32 codes of 4 bits, or 16 of 8.
//
// A block computes a tile of BM pixels x BN channels. Its threads copy the next stages (64 bytes of the sum for every row of A and B) while the
// tensor cores work on the present one; a ring of STAGES buffers hides the memory latency. Each warp computes WARP_M x 32 of the tile.
#pragma once
#include "epilogue.cuh"

constexpr int CHUNK = 16;                         // bytes of one cp.async, and of one row of an ldmatrix matrix
constexpr int STAGE_CHUNKS = 4;                   // chunks of the sum in a stage
constexpr int STAGE_ROW = STAGE_CHUNKS * CHUNK;   // 64 bytes of each row of A and B: two steps of multiply_add (32 bytes each)
constexpr int WARP_N = 32;                        // channels a warp computes: a 16-row slice of its result is 2 KB, see store_tile

// A tile's shape and derived constants. RTX 3090: 65536 registers and 100 KB of shared memory per multiprocessor, of which each block takes 1 KB more than
// it requests. docs/kernels.md has the occupancy that the compiler's register counts give.
template <int BM_, int BN_, int WARP_M_, int STAGES_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, WARP_M = WARP_M_, STAGES = STAGES_;
  static constexpr int WARPS_M = BM / WARP_M, WARPS_N = BN / WARP_N, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int STAGE_BYTES = (BM + BN) * STAGE_ROW, SHARED_BYTES = STAGES * STAGE_BYTES;
  static constexpr int FRAGMENTS_M = WARP_M / 16, FRAGMENTS_N = WARP_N / 8;  // multiply_add is 16 x 8
  static constexpr int LOAD_ROWS = THREADS / STAGE_CHUNKS;                   // rows that the block's threads copy at once, a chunk each
  static constexpr int LOADS_A = BM / LOAD_ROWS, LOADS_B = BN / LOAD_ROWS;   // chunks of A and of B that a thread copies for a stage
  static_assert(BM % LOAD_ROWS == 0 && BN % LOAD_ROWS == 0, "every thread copies whole chunks of every stage");
  static_assert(WARPS_M * WARPS_N * 16 * WARP_N * 4 <= SHARED_BYTES, "the result's slices reuse the stages' memory");
};

// Shared memory of a stage: BM rows of A, then BN rows of B, 64 bytes each; two rows are one line of the 32 banks. ldmatrix reads one chunk column of 8
// consecutive rows at once: unswizzled, all even rows would be in the same four banks. So chunk c of row i is stored at position c ^ (i / 2 % 4):
//
//             bank 0..3   4..7   8..11  12..15 | 16..19 20..23 24..27 28..31
//   rows 0,1      0         1      2      3    |    0      1      2      3          column c = 0 of rows 0..7 is in eight different groups
//   rows 2,3      1         0      3      2    |    1      0      3      2          of four banks, and so is every other column: one pass.
//   rows 4,5      2         3      0      1    |    2      3      0      1          The eight threads that write two rows together fill
//   rows 6,7      3         2      1      0    |    3      2      1      0          one line: one pass, too.
__device__ __forceinline__ unsigned swizzled(int row, int chunk) { return row * STAGE_ROW + (chunk ^ (row / 2 % STAGE_CHUNKS)) * CHUNK; }

// Copies stages of A and B into shared memory. Four neighbouring threads copy the four chunks of one row: 64 contiguous bytes of a pixel. All divisions
// are done here, once; the main loop only adds. With a branch its stages follow those of the sum: 32 numbers of each row of `low` and `up`.
template <class TILE, bool BRANCH>
struct Loader {
  const ConvParams& p;
  unsigned place;                      // offset in a stage of this thread's first chunk of A; the next ones follow LOAD_ROWS rows further, with the same swizzle
  int r, s, c;                         // current tap, and byte offset in its channels; r >= R: past the end of the sum
  int top[TILE::LOADS_A], left[TILE::LOADS_A];  // per row of A: input position of its tap (0, 0), maybe outside the map
  long long first[TILE::LOADS_A];      //   offset of that position in `codes`: dereferenced only where a tap is inside the map
  int zero[TILE::LOADS_A];             //   offset of its sample's 16-byte code of zero
  long long weight[TILE::LOADS_B];     // per row of B: offset of that chunk in `weight`
  int stages;                          // of the sum that are still to be loaded

  __device__ __forceinline__ Loader(const ConvParams& params, int first_stage, int count) : p(params), stages(count) {
    const int chunk = threadIdx.x % STAGE_CHUNKS, row = threadIdx.x / STAGE_CHUNKS;
    place = swizzled(row, chunk);
    const int chunks = p.Cb / CHUNK, j = first_stage * STAGE_CHUNKS + chunk, tap = j / chunks;
    c = (j - tap * chunks) * CHUNK;
    r = tap / p.S;
    s = tap - r * p.S;
    const int pixels = p.P * p.Q, M = p.N * pixels;
#pragma unroll
    for (int i = 0; i < TILE::LOADS_A; ++i) {
      const int m = min(static_cast<int>(blockIdx.x) * TILE::BM + row + i * TILE::LOAD_ROWS, M - 1);  // rows past the end repeat the last one and are not stored
      const int n = m / pixels, pixel = m - n * pixels, y = pixel / p.Q, x = pixel - y * p.Q;
      top[i] = y * p.stride - p.padding;
      left[i] = x * p.stride - p.padding;
      first[i] = ((static_cast<long long>(n) * p.H + top[i]) * p.W + left[i]) * p.Cb;
      zero[i] = p.row[n] * CHUNK;
    }
#pragma unroll
    for (int i = 0; i < TILE::LOADS_B; ++i) {
      const int k = min(static_cast<int>(blockIdx.y) * TILE::BN + row + i * TILE::LOAD_ROWS, p.K - 1);
      weight[i] = static_cast<long long>(k) * p.R * p.S * p.Cb + static_cast<long long>(j) * CHUNK;
    }
  }

  // Starts the copies of the next stage into the buffer at `stage`, and advances.
  __device__ __forceinline__ void load(unsigned stage) {
    if (BRANCH && stages-- <= 0) return load_branch(stage, -1 - stages);
    const unsigned a = stage + place, b = a + TILE::BM * STAGE_ROW;
    const long long tap = (static_cast<long long>(r) * p.W + s) * p.Cb + c;
#pragma unroll
    for (int i = 0; i < TILE::LOADS_A; ++i) {
      // One unsigned comparison checks 0 <= y < H. Past the end of the sum r keeps increasing: what is read then is valid memory, multiplied by zero weights.
      const bool inside = static_cast<unsigned>(top[i] + r) < static_cast<unsigned>(p.H) && static_cast<unsigned>(left[i] + s) < static_cast<unsigned>(p.W);
      copy_async(a + i * TILE::LOAD_ROWS * STAGE_ROW, inside ? p.codes + (first[i] + tap) : p.zero + zero[i], true);
    }
#pragma unroll
    for (int i = 0; i < TILE::LOADS_B; ++i) {
      copy_async(b + i * TILE::LOAD_ROWS * STAGE_ROW, p.weight + (r < p.R ? weight[i] : 0), r < p.R);
      weight[i] += STAGE_ROW;
    }
    c += STAGE_CHUNKS * CHUNK;
    while (c >= p.Cb) {  // once for 64 bytes of channels or more, at most four times
      c -= p.Cb;
      if (++s == p.S) s = 0, ++r;
    }
  }

  // Stage `index` of the branch; numbers past the rank are 0.
  __device__ __forceinline__ void load_branch(unsigned stage, int index) {
    const unsigned a = stage + place, b = a + TILE::BM * STAGE_ROW;
    const int row = threadIdx.x / STAGE_CHUNKS, element = (index * STAGE_CHUNKS + threadIdx.x % STAGE_CHUNKS) * OCTET, M = p.N * p.P * p.Q;
    const bool exists = element < p.rank;
    const auto copy = [&](unsigned to, const void* matrix, int at, int pitch) {
      const long long offset = exists ? static_cast<long long>(at) * pitch + element : 0;
      copy_async(to, static_cast<const unsigned short*>(matrix) + offset, exists);
    };
#pragma unroll
    for (int i = 0; i < TILE::LOADS_A; ++i)
      copy(a + i * TILE::LOAD_ROWS * STAGE_ROW, p.low, min(static_cast<int>(blockIdx.x) * TILE::BM + row + i * TILE::LOAD_ROWS, M - 1), p.low_stride);
#pragma unroll
    for (int i = 0; i < TILE::LOADS_B; ++i)
      copy(b + i * TILE::LOAD_ROWS * STAGE_ROW, p.up, min(static_cast<int>(blockIdx.y) * TILE::BN + row + i * TILE::LOAD_ROWS, p.K - 1), p.rank);
  }
};

// What a stage holds, and how it is multiplied: codes, or 16-bit numbers, whose sums are float32 in the same registers, by their bits.
template <Kind KIND>
struct Codes {
  static __device__ __forceinline__ void multiply(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { multiply_add<KIND>(c, a, b0, b1); }
};
template <class T>
struct Numbers {
  static __device__ __forceinline__ void multiply(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    float sums[4] = {__int_as_float(c[0]), __int_as_float(c[1]), __int_as_float(c[2]), __int_as_float(c[3])};
    multiply_add<T>(sums, a, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = __float_as_int(sums[i]);
  }
};

// One stage of the sum: both 32-byte steps of every fragment of the warp's tile.
template <class OPERANDS, class TILE>
__device__ __forceinline__ void multiply_stage(int (&sums)[TILE::FRAGMENTS_M][TILE::FRAGMENTS_N][4], unsigned a_address, unsigned b_address) {
#pragma unroll
  for (int step = 0; step < STAGE_CHUNKS / 2; ++step) {
    // The next step is two chunks on: bit 1 of the chunk, bit 5 of the address, swizzled or not.
    const unsigned flip = step * 2 * CHUNK;
    unsigned a[TILE::FRAGMENTS_M][4], b[TILE::FRAGMENTS_N / 2][4];
#pragma unroll
    for (int i = 0; i < TILE::FRAGMENTS_M; ++i) load_matrices(a[i], (a_address ^ flip) + i * 16 * STAGE_ROW);
#pragma unroll
    for (int i = 0; i < TILE::FRAGMENTS_N / 2; ++i) load_matrices(b[i], (b_address ^ flip) + i * 16 * STAGE_ROW);
#pragma unroll
    for (int i = 0; i < TILE::FRAGMENTS_M; ++i)
#pragma unroll
      for (int k = 0; k < TILE::FRAGMENTS_N; ++k) OPERANDS::multiply(sums[i][k], a[i], b[k / 2][k % 2 * 2], b[k / 2][k % 2 * 2 + 1]);
  }
}

// Integer sums become the bits of the numbers that they stand for, to which a branch is added.
template <Kind KIND, class TILE>
__device__ __forceinline__ void dequantize(const ConvParams& p, int (&sums)[TILE::FRAGMENTS_M][TILE::FRAGMENTS_N][4], int m0, int k0) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, pixels = p.P * p.Q, M = p.N * pixels;
#pragma unroll
  for (int i = 0; i < TILE::FRAGMENTS_M; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = p.row[min(m0 + i * 16 + g + half * 8, M - 1) / pixels];
      const float act_scale = p.act_scale[row];
#pragma unroll
      for (int f = 0; f < TILE::FRAGMENTS_N; ++f)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int k = min(k0 + f * 8 + t * 2 + c, p.K - 1);
          int& sum = sums[i][f][half * 2 + c];
          sum = __float_as_int(dequantized<KIND>(p, row, sum, act_scale, p.weight_scale[k], KIND == U4 ? p.weight_sum[k] : 0));
        }
    }
}

// Position of column `column` of row `row` in a warp's 16 x 32 slice of int32. A row is one line of the 32 banks. Writing, 16 lanes at a time put 8 neighbouring
// columns of 4 rows: the first XOR moves each of the 4 rows to different banks. Reading, 8 lanes at a time take half of every octet of 2 rows: the second XOR has
// the odd row take the other halves' banks. There are no bank conflicts.
__device__ __forceinline__ int slice_place(int row, int column) { return row * WARP_N + (column ^ (row % 4 * 8) ^ (row % 2 * 4)); }

// Results are stored through shared memory: a lane holds two neighbouring channels of eight pixels (8-byte pieces), but can store 16 bytes at once when it has eight
// channels of one. Each warp transposes its own slices of 16 pixels, so no block-wide barrier is needed.
//
//   fragment:  lane 4g + t holds columns 2t, 2t + 1 of rows g and g + 8      stored:  lane 4i + o takes octet o of rows i and i + 8
template <Kind KIND, class TILE, class T, bool BRANCH>
__device__ __forceinline__ void store_tile(const ConvParams& p, const int (&sums)[TILE::FRAGMENTS_M][TILE::FRAGMENTS_N][4], int m0, int k0, int* slice) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, M = p.N * p.P * p.Q, k = k0 + t * OCTET;
  const Columns<KIND> columns(p, k);
#pragma unroll
  for (int i = 0; i < TILE::FRAGMENTS_M; ++i) {
#pragma unroll
    for (int f = 0; f < TILE::FRAGMENTS_N; ++f) {
      *reinterpret_cast<int2*>(slice + slice_place(g, f * 8 + t * 2)) = int2{sums[i][f][0], sums[i][f][1]};
      *reinterpret_cast<int2*>(slice + slice_place(g + 8, f * 8 + t * 2)) = int2{sums[i][f][2], sums[i][f][3]};
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = g + half * 8, m = m0 + i * 16 + row;
      const int4 low = *reinterpret_cast<const int4*>(slice + slice_place(row, t * OCTET));
      const int4 high = *reinterpret_cast<const int4*>(slice + slice_place(row, t * OCTET + 4));
      const int octet[OCTET] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      if (m >= M || k >= p.K) continue;
      if (BRANCH || p.splits == 1) {
        finish<KIND, T, BRANCH>(p, columns, m, k, octet);
        continue;
      }
      int* to = p.partial + (static_cast<long long>(blockIdx.z) * M + m) * p.K + k;
      if (p.K % OCTET == 0) {
        store_octet(to, octet);
      } else {
#pragma unroll
        for (int e = 0; e < OCTET; ++e)
          if (k + e < p.K) to[e] = octet[e];
      }
    }
    __syncwarp();  // the next slice overwrites this one
  }
}

// With a branch the sum is not split: reduce_*_branch adds the branch of one that is.
template <Kind KIND, class TILE, class T, bool BRANCH = false>
__device__ __forceinline__ void convolve(const ConvParams& p) {
  // The stages of this block: all of them, or an even share where several blocks split the sum. A share may be empty: its sums are 0.
  const int stages = divide_up(p.R * p.S * (p.Cb / CHUNK), STAGE_CHUNKS), share = divide_up(stages, p.splits);
  const int begin = blockIdx.z * share, count = max(min(stages - begin, share), 0);
  const int last = BRANCH ? count + divide_up(p.rank, STAGE_CHUNKS * OCTET) : count;

  byte_t* const memory = dynamic_shared();
  const unsigned base = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % TILE::WARPS_M * TILE::WARP_M, warp_n = warp / TILE::WARPS_M * WARP_N;
  // ldmatrix takes row addresses from the lanes, eight per matrix, and returns matrix i in register i. multiply_add expects
  //   A: rows 0..7 | rows 8..15 | rows 0..7, next chunk | rows 8..15, next chunk          a whole 16 x 32-byte fragment
  //   B: rows 0..7 | rows 0..7, next chunk | rows 8..15 | rows 8..15, next chunk          two 8 x 32-byte fragments
  const unsigned a_lane = swizzled(warp_m + lane % 16, lane / 16);
  const unsigned b_lane = TILE::BM * STAGE_ROW + swizzled(warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);

  int sums[TILE::FRAGMENTS_M][TILE::FRAGMENTS_N][4] = {};
  const int m0 = blockIdx.x * TILE::BM + warp_m, k0 = blockIdx.y * TILE::BN + warp_n;
  Loader<TILE, BRANCH> loader(p, begin, count);
  int loaded = 0;
  for (; loaded < TILE::STAGES - 1; ++loaded) {
    if (loaded < last) loader.load(base + loaded * TILE::STAGE_BYTES);
    commit_copies();  // also when empty: then "all but the newest STAGES - 2 groups" always means "the stage that comes next"
  }
  unsigned reading = 0, writing = (TILE::STAGES - 1) * TILE::STAGE_BYTES;
  for (int stage = 0; stage < last; ++stage, ++loaded) {
    wait_copies<TILE::STAGES - 2>();  // this thread's part of the stage has arrived,
    __syncthreads();                  // every thread's has; and all threads have finished the previous stage, whose buffer is now refilled
    if (loaded < last) loader.load(base + writing);
    commit_copies();
    if (BRANCH && stage == count) dequantize<KIND, TILE>(p, sums, m0, k0);
    if (BRANCH && stage >= count) multiply_stage<Numbers<T>, TILE>(sums, base + reading + a_lane, base + reading + b_lane);
    else multiply_stage<Codes<KIND>, TILE>(sums, base + reading + a_lane, base + reading + b_lane);
    writing = reading;
    reading += TILE::STAGE_BYTES;
    if (reading == TILE::SHARED_BYTES) reading = 0;
  }
  wait_copies<0>();
  __syncthreads();  // the stages' memory is free
  int* const slice = reinterpret_cast<int*>(memory) + warp * 16 * WARP_N;
  store_tile<KIND, TILE, T, BRANCH>(p, sums, m0, k0, slice);
}
