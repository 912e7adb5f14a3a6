// The model and a step as data, the threads of a step, and low-rank additions to products. Part of decode.cpp.
#pragma once
#include "products.h"

namespace {

struct Layer {
  const void *input_norm, *qkv, *qkv_bias, *query_norm, *key_norm, *out, *out_bias, *mlp_norm;
  const void *gate_up, *gate_up_bias, *down, *down_bias;
  void *keys, *values;
};
struct Model {
  int32_t dtype, layers, hidden, heads, kv_heads, channels, ffn, vocab, block_tokens, threads;
  int32_t float_head;  // bfloat16: logits are not rounded to it
  float eps, scale;
  const void *embedding, *norm, *head, *head_bias, *cosines, *sines;
  const Layer* layer;
};
// Low-rank additions, y += b (scale * a x). `a` is packed as weights are, `parts * rank` columns; those of part i begin
// at i * rank; `b` is [columns / L][rank][L] with L = LANES (bfloat16: [columns / L][rank / 2][L][2]). rank is a multiple of L.
struct Delta { const void *a, *b; };  // null: this product has none
struct Deltas { Delta qkv, out, gate_up, down; };
struct Adapter {
  int32_t rank;
  float scale;
  const Deltas* layer;
  Delta head;
};
typedef const Delta& (*Pick)(const Adapter&, int layer);  // a product's part of an adapter
struct Segment { int32_t start, stop; const Adapter* adapter; };  // rows of one adapter; null = none
struct Step {
  int32_t count, width, num_logits, num_segments;
  const int64_t *tokens, *positions;
  const int32_t* table;   // [count, width]
  const int64_t* rows;    // [num_logits], rising: which rows give logits
  float* logits;          // [num_logits, vocab]
  const Segment* segments;  // cover all rows; none at all = no row has an adapter
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

// ---- adapters -------------------------------------------------------------------------------------------------------
// Rows of one adapter lie together. First u = scale * a x for them (shrink), then, panel by panel, b u is written to
// `room`, from where the product's own loop adds it. Each row's sums run over one order whatever lies beside it.

struct Chunk { int row, count; const Adapter* adapter; };
struct Low {
  const Chunk* chunks = nullptr;
  int num = 0, first = INT32_MAX;  // rows before `first` have no adapter
  int rank = 0, stride = 0;        // the largest rank, and elements of u of a row
  void* u = nullptr;
  float* room = nullptr;           // this thread's, [rows][PANEL]

  void add(int row, vf& a, vf& b) const {
    if (row < first) return;
    a += get(room + size_t(row) * PANEL);
    b += get(room + size_t(row) * PANEL + LANES);
  }
};

// Rows 0 .. count as chunks of at most ROWS rows, from the first that has an adapter on; of(row) is its adapter.
template <class Of> int cut(int count, Of of, Chunk* chunks) {
  int num = 0, row = 0;
  while (row < count && !of(row)) row++;
  while (row < count) {
    const Adapter* adapter = of(row);
    int stop = row;
    while (stop < count && of(stop) == adapter) stop++;
    int rows = stop - row, parts = (rows + ROWS - 1) / ROWS;
    for (int part = 0; part < parts; part++) {
      int from = int64_t(rows) * part / parts, to = int(int64_t(rows) * (part + 1) / parts);
      chunks[num++] = Chunk{row + from, to - from, adapter};
    }
    row = stop;
  }
  return num;
}

template <class T>
void shrink(const Team& team, const Low& low, const T* x, int inner, int parts, Pick pick, int layer) {
  if (!low.num) return;
  int panels = (parts * low.rank + PANEL - 1) / PANEL;
  for (int unit = team.from(low.num * panels); unit < team.to(low.num * panels); unit++) {
    const Chunk& c = low.chunks[unit / panels];
    int p = unit % panels;
    if (!c.adapter || p * PANEL >= parts * c.adapter->rank) continue;
    const T* a = (const T*)pick(*c.adapter, layer).a;
    if (!a) continue;
    vf scale = set(c.adapter->scale);
    auto done = [&](int row, vf v, vf w) {
      T* to = (T*)low.u + size_t(row) * low.stride + p * PANEL;
      put(to, v * scale);
      put(to + LANES, w * scale);
    };
    a += p * panel_size(sizeof(T) == 2, inner);
    with_rows(c.count, [&](auto m) { rows_of<T, decltype(m)::value>(x, inner, a, c.row, done); });
  }
  team.wait();
}

template <int M> inline void half_tile(const float* u, int stride, const float* b, int rank, vf* acc) {
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) acc[m] = vf{};
  for (int from = 0; from < rank; from += TERMS) {
    vf part[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) part[m] = vf{};
    for (int k = from; k < std::min(from + TERMS, rank); k++) {
      vf w = get(b + k * LANES);
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) part[m] += w * u[size_t(m) * stride + k];
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) acc[m] += part[m];
  }
}

template <int M> inline void half_tile(const bf16* u, int stride, const bf16* b, int rank, vf* acc) {
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) acc[m] = vf{};
  for (int k = 0; k < rank; k += 2) {
#if defined(__AVX512BF16__)
    __m512bh w = load<__m512bh>(b + k * LANES);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      int32_t pair;
      std::memcpy(&pair, u + size_t(m) * stride + k, 4);
      acc[m] = (vf)_mm512_dpbf16_ps((__m512)acc[m], w, (__m512bh)_mm512_set1_epi32(pair));
    }
#else
    vu w = load<vu>(b + k * LANES);
    vf w0 = (vf)(w << 16), w1 = (vf)(w & 0xffff0000u);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
      acc[m] += w0 * wide(u[size_t(m) * stride + k]) + w1 * wide(u[size_t(m) * stride + k + 1]);
#endif
  }
}

template <class T, int M> inline void half_rows(const T* u, int stride, const T* b, int rank, float* to) {
  vf acc[M];
  half_tile<M>(u, stride, b, rank, acc);
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) put(to + m * PANEL, acc[m]);
}

// Fills half `half` of low.room for the LANES columns that are number `group` in b and read u of part `part`. The next
// panel's are `next` groups on: each adapter's b is read in small pieces, too far apart for the processor to foresee.
template <class T> void expand(const Low& low, int half, int group, int next, int part, Pick pick, int layer) {
  for (int i = 0; i < low.num; i++) {
    const Chunk& c = low.chunks[i];
    float* to = low.room + size_t(c.row) * PANEL + half * LANES;
    const T* b = c.adapter ? (const T*)pick(*c.adapter, layer).b : nullptr;
    if (!b) {
      for (int m = 0; m < c.count; m++) put(to + m * PANEL, vf{});
      continue;
    }
    int rank = c.adapter->rank;
    const T* u = (const T*)low.u + size_t(c.row) * low.stride + part * rank;
    b += size_t(group) * rank * LANES;
    const char* ahead = (const char*)(b + size_t(next) * rank * LANES);
    for (size_t at = 0; at < size_t(rank) * LANES * sizeof(T); at += 64) __builtin_prefetch(ahead + at);
    with_rows(c.count, [&](auto m) { half_rows<T, decltype(m)::value>(u, low.stride, b, rank, to); });
  }
}

// The same for both halves of panel p of a product whose columns are all in one order. `part(group)` is the part of LANES
// columns.
template <class T, class Part>
void expand_panel(const Low& low, int p, int columns, Part part, Pick pick, int layer) {
  for (int half = 0; half < 2 && low.num; half++) {
    int group = 2 * p + half;
    if (group * LANES < columns) expand<T>(low, half, group, 2, part(group), pick, layer);
  }
}
inline int only_part(int) { return 0; }

}  // namespace
