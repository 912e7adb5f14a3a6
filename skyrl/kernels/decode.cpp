// One forward pass of a plain decoder (RMSNorm, rotary grouped-head attention over paged keys and values, gated SiLU)
// for few tokens on a CPU, in one call. Plain C++17 with GCC's vectors, no library: built in seconds, loaded by ctypes.
//
// Every token is a row: it writes its key and value to its slot, then attends to positions 0 .. its own through its
// row of the block table. So decoding (a row per sequence) and short prefills (a row per token) are the same call.
// bfloat16 results are rounded where the module in torch rounds them; sums run in float32. In float32, norms and the
// totals of softmax are taken in float64: what they lose by rounding is common to all channels and does not average out.
// train.h computes the same for training, with the same functions: change both or neither (tests/sampler/test_same_bits).
#include "lowrank.h"
#include "products.h"

namespace {

constexpr int MAX_GROUP = 64;  // queries of one key/value head
constexpr int LINE = 64;  // bytes that come from memory together

// Returns the factor 1 / sqrt(mean of squares + eps).
template <class T> float rms_norm(const T* x, const T* weight, T* y, int size, float eps) {
  if constexpr (sizeof(T) == 4) {
    vd squares{};
    for (int i = 0; i < size; i += LANES / 2) { vd v = doubles(x + i); squares += v * v; }
    double r = 1.0 / std::sqrt(sum(squares) / size + eps);
    vf high = set(float(r)), low = set(float(r - float(r)));
    for (int i = 0; i < size; i += LANES) { vf v = get(x + i); put(y + i, (v * high + v * low) * get(weight + i)); }
    return high[0];
  }
  vf squares{};
  for (int i = 0; i < size; i += LANES) { vf v = get(x + i); squares += v * v; }
  vf r = set(1.0f / std::sqrt(sum(squares) / size + eps));
  for (int i = 0; i < size; i += LANES) put(y + i, round_to<T>(get(x + i) * r) * get(weight + i));
  return r[0];
}

inline vf silu(vf v) { return v / (1.0f + exponential(-v)); }

// Keeps a product from being fused with the addition that follows: torch rounds in between.
inline vf apart(vf v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

template <class T> inline vf bias_at(const T* bias, int column) { return bias ? get(bias + column) : vf{}; }

// y[row, column] = product + bias + addition, or with RESIDUAL y[row, column] += that, rounded before it is added.
template <bool RESIDUAL, class T, class Part>
void linear(const Team& team, const T* x, int count, int inner, const T* w, const T* bias, T* y, int columns,
            const Low& low, Part part, Pick pick, int layer) {
  int panels = (columns + PANEL - 1) / PANEL;
  for (int p = team.from(panels); p < team.to(panels); p++) {
    int c = p * PANEL;
    bool both = c + LANES < columns;
    vf b0 = bias_at(bias, c), b1 = both ? bias_at(bias, c + LANES) : vf{};
    expand_panel<T>(low, p, columns, part, pick, layer);
    panel(x, count, inner, w + p * panel_size(sizeof(T) == 2, inner), [&](int row, vf a, vf b) {
      a += b0, b += b1;
      low.add(row, a, b);
      T* to = y + size_t(row) * columns + c;
      if constexpr (RESIDUAL) {
        put(to, get(to) + round_to<T>(a));
        if (both) put(to + LANES, get(to + LANES) + round_to<T>(b));
      } else {
        put(to, a);
        if (both) put(to + LANES, b);
      }
    });
  }
}

// y[row, channel] = silu(gate) * up; a panel holds LANES columns of each
template <class T>
void gated(const Team& team, const T* x, int count, int inner, const T* w, const T* bias, T* y, int ffn,
           const Low& low, Pick pick, int layer) {
  int panels = ffn / LANES;
  for (int p = team.from(panels); p < team.to(panels); p++) {
    vf b0 = bias_at(bias, p * LANES), b1 = bias_at(bias, ffn + p * LANES);
    for (int half = 0; half < 2 && low.num; half++) expand<T>(low, half, p + half * panels, 1, half, pick, layer);
    panel(x, count, inner, w + p * panel_size(sizeof(T) == 2, inner), [&](int row, vf gate, vf up) {
      gate += b0, up += b1;
      low.add(row, gate, up);
      gate = round_to<T>(gate);
      up = round_to<T>(up);
      put(y + size_t(row) * ffn + p * LANES, round_to<T>(silu(gate)) * up);
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
    put(y + i, apart(round_to<T>(get(x + i) * get(cosine + i))) + apart(round_to<T>(turned * get(sine + i))));
  }
}

template <class T> inline vf dots(const T* query, const T* key, int channels) {  // partial sums, one a lane
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

// LANES vectors to one: lane i is the sum of vector i.
template <int STEP = LANES / 2> inline vf sums(vf* a) {  // unrolled, or `a` lives in memory
  if constexpr (STEP == 0) {
    return a[0];
  } else {
    constexpr int JUMP = (LANES - STEP) / STEP;  // what was lane i of the second vector follows lane i of the first
#pragma GCC unroll 8
    for (int i = 0; i < STEP; i++)
      a[i] = __builtin_shuffle(a[i], a[i + STEP], LANE + (LANE & STEP) * JUMP) +
             __builtin_shuffle(a[i], a[i + STEP], LANE + (LANE & STEP) * JUMP + STEP);
    return sums<STEP / 2>(a);
  }
}

// Keys that are read next: memory brings them nearer while values are summed.
template <class T> struct Ahead {
  const T* keys;
  const size_t* places;
  int count;
};

// out = sum_j p[j] value[j] / total for Q queries that share the values; N vectors of channels from `at` on.
template <class T, int N, int Q>
inline void mix(const T* values, const size_t* places, const float* p, int padded, int keys, const float* inverse,
                const float* rest, T* out, size_t stride, int at, const Ahead<T>& ahead) {
  vf acc[Q][N];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[q][n] = vf{};
  for (int j = 0; j < keys; j++) {
    const T* v = values + places[j] + at;
    for (int c = at; j < ahead.count && c < at + N * LANES; c += LINE / sizeof(T))
      __builtin_prefetch(ahead.keys + ahead.places[j] + c);
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
    for (int n = 0; n < N; n++) put(out + q * stride + at + n * LANES, acc[q][n] * inverse[q] + acc[q][n] * rest[q]);
}

template <class T, int Q>
inline void mix_all(const T* values, const size_t* places, const float* p, int padded, int keys, const float* inverse,
                    const float* rest, T* out, size_t stride, int channels, const Ahead<T>& ahead) {
  constexpr int WIDE = LANES == 16 ? 4 : 2;  // vectors at once, as many as there are registers for
  int at = 0;
  for (; at + WIDE * LANES <= channels; at += WIDE * LANES)
    mix<T, WIDE, Q>(values, places, p, padded, keys, inverse, rest, out, stride, at, ahead);
  for (; at < channels; at += LANES)
    mix<T, 1, Q>(values, places, p, padded, keys, inverse, rest, out, stride, at, ahead);
}

inline int padded_to_lanes(int keys) { return (keys + LANES - 1) / LANES * LANES; }

// One token, one key/value head, its `group` queries, `stride` apart. Key and value j lie at places[j]; beyond `keys` up
// to a multiple of LANES places repeat the last one. Leaves in `scores` [group, keys padded] the weights times total,
// in `inverse` and `rest` the two parts of 1 / total.
template <class T>
void attend(const T* all_keys, const T* values, const size_t* places, int keys, int channels, int group, float scale,
            const T* queries, T* out, size_t stride, float* scores, float* inverse, float* rest,
            Ahead<T> ahead = {}) {
  const int padded = padded_to_lanes(keys);
  for (int g = 0; g < group; g++) {
    const T* query = queries + g * stride;
    float* s = scores + size_t(g) * padded;
    vf top = set(-INFINITY);
    for (int start = 0; start < keys; start += LANES) {
      for (int j = 0; j < LANES && g == 0; j++)  // values are read after all keys: they come nearer meanwhile
        for (int c = 0; c < channels; c += LINE / sizeof(T)) __builtin_prefetch(values + places[start + j] + c);
      vf partial[LANES];
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++) partial[j] = dots(query, all_keys + places[start + j], channels);
      vf score = sums(partial) * scale;
      if (start + LANES > keys)
        for (int j = keys - start; j < LANES; j++) score[j] = -INFINITY;
      top = score > top ? score : top;
      put(s + start, score);
    }
    vf most = set(largest(top));
    vd total{};
    for (int j = 0; j < padded; j += LANES) {
      vf e = exponential(get(s + j) - most);
      put(s + j, e);
      total += doubles(s + j) + doubles(s + j + LANES / 2);
    }
    double all = 1.0 / sum(total);
    inverse[g] = float(all);
    rest[g] = float(all - inverse[g]);
  }
  for (int g = 0; g < group; g += 4) {  // up to four queries read each value once
    const float *p = scores + size_t(g) * padded, *i = inverse + g, *r = rest + g;
    T* to = out + g * stride;
    switch (std::min(4, group - g)) {
      case 4: mix_all<T, 4>(values, places, p, padded, keys, i, r, to, stride, channels, ahead); break;
      case 3: mix_all<T, 3>(values, places, p, padded, keys, i, r, to, stride, channels, ahead); break;
      case 2: mix_all<T, 2>(values, places, p, padded, keys, i, r, to, stride, channels, ahead); break;
      default: mix_all<T, 1>(values, places, p, padded, keys, i, r, to, stride, channels, ahead);
    }
    ahead.count = 0;
  }
}

// Where one head's keys and values of a sequence lie in the cache, whose blocks of it are `blocks`, as attend wants them.
inline void find_keys(const Model& m, int head, const int32_t* blocks, int keys, size_t* places) {
  const int size = m.block_tokens;
  for (int key = 0, padded = padded_to_lanes(keys); key < padded;) {
    int known = std::min(key, keys - 1);  // beyond the end: the last key again
    size_t base = (size_t(blocks[known / size]) * m.kv_heads + head) * size;
    for (int in = known % size; in < size && key < padded; in++, key++) {
      places[key] = (base + in) * m.channels;
      if (key >= keys - 1) in--;
    }
  }
}

// `body` and `head` are the adapters of the rows and of the rows that give logits, with chunks set.
template <class T> void forward(const Model& m, const Step& s, const Team& team, Low body, Low head, char* room) {
  const int count = s.count, hidden = m.hidden, heads = m.heads, kv = m.kv_heads, channels = m.channels;
  const int qkv_size = (heads + 2 * kv) * channels, size = m.block_tokens;
  auto take = [&](size_t n) { T* p = (T*)room; room += (n * sizeof(T) + 63) / 64 * 64; return p; };
  T *x = take(size_t(count) * hidden), *normed = take(size_t(std::max(count, s.num_logits)) * hidden);
  T *qkv = take(size_t(count) * qkv_size), *queries = take(size_t(count) * heads * channels);
  T *mixed = take(size_t(count) * heads * channels), *wide_ = take(size_t(count) * m.ffn);
  const int most = std::max(count, s.num_logits);
  if (body.num) {
    body.u = head.u = take(size_t(most) * body.stride);
    body.room = head.room = (float*)room + size_t(team.rank) * most * PANEL;
    room += size_t(team.size) * most * PANEL * sizeof(float);
  }
  int keys_max = s.width * size + LANES;
  float* scores = (float*)room + size_t(team.rank) * keys_max * (heads / kv);
  size_t* places = (size_t*)(room + (sizeof(float) * size_t(team.size) * keys_max * (heads / kv) + 63) / 64 * 64);
  places += size_t(team.rank) * keys_max * 2;  // of this unit of work and the one after it
  const int from = team.from(count), to = team.to(count);
  for (int t = from; t < to; t++)
    std::memcpy(x + size_t(t) * hidden, (const T*)m.embedding + size_t(s.tokens[t]) * hidden, hidden * sizeof(T));
  for (int i = 0; i < m.layers; i++) {
    const Layer& l = m.layer[i];
    for (int t = from; t < to; t++)
      rms_norm(x + size_t(t) * hidden, (const T*)l.input_norm, normed + size_t(t) * hidden, hidden, m.eps);
    team.wait();
    auto part = [&](int group) {
      int at = group * LANES / channels;
      return at < heads ? 0 : at < heads + kv ? 1 : 2;
    };
    Pick of_qkv = [](const Adapter& a, int layer) -> const Delta& { return a.layer[layer].qkv; };
    shrink(team, body, normed, hidden, 3, of_qkv, i);
    linear<false>(team, normed, count, hidden, (const T*)l.qkv, (const T*)l.qkv_bias, qkv, qkv_size, body, part, of_qkv,
                  i);
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
    int keys = 0, first = team.from(count * kv), last = team.to(count * kv);
    auto find = [&](int unit) {
      keys = int(s.positions[unit / kv]) + 1;
      find_keys(m, unit % kv, s.table + size_t(unit / kv) * s.width, keys, places + unit % 2 * size_t(keys_max));
    };
    if (first < last) find(first);
    for (int unit = first; unit < last; unit++) {
      size_t at = (size_t(unit / kv) * heads + unit % kv * group) * channels;
      float inverse[MAX_GROUP], rest[MAX_GROUP];
      Ahead<T> ahead{(const T*)l.keys, places + (unit + 1) % 2 * size_t(keys_max), 0};
      int here = keys;
      if (unit + 1 < last) find(unit + 1), ahead.count = keys;
      attend((const T*)l.keys, (const T*)l.values, places + unit % 2 * size_t(keys_max), here, channels, group, m.scale,
             queries + at, mixed + at, channels, scores, inverse, rest, ahead);
    }
    team.wait();
    Pick of_out = [](const Adapter& a, int layer) -> const Delta& { return a.layer[layer].out; };
    shrink(team, body, mixed, heads * channels, 1, of_out, i);
    linear<true>(team, mixed, count, heads * channels, (const T*)l.out, (const T*)l.out_bias, x, hidden, body, only_part,
                 of_out, i);
    team.wait();
    for (int t = from; t < to; t++)
      rms_norm(x + size_t(t) * hidden, (const T*)l.mlp_norm, normed + size_t(t) * hidden, hidden, m.eps);
    team.wait();
    Pick of_gate_up = [](const Adapter& a, int layer) -> const Delta& { return a.layer[layer].gate_up; };
    shrink(team, body, normed, hidden, 2, of_gate_up, i);
    gated(team, normed, count, hidden, (const T*)l.gate_up, (const T*)l.gate_up_bias, wide_, m.ffn, body, of_gate_up,
          i);
    team.wait();
    Pick of_down = [](const Adapter& a, int layer) -> const Delta& { return a.layer[layer].down; };
    shrink(team, body, wide_, m.ffn, 1, of_down, i);
    linear<true>(team, wide_, count, m.ffn, (const T*)l.down, (const T*)l.down_bias, x, hidden, body, only_part, of_down,
                 i);
    team.wait();
  }
  for (int n = team.from(s.num_logits); n < team.to(s.num_logits); n++)
    rms_norm(x + size_t(s.rows[n]) * hidden, (const T*)m.norm, normed + size_t(n) * hidden, hidden, m.eps);
  team.wait();
  Pick of_head = [](const Adapter& a, int) -> const Delta& { return a.head; };
  shrink(team, head, normed, hidden, 1, of_head, 0);
  int panels = (m.vocab + PANEL - 1) / PANEL;
  const T* bias = (const T*)m.head_bias;  // padded to whole panels
  for (int p = team.from(panels); p < team.to(panels) && s.num_logits; p++) {
    vf b0 = bias_at(bias, p * PANEL), b1 = bias_at(bias, p * PANEL + LANES);
    expand_panel<T>(head, p, panels * PANEL, only_part, of_head, 0);
    panel(normed, s.num_logits, hidden, (const T*)m.head + p * panel_size(m.dtype, hidden), [&](int row, vf a, vf b) {
      a += b0, b += b1;
      head.add(row, a, b);
      float* out = s.logits + size_t(row) * m.vocab + p * PANEL;
      alignas(64) float both[PANEL];
      put(both, m.float_head ? a : round_to<T>(a));
      put(both + LANES, m.float_head ? b : round_to<T>(b));
      std::memcpy(out, both, sizeof(float) * std::min(PANEL, m.vocab - p * PANEL));
    });
  }
}

// One row of logits over a temperature. Sums of PART weights run in float32, sums of sums in float64.
struct Softmax {
  static constexpr int PART = 16 * LANES;
  const float* z;
  int vocab;
  float heat, top;
  double total = 0;

  Softmax(const float* logits, int vocab, float temperature)
      : z(logits), vocab(vocab), heat(temperature > 0 ? 1.0f / temperature : 1.0f) {
    vf tops = set(-INFINITY);
    for (int at = 0; at < vocab; at += LANES) {
      vf v = scaled(at);
      tops = v > tops ? v : tops;
    }
    top = largest(tops);  // a NaN is not seen here, but in the total
    for (int from = 0; from < vocab; from += PART) total += part(from);
  }
  vf scaled(int at) const {  // LANES logits over temperature; beyond the end -inf
    if (at + LANES <= vocab) return get(z + at) * heat;
    vf v = set(-INFINITY);
    for (int i = at; i < vocab; i++) v[i - at] = z[i] * heat;
    return v;
  }
  double part(int from) const {
    vf sums{};
    for (int at = from; at < std::min(from + PART, vocab); at += LANES) sums += exponential(scaled(at) - top);
    return double(sum(sums));
  }
  float log_prob(int64_t token) const {  // NaN for a token that is none
    if (token < 0 || token >= vocab) return NAN;
    return float(double(z[token] * heat) - top - std::log(total));
  }
};

size_t room_size(const Model& m, const Step& s, const Low& low) {
  size_t most = std::max(s.count, s.num_logits);
  size_t lows = low.num ? most * (low.stride + m.threads * PANEL) * sizeof(float) + 64 : 0;
  size_t channels = size_t(m.hidden) * 2 + size_t(3 * m.heads + 2 * m.kv_heads) * m.channels + m.ffn;
  size_t keys = size_t(s.width) * m.block_tokens + LANES;
  return channels * most * 4 + 1024 + lows +
         m.threads * keys * (4 * size_t(m.heads / m.kv_heads) + 2 * sizeof(size_t)) + 64;
}

}  // namespace

extern "C" {

int32_t skyrl_lanes() { return LANES; }
int64_t skyrl_layer_size() { return sizeof(Layer); }
int64_t skyrl_model_size() { return sizeof(Model); }
int64_t skyrl_step_size() { return sizeof(Step) + sizeof(Adapter) + sizeof(Segment) + sizeof(Deltas); }

// Elements of the packed form of [columns, inner].
int64_t skyrl_packed_size(int32_t dtype, int64_t columns, int64_t inner) {
  return (columns + PANEL - 1) / PANEL * panel_size(dtype, inner);
}

// Writes rows of a weight [columns, inner] into packed form. Column i goes to `first` + i, or with interleave to lane
// i % LANES of panel i / LANES, in its half `first` (0 or 1). `first` is else a multiple of LANES. Destination zero before.
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
// 0 = the likeliest.
void skyrl_sample(const float* logits, int32_t count, int32_t vocab, const double* uniforms, const float* temperatures,
                int64_t* tokens, float* logprobs, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int row = 0; row < count; row++) {
    Softmax s(logits + size_t(row) * vocab, vocab, temperatures[row]);
    int token = -1;
    if (temperatures[row] > 0) {
      double point = uniforms[row] * s.total, before = 0;
      int from = 0;
      for (; from + Softmax::PART < vocab; from += Softmax::PART) {
        double next = before + s.part(from);
        if (next > point) break;
        before = next;
      }
      // rounding may leave the point beyond the last weight of this part: then the last that is not 0
      for (int at = from; at < std::min(from + Softmax::PART, vocab) && before <= point; at += LANES) {
        vf e = exponential(s.scaled(at) - s.top);
        for (int i = 0; i < std::min(LANES, vocab - at) && before <= point; i++)
          if (e[i] > 0) before += e[i], token = at + i;
      }
    } else {
      for (int i = 0; i < vocab && token < 0; i++) if (s.z[i] * s.heat == s.top) token = i;
    }
    tokens[row] = std::max(token, 0);
    logprobs[row] = s.log_prob(tokens[row]);
  }
}

void skyrl_forward(const Model* m, const Step* s) {
  static thread_local char* room = nullptr;
  static thread_local size_t held = 0;
  Low body, head;
  std::unique_ptr<Chunk[]> chunks;
  if (s->num_segments) {
    chunks.reset(new Chunk[s->count + s->num_logits]);
    int at = 0, end = s->num_segments;
    auto of = [&](int row) {  // rows come in rising order, but for the first look at a chunk's end
      while (at > 0 && row < s->segments[at].start) at--;
      while (at + 1 < end && row >= s->segments[at].stop) at++;
      return s->segments[at].adapter;
    };
    for (int i = 0; i < end; i++)
      if (const Adapter* a = s->segments[i].adapter) body.rank = std::max(body.rank, a->rank);
    body.stride = (3 * body.rank + PANEL - 1) / PANEL * PANEL;
    head.rank = body.rank, head.stride = body.stride;
    body.chunks = chunks.get();
    body.num = cut(s->count, of, chunks.get());
    head.chunks = chunks.get() + body.num;
    head.num = cut(s->num_logits, [&](int n) { return of(int(s->rows[n])); }, chunks.get() + body.num);
    if (body.num) body.first = body.chunks[0].row;
    if (head.num) head.first = head.chunks[0].row;
  }
  size_t need = room_size(*m, *s, body);
  if (need > held) {
    std::free(room);
    held = (need * 5 / 4 + 63) / 64 * 64;
    room = (char*)std::aligned_alloc(64, held);
  }
  char* shared = room;
  auto run = [&](const Team& team) {
    Tiles tiles;
    if (m->dtype) forward<bf16>(*m, *s, team, body, head, shared);
    else forward<float>(*m, *s, team, body, head, shared);
  };
#if defined(_OPENMP)
#pragma omp parallel num_threads(m->threads) if (m->threads > 1)
  run(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
  run(Team{0, 1});
#endif
}
}

#include "train.h"
