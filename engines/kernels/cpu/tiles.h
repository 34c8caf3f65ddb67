// The tile instructions of AMX, or what they do in plain C++ (EDM_EMULATED_TILES), by which tests run the code that uses them on any CPU.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TILELOADD, TILESTORED, TDPBSSD.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(EDM_EMULATED_TILES)
#define HAS_TILES
#elif defined(__AMX_INT8__) && defined(__linux__)
#define HAS_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(HAS_TILES)

constexpr int TILE_ROWS = 16;   // of each tile here
constexpr int TILE_BYTES = 64;  // of a row

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES};
  uint8_t rows[16] = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

#if defined(EDM_EMULATED_TILES)
namespace emulated {
struct Registers {
  TileConfig config;
  bool configured = false;
  int8_t tile[8][TILE_ROWS][TILE_BYTES];
};
inline thread_local Registers registers;

inline void configure(const TileConfig* config) { registers.config = *config, registers.configured = true; }
inline void release() { registers.configured = false; }
// An unconfigured tile faults.
inline int rows(int t) { return registers.configured ? registers.config.rows[t] : (__builtin_trap(), 0); }

inline void zero(int t) { rows(t), memset(registers.tile[t], 0, sizeof(registers.tile[t])); }
inline void load(int t, const void* base, int64_t stride) {
  memset(registers.tile[t], 0, sizeof(registers.tile[t]));
  for (int i = 0; i < rows(t); i++) memcpy(registers.tile[t][i], (const char*)base + i * stride, registers.config.bytes[t]);
}
inline void store(int t, void* base, int64_t stride) {
  for (int i = 0; i < rows(t); i++) memcpy((char*)base + i * stride, registers.tile[t][i], registers.config.bytes[t]);
}
// Rows of `a` are 64 signed bytes of a pixel, rows of `b` four of them for each of 16 output channels.
inline void add_products(int c, int a, int b) {
  for (int i = 0; i < rows(c); i++) {
    int32_t sums[16];
    memcpy(sums, registers.tile[c][i], sizeof(sums));
    for (int k = 0; k < TILE_BYTES; k++)
      for (int j = 0; j < 16; j++) sums[j] += registers.tile[a][i][k] * registers.tile[b][k / 4][4 * j + k % 4];
    memcpy(registers.tile[c][i], sums, sizeof(sums));
  }
}
}  // namespace emulated

#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() emulated::release()
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, base, stride) emulated::load(t, base, stride)
#define _tile_stored(t, base, stride) emulated::store(t, base, stride)
#define _tile_dpbssd(c, a, b) emulated::add_products(c, a, b)

inline bool tiles_permitted() { return true; }
#else
// Linux keeps the state of tiles for processes that asked for it. Source: Documentation/arch/x86/xstate.rst of the kernel.
inline bool tiles_permitted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

#endif  // HAS_TILES
