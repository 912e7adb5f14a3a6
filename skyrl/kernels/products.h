// Vectors as wide as the processor's, and products with packed weights, on a CPU. Part of decode.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// LANES: numbers of a vector register, for wider ones live in memory. ROWS of a tile, which has two accumulators for
// each: most registers, the rest for the weights.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 12;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int PANEL = 2 * LANES;  // columns of a weight panel
using bf16 = uint16_t;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef float vq __attribute__((vector_size(2 * LANES)));  // half as many, which fill a vector as doubles
typedef double vd __attribute__((vector_size(4 * LANES)));
#if defined(__AVX512F__)
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX__)
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr vi LANE = {0, 1, 2, 3};
#endif

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vf set(float x) { return vf{} + x; }

inline float wide(bf16 x) { uint32_t u = uint32_t(x) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
// To nearest, ties to even; NaN stays NaN. The instruction makes what is below 1.2e-38 zero.
inline vh narrow(vf f) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)f);
#endif
  vu u = (vu)f, r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((r & ~nan) | (nan & 0x7fc0u), vh);
}
inline vf get(const float* p) { return load<vf>(p); }
inline vf get(const bf16* p) { return widen(load<vh>(p)); }
inline void put(float* p, vf v) { store(p, v); }
inline void put(bf16* p, vf v) { store(p, narrow(v)); }
template <class T> inline vf round_to(vf v) { if constexpr (sizeof(T) == 2) return widen(narrow(v)); else return v; }

inline vd doubles(const float* p) { return __builtin_convertvector(load<vq>(p), vd); }  // LANES / 2 of them
inline double sum(vd v) {
  double part[LANES / 2];
  store(part, v);
  for (int step = 1; step < LANES / 2; step *= 2)
    for (int i = 0; i < LANES / 2; i += 2 * step) part[i] += part[i + step];
  return part[0];
}
template <int BY = LANES / 2> inline float sum(vf v) {
  if constexpr (BY == 0) return v[0];
  else return sum<BY / 2>(v + __builtin_shuffle(v, (LANE + BY) & (LANES - 1)));
}
template <int BY = LANES / 2> inline float largest(vf v) {
  if constexpr (BY == 0) return v[0];
  else {
    vf o = __builtin_shuffle(v, (LANE + BY) & (LANES - 1));
    return largest<BY / 2>(v > o ? v : o);
  }
}

inline vf exponential(vf x) {  // relative error about 1e-7; 0 below -87, infinity above 88
  vi low = x < -87.0f, high = x > 88.0f;
  x = (vf)((vi)x & ~low & ~high);
  vf n = x * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
  vi k = (vi)n - 0x4b400000;
  n -= 12582912.0f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vf)(((vi)(p * (vf)((k + 127) << 23)) & ~low) | ((vi)set(INFINITY) & high));  // e^0 has no bit that infinity lacks
}

// ---- products: y = x w^T with w in panels of PANEL columns ----------------------------------------------------------
// bfloat16: [columns / PANEL][inner / 2][PANEL][2]; float32: [columns / PANEL][inner][PANEL]. Missing columns are zero.

inline size_t panel_size(int dtype, int inner) { return size_t(dtype ? (inner + 1) / 2 * 2 : inner) * PANEL; }

// The loops over rows are unrolled whole, or the accumulators would live in memory at a third of the speed.
// float32: sums of TERMS products are summed, which is off by less than one long sum.
constexpr int TERMS = 32;
template <int M> inline void tile(const float* x, int stride, const float* w, int inner, vf (*acc)[2]) {
  for (int from = 0; from < inner; from += TERMS) {
    vf part[M][2];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) part[m][0] = part[m][1] = vf{};
    for (int k = from; k < std::min(from + TERMS, inner); k++, w += PANEL) {
      vf a = get(w), b = get(w + LANES);
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) {
        float s = x[size_t(m) * stride + k];
        part[m][0] += a * s;
        part[m][1] += b * s;
      }
    }
    if (from == 0) {
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) acc[m][0] = part[m][0], acc[m][1] = part[m][1];
    } else {
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) acc[m][0] += part[m][0], acc[m][1] += part[m][1];
    }
  }
}

template <int M> inline void tile(const bf16* x, int stride, const bf16* w, int inner, vf (*acc)[2]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = vf{};
  for (int k = 0; k < inner; k += 2, w += 2 * PANEL) {
#if defined(__AVX512BF16__)
    __m512bh a = load<__m512bh>(w), b = load<__m512bh>(w + PANEL);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      int32_t pair;
      std::memcpy(&pair, x + size_t(m) * stride + k, 4);
      __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
      acc[m][0] = (vf)_mm512_dpbf16_ps((__m512)acc[m][0], a, s);
      acc[m][1] = (vf)_mm512_dpbf16_ps((__m512)acc[m][1], b, s);
    }
#else
    vu a = load<vu>(w), b = load<vu>(w + PANEL);  // pairs of bfloat16
    vf a0 = (vf)(a << 16), a1 = (vf)(a & 0xffff0000u), b0 = (vf)(b << 16), b1 = (vf)(b & 0xffff0000u);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      float s0 = wide(x[size_t(m) * stride + k]), s1 = wide(x[size_t(m) * stride + k + 1]);
      acc[m][0] += a0 * s0 + a1 * s1;
      acc[m][1] += b0 * s0 + b1 * s1;
    }
#endif
  }
}

template <class T, int M, class Done> inline void rows_of(const T* x, int inner, const T* w, int row, Done done) {
  vf acc[M][2], out[M][2];
  tile<M>(x + size_t(row) * inner, inner, w, inner, acc);
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) out[m][0] = acc[m][0], out[m][1] = acc[m][1];
  for (int m = 0; m < M; m++) done(row + m, out[m][0], out[m][1]);
}

// call(constant n), n = 1 .. ROWS
template <class Call> inline void with_rows(int n, Call call) {
  switch (n) {
#define CASE(n) case n: if constexpr (n <= ROWS) call(std::integral_constant<int, n>{}); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
  }
}

// Processors with AMX multiply tiles of 16 rows: a panel's layout is what they read. A row's sums depend neither on the
// tile's other rows nor on their number, so all of a model's products of that depth go this way, or none.
#if defined(HAS_TILES)
constexpr int DEPTH = 32;  // of a tile

struct TileConfig {  // as the processor reads it
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {0, 0, 0, 0, 0, 0, 16, 16};
};

inline bool has_tiles() {  // Linux gives a process these registers when it asks
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return granted;
}

inline void written() { asm volatile("" ::: "memory"); }  // the compiler does not know what the instructions read

thread_local int tile_rows = 0;  // for which this thread's tiles are configured

struct Tiles {  // around a thread's work: torch's own library must find the configuration that it has left
  alignas(64) TileConfig before;
  Tiles() {
    tile_rows = 0;
    if (has_tiles()) _tile_storeconfig(&before);
  }
  ~Tiles() {
    if (!has_tiles()) return;
    written();
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
  }
};

inline void configure_tiles(int rows) {  // of two tiles, the first one full before the second has any
  if (rows == tile_rows) return;
  alignas(64) TileConfig c;
  c.rows[0] = c.rows[1] = c.rows[4] = uint8_t(std::min(rows, 16));
  c.rows[2] = c.rows[3] = c.rows[5] = uint8_t(std::max(rows - 16, 1));
  written();
  _tile_loadconfig(&c);
  tile_rows = rows;
}

// `ahead`: where the panel after this one begins, which is brought nearer meanwhile; 0 = nowhere.
template <bool TWO, class Done>
inline void tiles_of(const bf16* x, int rows, int inner, const bf16* w, size_t ahead, Done done) {
  alignas(64) float out[2][2][16][16];
  size_t stride = size_t(inner) * sizeof(bf16), beside = 2 * PANEL * sizeof(bf16);
  configure_tiles(rows);
  written();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TWO) { _tile_zero(2); _tile_zero(3); }
  for (int k = 0; k < inner; k += DEPTH, w += DEPTH * PANEL) {
#pragma GCC unroll 32
    for (int i = 0; ahead && i < DEPTH; i++) _mm_prefetch((const char*)(w + ahead + i * PANEL), _MM_HINT_T1);
    _tile_loadd(4, x + k, stride);
    _tile_loadd(6, w, beside);
    _tile_loadd(7, w + PANEL, beside);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TWO) {
      _tile_loadd(5, x + 16 * size_t(inner) + k, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out[0][0], 64);
  _tile_stored(1, out[0][1], 64);
  if constexpr (TWO) { _tile_stored(2, out[1][0], 64); _tile_stored(3, out[1][1], 64); }
  for (int row = 0; row < rows; row++) done(row, get(out[row / 16][0][row % 16]), get(out[row / 16][1][row % 16]));
}
#else
struct Tiles { Tiles() {} };
#endif

// Calls done(row, first LANES columns, the others) for every row of the panel.
template <class T, class Done> inline void panel(const T* x, int count, int inner, const T* w, Done done) {
#if defined(HAS_TILES)
  if constexpr (sizeof(T) == 2)
    if (inner % DEPTH == 0 && has_tiles()) {
      for (int row = 0; row < count; row += 32) {
        int rows = std::min(32, count - row);
        // The first rows wait for the weights, the others find them in the cache: memory is idle then.
        size_t ahead = row + 32 >= count ? panel_size(1, inner) : 0;
        auto here = [&](int at, vf a, vf b) { done(row + at, a, b); };
        if (rows > 16) tiles_of<true>(x + size_t(row) * inner, rows, inner, w, ahead, here);
        else tiles_of<false>(x + size_t(row) * inner, rows, inner, w, ahead, here);
      }
      return;
    }
#endif
  int parts = (count + ROWS - 1) / ROWS;
  for (int part = 0; part < parts; part++) {
    int row = int64_t(count) * part / parts, n = int(int64_t(count) * (part + 1) / parts) - row;
    with_rows(n, [&](auto m) { rows_of<T, decltype(m)::value>(x, inner, w, row, done); });
  }
}

}  // namespace
