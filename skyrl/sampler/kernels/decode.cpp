// One forward pass of a plain decoder (RMSNorm, rotary grouped-head attention over paged keys and values, gated SiLU)
// for few tokens on a CPU, in one call. Plain C++17 with GCC's vectors, no library: built in seconds, loaded by ctypes.
//
// Every token is a row: it writes its key and value to its slot, then attends to positions 0 .. its own through its
// row of the block table. So decoding (a row per sequence) and short prefills (a row per token) are the same call.
// bfloat16 results are rounded where the module in torch rounds them; all sums run in float32.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int LANES = 16, PANEL = 2 * LANES;  // columns of a vector, of a weight panel
#if defined(__AVX512F__)
constexpr int ROWS = 12;  // rows of a tile: 24 accumulators of 32 registers
#else
constexpr int ROWS = 3;
#endif
using bf16 = uint16_t;
typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vf set(float x) { return vf{} + x; }

inline float wide(bf16 x) { uint32_t u = uint32_t(x) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
inline vh narrow(vf f) {  // to nearest, ties to even; NaN stays NaN
  vu u = (vu)f, r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((r & ~nan) | (nan & 0x7fc0u), vh);
}
inline vf get(const float* p) { return load<vf>(p); }
inline vf get(const bf16* p) { return widen(load<vh>(p)); }
inline void put(float* p, vf v) { store(p, v); }
inline void put(bf16* p, vf v) { store(p, narrow(v)); }
template <class T> inline vf round_to(vf v) { if constexpr (sizeof(T) == 2) return widen(narrow(v)); else return v; }

inline vf rotated(vf v, int by) {
  vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return __builtin_shuffle(v, (lane + by) & 15);
}
inline float sum(vf v) { for (int by : {8, 4, 2, 1}) v += rotated(v, by); return v[0]; }
inline float largest(vf v) { for (int by : {8, 4, 2, 1}) { vf o = rotated(v, by); v = v > o ? v : o; } return v[0]; }

inline vf exponential(vf x) {  // relative error about 1e-7; 0 below -87
  vi low = x < -87.0f, high = x > 88.0f;
  x = (vf)(((vi)x & ~low & ~high) | ((vi)set(88.0f) & high));
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
  return (vf)((vi)(p * (vf)((k + 127) << 23)) & ~low);
}

// ---- products: y = x w^T with w in panels of 32 columns -------------------------------------------------------------
// bfloat16: [columns / 32][inner / 2][32][2]; float32: [columns / 32][inner][32]. Missing columns are zero.

inline size_t panel_size(int dtype, int inner) { return size_t(dtype ? (inner + 1) / 2 * 2 : inner) * PANEL; }

// The loops over rows are unrolled whole, or the accumulators would live in memory at a third of the speed.
template <int M> inline void tile(const float* x, int stride, const float* w, int inner, vf (*acc)[2]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = vf{};
  for (int k = 0; k < inner; k++, w += PANEL) {
    vf a = get(w), b = get(w + LANES);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      float s = x[size_t(m) * stride + k];
      acc[m][0] += a * s;
      acc[m][1] += b * s;
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
    vu a = load<vu>(w), b = load<vu>(w + PANEL);
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

// Calls done(row, columns 0-15, columns 16-31) for every row of the panel.
template <class T, class Done> inline void panel(const T* x, int count, int inner, const T* w, Done done) {
  int parts = (count + ROWS - 1) / ROWS;
  for (int part = 0; part < parts; part++) {
    int row = int64_t(count) * part / parts, n = int(int64_t(count) * (part + 1) / parts) - row;
    switch (n) {
#define CASE(n) case n: if constexpr (n <= ROWS) rows_of<T, n>(x, inner, w, row, done); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
  }
}

// ---- the model ------------------------------------------------------------------------------------------------------

struct Layer {
  const void *input_norm, *qkv, *qkv_bias, *query_norm, *key_norm, *out, *out_bias, *mlp_norm;
  const void *gate_up, *gate_up_bias, *down, *down_bias;
  void *keys, *values;
};
struct Model {
  int32_t dtype, layers, hidden, heads, kv_heads, channels, ffn, vocab, block_tokens, threads;
  float eps, scale;
  const void *embedding, *norm, *head, *head_bias, *cosines, *sines;
  const Layer* layer;
};
struct Step {
  int32_t count, width, num_logits;
  const int64_t *tokens, *positions;
  const int32_t* table;   // [count, width]
  const int64_t* rows;    // [num_logits]: which rows give logits
  float* logits;          // [num_logits, vocab]
};

struct Team {  // the threads of one parallel region
  int rank, size;
  void wait() const {
#if defined(_OPENMP)
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  int from(int n) const { return int64_t(n) * rank / size; }
  int to(int n) const { return int64_t(n) * (rank + 1) / size; }
};

template <class T> void rms_norm(const T* x, const T* weight, T* y, int size, float eps) {
  vf squares{};
  for (int i = 0; i < size; i += LANES) { vf v = get(x + i); squares += v * v; }
  vf r = set(1.0f / std::sqrt(sum(squares) / size + eps));
  for (int i = 0; i < size; i += LANES) put(y + i, round_to<T>(get(x + i) * r) * get(weight + i));
}

template <class T> inline vf bias_at(const T* bias, int column) { return bias ? get(bias + column) : vf{}; }

// y[row, column] = product + bias
template <class T>
void linear(const Team& team, const T* x, int count, int inner, const T* w, const T* bias, T* y, int columns) {
  int panels = (columns + PANEL - 1) / PANEL;
  for (int p = team.from(panels); p < team.to(panels); p++) {
    int c = p * PANEL;
    bool both = c + LANES < columns;
    vf b0 = bias_at(bias, c), b1 = both ? bias_at(bias, c + LANES) : vf{};
    panel(x, count, inner, w + p * panel_size(sizeof(T) == 2, inner), [&](int row, vf a, vf b) {
      T* to = y + size_t(row) * columns + c;
      put(to, a + b0);
      if (both) put(to + LANES, b + b1);
    });
  }
}

// y[row, column] += product + bias
template <class T>
void linear_add(const Team& team, const T* x, int count, int inner, const T* w, const T* bias, T* y, int columns) {
  int panels = (columns + PANEL - 1) / PANEL;
  for (int p = team.from(panels); p < team.to(panels); p++) {
    int c = p * PANEL;
    bool both = c + LANES < columns;
    vf b0 = bias_at(bias, c), b1 = both ? bias_at(bias, c + LANES) : vf{};
    panel(x, count, inner, w + p * panel_size(sizeof(T) == 2, inner), [&](int row, vf a, vf b) {
      T* to = y + size_t(row) * columns + c;
      put(to, get(to) + round_to<T>(a + b0));
      if (both) put(to + LANES, get(to + LANES) + round_to<T>(b + b1));
    });
  }
}

// y[row, channel] = silu(gate) * up; a panel holds 16 columns of each
template <class T>
void gated(const Team& team, const T* x, int count, int inner, const T* w, const T* bias, T* y, int ffn) {
  int panels = ffn / LANES;
  for (int p = team.from(panels); p < team.to(panels); p++) {
    vf b0 = bias_at(bias, p * LANES), b1 = bias_at(bias, ffn + p * LANES);
    panel(x, count, inner, w + p * panel_size(sizeof(T) == 2, inner), [&](int row, vf gate, vf up) {
      gate = round_to<T>(gate + b0);
      up = round_to<T>(up + b1);
      vf silu = round_to<T>(gate / (1.0f + exponential(-gate)));
      put(y + size_t(row) * ffn + p * LANES, silu * up);
    });
  }
}

// ---- attention ------------------------------------------------------------------------------------------------------

// Norm (if any) and rotation of one head, as the module does it, rounding included.
template <class T>
void rotate(const T* x, const T* weight, const T* cosine, const T* sine, T* y, int channels, float eps, T* room) {
  if (weight) { rms_norm(x, weight, room, channels, eps); x = room; }
  int half = channels / 2;
  for (int i = 0; i < channels; i += LANES) {
    vf turned;
    if (half % LANES == 0) {
      turned = i < half ? -get(x + i + half) : get(x + i - half);
    } else {
      for (int j = 0; j < LANES; j++) {
        int c = i + j;
        float v;
        if constexpr (sizeof(T) == 2) v = wide(x[c < half ? c + half : c - half]);
        else v = x[c < half ? c + half : c - half];
        turned[j] = c < half ? -v : v;
      }
    }
    put(y + i, round_to<T>(get(x + i) * get(cosine + i)) + round_to<T>(turned * get(sine + i)));
  }
}

template <class T> inline vf dots(const T* query, const T* key, int channels) {  // partial sums in 16 lanes
  vf acc{};
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    int c = 0;
    for (; c + 32 <= channels; c += 32)
      acc = (vf)_mm512_dpbf16_ps((__m512)acc, load<__m512bh>(query + c), load<__m512bh>(key + c));
    if (c < channels) acc += get(query + c) * get(key + c);
    return acc;
  }
#endif
  for (int c = 0; c < channels; c += LANES) acc += get(query + c) * get(key + c);
  return acc;
}

// Sixteen vectors to one: lane i is the sum of vector i.
inline vf sums(vf* a) {  // unrolled, or `a` lives in memory
  const vi lo8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, hi8 = lo8 + 8;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) a[i] = __builtin_shuffle(a[i], a[i + 8], lo8) + __builtin_shuffle(a[i], a[i + 8], hi8);
  const vi lo4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}, hi4 = lo4 + 4;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) a[i] = __builtin_shuffle(a[i], a[i + 4], lo4) + __builtin_shuffle(a[i], a[i + 4], hi4);
  const vi lo2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, hi2 = lo2 + 2;
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) a[i] = __builtin_shuffle(a[i], a[i + 2], lo2) + __builtin_shuffle(a[i], a[i + 2], hi2);
  const vi lo1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}, hi1 = lo1 + 1;
  return __builtin_shuffle(a[0], a[1], lo1) + __builtin_shuffle(a[0], a[1], hi1);
}

// out = sum_j p[j] value[j] / total for Q queries that share the values; N vectors of channels from `at` on.
template <class T, int N, int Q>
inline void mix(const T* values, const size_t* places, const float* p, int padded, int keys, const float* inverse,
                T* out, int channels, int at) {
  vf acc[Q][N];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[q][n] = vf{};
  for (int j = 0; j < keys; j++) {
    const T* v = values + places[j] + at;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      vf value = get(v + n * LANES);
#pragma GCC unroll 8
      for (int q = 0; q < Q; q++) acc[q][n] += value * p[size_t(q) * padded + j];
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) put(out + q * channels + at + n * LANES, acc[q][n] * inverse[q]);
}

template <class T, int Q>
inline void mix_all(const T* values, const size_t* places, const float* p, int padded, int keys, const float* inverse,
                    T* out, int channels) {
  int at = 0;
  for (; at + 4 * LANES <= channels; at += 4 * LANES)
    mix<T, 4, Q>(values, places, p, padded, keys, inverse, out, channels, at);
  for (; at < channels; at += LANES) mix<T, 1, Q>(values, places, p, padded, keys, inverse, out, channels, at);
}

// One token, one key/value head, its queries. `scores` has room for them all, `places` for every key.
template <class T>
void attend(const Model& m, const Layer& l, int head, const T* queries, const int32_t* blocks, int keys, T* out,
            float* scores, size_t* places) {
  const int size = m.block_tokens, channels = m.channels, group = m.heads / m.kv_heads;
  const int padded = (keys + LANES - 1) / LANES * LANES;
  const T* all_keys = (const T*)l.keys;
  for (int key = 0; key < padded;) {
    int known = std::min(key, keys - 1);  // beyond the end: the last key again, masked below
    size_t base = (size_t(blocks[known / size]) * m.kv_heads + head) * size;
    for (int in = known % size; in < size && key < padded; in++, key++) {
      places[key] = (base + in) * channels;
      if (key >= keys - 1) in--;
    }
  }
  float inverse[64];
  for (int g = 0; g < group; g++) {
    const T* query = queries + g * channels;
    float* s = scores + size_t(g) * padded;
    vf top = set(-INFINITY);
    for (int start = 0; start < keys; start += LANES) {
      vf partial[LANES];
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++) partial[j] = dots(query, all_keys + places[start + j], channels);
      vf score = sums(partial) * m.scale;
      if (start + LANES > keys)
        for (int j = keys - start; j < LANES; j++) score[j] = -INFINITY;
      top = score > top ? score : top;
      put(s + start, score);
    }
    vf most = set(largest(top)), total{};
    for (int j = 0; j < padded; j += LANES) {
      vf e = exponential(get(s + j) - most);
      total += e;
      put(s + j, e);
    }
    inverse[g] = 1.0f / sum(total);
  }
  const T* values = (const T*)l.values;
  for (int g = 0; g < group; g += 4) {  // up to four queries read each value once
    const float* p = scores + size_t(g) * padded;
    T* to = out + g * channels;
    switch (std::min(4, group - g)) {
      case 4: mix_all<T, 4>(values, places, p, padded, keys, inverse + g, to, channels); break;
      case 3: mix_all<T, 3>(values, places, p, padded, keys, inverse + g, to, channels); break;
      case 2: mix_all<T, 2>(values, places, p, padded, keys, inverse + g, to, channels); break;
      default: mix_all<T, 1>(values, places, p, padded, keys, inverse + g, to, channels);
    }
  }
}

template <class T> void forward(const Model& m, const Step& s, const Team& team, char* room) {
  const int count = s.count, hidden = m.hidden, heads = m.heads, kv = m.kv_heads, channels = m.channels;
  const int qkv_size = (heads + 2 * kv) * channels, size = m.block_tokens;
  auto take = [&](size_t n) { T* p = (T*)room; room += (n * sizeof(T) + 63) / 64 * 64; return p; };
  T *x = take(size_t(count) * hidden), *normed = take(size_t(std::max(count, s.num_logits)) * hidden);
  T *qkv = take(size_t(count) * qkv_size), *queries = take(size_t(count) * heads * channels);
  T *mixed = take(size_t(count) * heads * channels), *wide_ = take(size_t(count) * m.ffn);
  int keys_max = s.width * size + LANES;
  float* scores = (float*)room + size_t(team.rank) * keys_max * (heads / kv);
  size_t* places = (size_t*)(room + (sizeof(float) * size_t(team.size) * keys_max * (heads / kv) + 63) / 64 * 64);
  places += size_t(team.rank) * keys_max;
  const int from = team.from(count), to = team.to(count);
  for (int t = from; t < to; t++)
    std::memcpy(x + size_t(t) * hidden, (const T*)m.embedding + size_t(s.tokens[t]) * hidden, hidden * sizeof(T));
  for (int i = 0; i < m.layers; i++) {
    const Layer& l = m.layer[i];
    for (int t = from; t < to; t++)
      rms_norm(x + size_t(t) * hidden, (const T*)l.input_norm, normed + size_t(t) * hidden, hidden, m.eps);
    team.wait();
    linear(team, normed, count, hidden, (const T*)l.qkv, (const T*)l.qkv_bias, qkv, qkv_size);
    team.wait();
    for (int t = from; t < to; t++) {
      alignas(64) T spare[1024];
      const T* in = qkv + size_t(t) * qkv_size;
      int64_t position = s.positions[t];
      const T *cosine = (const T*)m.cosines + position * channels, *sine = (const T*)m.sines + position * channels;
      for (int h = 0; h < heads; h++)
        rotate(in + h * channels, (const T*)l.query_norm, cosine, sine, queries + (size_t(t) * heads + h) * channels,
               channels, m.eps, spare);
      size_t block = s.table[size_t(t) * s.width + position / size];
      for (int h = 0; h < kv; h++) {
        size_t slot = ((block * kv + h) * size + position % size) * channels;
        rotate(in + (heads + h) * channels, (const T*)l.key_norm, cosine, sine, (T*)l.keys + slot, channels, m.eps,
               spare);
        std::memcpy((T*)l.values + slot, in + (heads + kv + h) * channels, channels * sizeof(T));
      }
    }
    team.wait();
    int group = heads / kv;
    for (int unit = team.from(count * kv); unit < team.to(count * kv); unit++) {
      int t = unit / kv, h = unit % kv;
      size_t at = (size_t(t) * heads + h * group) * channels;
      attend(m, l, h, queries + at, s.table + size_t(t) * s.width, int(s.positions[t]) + 1, mixed + at, scores, places);
    }
    team.wait();
    linear_add(team, mixed, count, heads * channels, (const T*)l.out, (const T*)l.out_bias, x, hidden);
    team.wait();
    for (int t = from; t < to; t++)
      rms_norm(x + size_t(t) * hidden, (const T*)l.mlp_norm, normed + size_t(t) * hidden, hidden, m.eps);
    team.wait();
    gated(team, normed, count, hidden, (const T*)l.gate_up, (const T*)l.gate_up_bias, wide_, m.ffn);
    team.wait();
    linear_add(team, wide_, count, m.ffn, (const T*)l.down, (const T*)l.down_bias, x, hidden);
    team.wait();
  }
  for (int n = team.from(s.num_logits); n < team.to(s.num_logits); n++)
    rms_norm(x + size_t(s.rows[n]) * hidden, (const T*)m.norm, normed + size_t(n) * hidden, hidden, m.eps);
  team.wait();
  int panels = (m.vocab + PANEL - 1) / PANEL;
  const T* bias = (const T*)m.head_bias;  // padded to whole panels
  for (int p = team.from(panels); p < team.to(panels) && s.num_logits; p++) {
    vf b0 = bias_at(bias, p * PANEL), b1 = bias_at(bias, p * PANEL + LANES);
    panel(normed, s.num_logits, hidden, (const T*)m.head + p * panel_size(m.dtype, hidden), [&](int row, vf a, vf b) {
      float* out = s.logits + size_t(row) * m.vocab + p * PANEL;
      alignas(64) float both[PANEL];
      put(both, round_to<T>(a + b0));
      put(both + LANES, round_to<T>(b + b1));
      std::memcpy(out, both, sizeof(float) * std::min(PANEL, m.vocab - p * PANEL));
    });
  }
}

size_t room_size(const Model& m, const Step& s) {
  size_t channels = size_t(m.hidden) * 2 + size_t(3 * m.heads + 2 * m.kv_heads) * m.channels + m.ffn;
  size_t keys = size_t(s.width) * m.block_tokens + LANES;
  return channels * (std::max(s.count, s.num_logits)) * 4 + 1024 +
         m.threads * keys * (4 * size_t(m.heads / m.kv_heads) + sizeof(size_t)) + 64;
}

}  // namespace

extern "C" {

int64_t skyrl_layer_size() { return sizeof(Layer); }
int64_t skyrl_model_size() { return sizeof(Model); }

// Elements of the packed form of [columns, inner].
int64_t skyrl_packed_size(int32_t dtype, int64_t columns, int64_t inner) {
  return (columns + PANEL - 1) / PANEL * panel_size(dtype, inner);
}

// Writes rows of a weight [columns, inner] into packed form. Column i goes to `first` + i, or with interleave to lane
// i % 16 of panel i / 16, in its half `first` (0 or 1). `first` is else a multiple of 16. Destination zero before.
void skyrl_pack(int32_t dtype, void* to, const void* from, int64_t columns, int64_t inner, int64_t first,
                int32_t interleave, int32_t threads) {
  size_t each = panel_size(dtype, inner);
  int64_t groups = (columns + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t g = 0; g < groups; g++) {
    int64_t half = interleave ? 2 * g + first : g + first / LANES;
    int lanes = int(std::min<int64_t>(LANES, columns - g * LANES));
    size_t base = half / 2 * each + half % 2 * LANES * (dtype ? 2 : 1);
    if (dtype) {
      bf16* d = (bf16*)to + base;
      const bf16* s = (const bf16*)from + g * LANES * inner;
      for (int64_t k = 0; k < inner; k++)
        for (int lane = 0; lane < lanes; lane++) d[k / 2 * 2 * PANEL + 2 * lane + k % 2] = s[lane * inner + k];
    } else {
      float* d = (float*)to + base;
      const float* s = (const float*)from + g * LANES * inner;
      for (int64_t k = 0; k < inner; k++)
        for (int lane = 0; lane < lanes; lane++) d[k * PANEL + lane] = s[lane * inner + k];
    }
  }
}

// Draws a token from each row of logits [count, vocab] at point uniforms[row] of the distribution at temperatures[row];
// 0 = the likeliest. Sums of 256 weights run in float32, sums of sums in float64.
void skyrl_draw(const float* logits, int32_t count, int32_t vocab, const double* uniforms, const float* temperatures,
                int64_t* tokens, float* logprobs, int32_t threads) {
  constexpr int PART = 16 * LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int row = 0; row < count; row++) {
    const float* z = logits + size_t(row) * vocab;
    float heat = temperatures[row] > 0 ? 1.0f / temperatures[row] : 1.0f;
    auto scaled = [&](int at) {  // 16 logits over temperature; beyond the end -inf
      if (at + LANES <= vocab) return get(z + at) * heat;
      vf v = set(-INFINITY);
      for (int i = at; i < vocab; i++) v[i - at] = z[i] * heat;
      return v;
    };
    vf tops = set(-INFINITY);
    for (int at = 0; at < vocab; at += LANES) {
      vf v = scaled(at);
      tops = v > tops ? v : tops;
    }
    float top = largest(tops);  // a NaN is not seen here, but in the total
    auto part = [&](int from) {
      vf total{};
      for (int at = from; at < std::min(from + PART, vocab); at += LANES) total += exponential(scaled(at) - top);
      return double(sum(total));
    };
    double total = 0;
    for (int from = 0; from < vocab; from += PART) total += part(from);
    int token = -1;
    if (temperatures[row] > 0) {
      double point = uniforms[row] * total, before = 0;
      int from = 0;
      for (; from + PART < vocab; from += PART) {
        double next = before + part(from);
        if (next > point) break;
        before = next;
      }
      // rounding may leave the point beyond the last weight of this part: then the last that is not 0
      for (int at = from; at < std::min(from + PART, vocab) && before <= point; at += LANES) {
        vf e = exponential(scaled(at) - top);
        for (int i = 0; i < std::min(LANES, vocab - at) && before <= point; i++)
          if (e[i] > 0) before += e[i], token = at + i;
      }
    } else {
      for (int i = 0; i < vocab && token < 0; i++) if (z[i] * heat == top) token = i;
    }
    tokens[row] = std::max(token, 0);
    logprobs[row] = float(double(z[tokens[row]] * heat) - top - std::log(total));
  }
}

void skyrl_forward(const Model* m, const Step* s) {
  static thread_local char* room = nullptr;
  static thread_local size_t held = 0;
  size_t need = room_size(*m, *s);
  if (need > held) {
    std::free(room);
    held = (need * 5 / 4 + 63) / 64 * 64;
    room = (char*)std::aligned_alloc(64, held);
  }
  char* shared = room;
#if defined(_OPENMP)
#pragma omp parallel num_threads(m->threads) if (m->threads > 1)
  {
    Team team{omp_get_thread_num(), omp_get_num_threads()};
    if (m->dtype) forward<bf16>(*m, *s, team, shared); else forward<float>(*m, *s, team, shared);
  }
#else
  Team team{0, 1};
  if (m->dtype) forward<bf16>(*m, *s, team, shared); else forward<float>(*m, *s, team, shared);
#endif
}
}
