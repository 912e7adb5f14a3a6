// The forward pass of training in float32, operation by operation, in the arithmetic of `forward` above: a row's result
// is the sampler's, to the bit, and does not depend on the rows beside it. And the products of the backward pass, whose
// sums are shorter than those of a library. Part of decode.cpp.
#pragma once

namespace {

// A panel of w [columns, inner], or `turned` of w [inner, columns]; see skyrl_pack.
inline void pack_panel(const float* w, bool turned, int64_t columns, int64_t inner, int64_t p, float* to) {
  int lanes = int(std::min<int64_t>(PANEL, columns - p * PANEL));
  if (lanes < PANEL) std::fill(to, to + inner * PANEL, 0.0f);
  if (turned) {
    for (int64_t k = 0; k < inner; k++) std::memcpy(to + k * PANEL, w + k * columns + p * PANEL, lanes * sizeof(float));
    return;
  }
  const float* from = w + p * PANEL * inner;
  constexpr int STEP = 16;  // a line of each row at a time
  for (int64_t start = 0; start < inner; start += STEP)
    for (int lane = 0; lane < lanes; lane++)
      for (int64_t k = start; k < std::min(start + STEP, inner); k++) to[k * PANEL + lane] = from[lane * inner + k];
}

inline float one(float x) { return x; }
inline float one(bf16 x) { return wide(x); }
inline void put_one(float* p, float x) { *p = x; }
inline void put_one(bf16* p, float x) { *p = narrow(set(x))[0]; }

// Of logits [count, width], a part of the vocabulary from `from` on, times `heat`: takes them into the running
// maximum, sum of exponentials and (or null) sum of exponentials times logit of each row; the target's logit to `found`.
template <class T>
void logit_sums(const T* logits, int64_t count, int32_t width, float heat, const int64_t* targets, int64_t from,
                float* found, float* peak, float* total, float* moment, int32_t threads) {
  int whole = width / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < count; row++) {
    const T* z = logits + row * width;
    vf tops = set(peak[row]);
    for (int at = 0; at < whole; at += LANES) {
      vf v = get(z + at) * heat;
      tops = v > tops ? v : tops;
    }
    float top = largest(tops);
    for (int at = whole; at < width; at++) top = std::max(top, one(z[at]) * heat);
    vf sums{}, moments{};
    for (int at = 0; at < whole; at += LANES) {
      vf v = get(z + at) * heat, e = exponential(v - top);
      sums += e;
      moments += e * v;
    }
    float shrink = std::exp(peak[row] - top), mass = sum(sums), first = sum(moments);
    for (int at = whole; at < width; at++) {
      float v = one(z[at]) * heat, e = std::exp(v - top);
      mass += e;
      first += e * v;
    }
    total[row] = total[row] * shrink + mass;
    if (moment) moment[row] = moment[row] * shrink + first;
    peak[row] = top;
    if (targets[row] >= from && targets[row] < from + width) found[row] = one(z[targets[row] - from]) * heat;
  }
}

// The gradient of the same logits, in their place: heat (g (onehot - p) - h p (z - logz + entropy)), where p is
// exp(z - logz), g the gradient of the target's log-probability and h (or null, as entropy) that of the entropy.
template <class T>
void logit_gradient(T* logits, int64_t count, int32_t width, float heat, const int64_t* targets, int64_t from,
                    const float* logz, const float* g, const float* entropy, const float* h, int32_t threads) {
  int whole = width / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < count; row++) {
    T* z = logits + row * width;
    float down = -g[row], of_entropy = h ? -h[row] : 0.0f, middle = h ? entropy[row] : 0.0f;
    int64_t target = targets[row] - from;
    bool inside = target >= 0 && target < width;
    float there = inside ? one(z[target]) * heat - logz[row] : 0.0f;
    for (int at = 0; at < whole; at += LANES) {
      vf surprise = get(z + at) * heat - logz[row], p = exponential(surprise);
      put(z + at, p * (down + of_entropy * (surprise + middle)) * heat);
    }
    for (int at = whole; at < width; at++) {
      float surprise = one(z[at]) * heat - logz[row];
      put_one(z + at, std::exp(surprise) * (down + of_entropy * (surprise + middle)) * heat);
    }
    if (inside) put_one(z + target, (std::exp(there) * (down + of_entropy * (there + middle)) + g[row]) * heat);
  }
}

}  // namespace

extern "C" {

// y [count, columns] = x [count, inner] w^T + bias (or null). w is [columns, inner], or `turned` [inner, columns].
// `room`: columns rounded up to PANEL, times inner.
void skyrl_product(const float* x, int64_t count, int64_t inner, const float* w, int32_t turned, const float* bias,
                   float* y, int64_t columns, float* room, int32_t threads) {
  int64_t panels = (columns + PANEL - 1) / PANEL;
  int64_t parts = std::max<int64_t>(1, std::min<int64_t>((count + 191) / 192, 4 * threads / panels));  // of the rows
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for
    for (int64_t p = 0; p < panels; p++) pack_panel(w, turned, columns, inner, p, room + p * inner * PANEL);
#pragma omp for
    for (int64_t unit = 0; unit < panels * parts; unit++) {
      int64_t p = unit / parts, part = unit % parts, c = p * PANEL;
      int64_t first = count * part / parts, last = count * (part + 1) / parts;
      int lanes = int(std::min<int64_t>(PANEL, columns - c));
      alignas(64) float added[PANEL] = {}, both[PANEL];
      if (bias) std::memcpy(added, bias + c, lanes * sizeof(float));
      vf b0 = get(added), b1 = get(added + LANES);
      panel(x + first * inner, int(last - first), int(inner), room + p * inner * PANEL, [&](int row, vf a, vf b) {
        float* to = y + (first + row) * columns + c;
        if (bias) a += b0, b += b1;
        if (lanes == PANEL) {
          put(to, a);
          put(to + LANES, b);
        } else {
          put(both, a);
          put(both + LANES, b);
          std::memcpy(to, both, lanes * sizeof(float));
        }
      });
    }
  }
}

// y [count, size] = weight x / sqrt(mean of x^2 + eps), and that factor of x in `factors` [count].
void skyrl_norm(const float* x, const float* weight, float* y, float* factors, int64_t count, int32_t size, float eps,
                int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < count; row++) factors[row] = rms_norm(x + row * size, weight, y + row * size, size, eps);
}

// The same in bfloat16, rounded where transformers' module rounds.
void skyrl_norm_half(const uint16_t* x, const uint16_t* weight, uint16_t* y, float* factors, int64_t count, int32_t size,
                     float eps, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < count; row++) factors[row] = rms_norm(x + row * size, weight, y + row * size, size, eps);
}

// Its gradients, of x and, in float32, of weight, from that of y.
void skyrl_norm_half_gradient(const uint16_t* grad, const uint16_t* x, const uint16_t* weight, const float* factors,
                              uint16_t* dx, float* dweight, int64_t count, int32_t size, int32_t threads) {
  std::unique_ptr<float[]> sums(new float[size_t(threads) * size]());
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    float* own = sums.get() + size_t(part) * size;
    for (int64_t row = count * part / threads; row < count * (part + 1) / threads; row++) {
      const bf16 *g = grad + row * size, *from = x + row * size;
      float r = factors[row];
      vf both{};
      for (int i = 0; i < size; i += LANES) {
        vf normed = get(from + i) * r, here = get(g + i);
        both += here * get(weight + i) * normed;
        put(own + i, get(own + i) + here * round_to<bf16>(normed));
      }
      float mean = sum(both) / size;
      for (int i = 0; i < size; i += LANES)
        put(dx + row * size + i, (get(g + i) * get(weight + i) - get(from + i) * r * mean) * r);
    }
  }
  for (int i = 0; i < size; i++) {
    float total = 0;
    for (int part = 0; part < threads; part++) total += sums[size_t(part) * size + i];
    dweight[i] = total;
  }
}

// out [count] = silu(gate) up in bfloat16, rounded where transformers' modules round; count a multiple of LANES.
void skyrl_gated_half(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t count, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i += LANES) put(out + i, round_to<bf16>(silu(get(gate + i))) * get(up + i));
}

// Its gradients, of gate and up, from that of out.
void skyrl_gated_half_gradient(const uint16_t* grad, const uint16_t* gate, const uint16_t* up, uint16_t* dgate,
                               uint16_t* dup, int64_t count, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i += LANES) {
    vf x = get(gate + i), g = get(grad + i), open = 1.0f / (1.0f + exponential(-x)), active = x * open;
    put(dup + i, g * active);
    put(dgate + i, g * get(up + i) * (open + active * (1.0f - open)));
  }
}

// out [count, heads, size] = x cos + (-second half of x, first half) sin in bfloat16, rounded where transformers'
// function rounds; or, with `back`, the gradient of x from that of out, which is given as x. cos and sin are
// [count, size], the strides are x's, in numbers, and half of size is a multiple of LANES.
void skyrl_rotate_half(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* out, int64_t count,
                       int32_t heads, int32_t size, int64_t stride, int64_t head_stride, int32_t back,
                       int32_t threads) {
  int half = size / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < count; row++)
    for (int head = 0; head < heads; head++) {
      const bf16 *from = x + row * stride + head * head_stride, *c = cos + row * size, *s = sin + row * size;
      bf16* to = out + (row * heads + head) * size;
      for (int i = 0; i < half; i += LANES) {
        vf a = get(from + i), b = get(from + half + i);
        vf c0 = get(c + i), c1 = get(c + half + i), s0 = get(s + i), s1 = get(s + half + i);
        if (back) {
          put(to + i, a * c0 + b * s1);
          put(to + half + i, b * c1 - a * s0);
        } else {
          put(to + i, round_to<bf16>(a * c0) - round_to<bf16>(b * s0));
          put(to + half + i, round_to<bf16>(b * c1) + round_to<bf16>(a * s1));
        }
      }
    }
}

// LANES numbers of a row from `at` on, times `scale`, of which those before `end` count; `none` stands for the others.
inline vf part_of(const uint16_t* row, int at, int end, int length, float scale = 1, float none = 0) {
  alignas(64) uint16_t last[LANES] = {};
  const uint16_t* from = row + at;
  if (at + LANES > length) std::memcpy(last, from, (length - at) * sizeof(uint16_t)), from = last;
  vi there = LANE < end - at;
  return (vf)(((vi)(get(from) * scale) & there) | ((vi)set(none) & ~there));
}

inline void put_part(uint16_t* row, int at, int length, vf v) {
  alignas(64) uint16_t last[LANES];
  if (at + LANES <= length) return put(row + at, v);
  put(last, v);
  std::memcpy(row + at, last, (length - at) * sizeof(uint16_t));
}

// Softmax of `scale` times the scores x [count, length] in bfloat16, in place and rounded once. Row i is of a query that
// sees the keys 0 .. i % length; the other weights are zero.
void skyrl_causal_softmax_half(uint16_t* x, int64_t count, int32_t length, float scale, int32_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<float[]> kept(new float[padded_to_lanes(length)]);
    float* e = kept.get();
#pragma omp for
    for (int64_t i = 0; i < count; i++) {
      uint16_t* row = x + i * length;
      int end = int(i % length) + 1;
      vf top = set(-INFINITY), total{};
      for (int j = 0; j < end; j += LANES) {
        vf v = part_of(row, j, end, length, scale, -INFINITY);
        put(e + j, v);
        top = v > top ? v : top;
      }
      float most = largest(top);
      for (int j = 0; j < end; j += LANES) {
        vf v = exponential(get(e + j) - most);
        put(e + j, v);
        total += v;
      }
      float inverse = 1.0f / sum(total);
      for (int j = 0; j < length; j += LANES) put_part(row, j, length, j < end ? get(e + j) * inverse : vf{});
    }
  }
}

// The gradient of the scores from that of the weights, which are given as they came out.
void skyrl_causal_softmax_half_gradient(const uint16_t* grad, const uint16_t* weights, uint16_t* out, int64_t count,
                                        int32_t length, float scale, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++) {
    const uint16_t *g = grad + i * length, *w = weights + i * length;
    int end = int(i % length) + 1;
    vf both{};
    for (int j = 0; j < end; j += LANES) both += part_of(g, j, end, length) * part_of(w, j, end, length);
    float mean = sum(both);
    for (int j = 0; j < length; j += LANES)
      put_part(out + i * length, j, length,
               j < end ? part_of(w, j, end, length) * (part_of(g, j, end, length) - mean) * scale : vf{});
  }
}

void skyrl_silu(const float* x, float* y, int64_t count, int32_t threads) {
  int64_t whole = count / LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < whole; i++) put(y + i * LANES, silu(get(x + i * LANES)));
  if (whole * LANES < count) {
    alignas(64) float last[LANES] = {};
    std::memcpy(last, x + whole * LANES, (count - whole * LANES) * sizeof(float));
    put(last, silu(get(last)));
    std::memcpy(y + whole * LANES, last, (count - whole * LANES) * sizeof(float));
  }
}

// Causal attention of `count` key/value heads: q and out [count, group, length, channels], k and v [count, length,
// channels]. Weights go to p [count, group, length, length] (or null), zero where a query does not see.
void skyrl_attend(const float* q, const float* k, const float* v, float* out, float* p, int64_t count, int32_t group,
                  int32_t length, int32_t channels, float scale, int32_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int padded = padded_to_lanes(length);
    std::unique_ptr<float[]> scores(new float[size_t(group) * padded]);
    std::unique_ptr<size_t[]> places(new size_t[padded]);
    float inverse[MAX_GROUP], rest[MAX_GROUP];
#pragma omp for schedule(dynamic, 16)
    for (int64_t unit = 0; unit < count * length; unit++) {
      int64_t n = unit / length;
      int t = int(unit % length), keys = t + 1, room = padded_to_lanes(keys);
      for (int j = 0; j < room; j++) places[j] = size_t(std::min(j, t)) * channels;
      size_t kv = size_t(n) * length * channels, stride = size_t(length) * channels;
      size_t at = (size_t(n) * group * length + t) * channels;
      attend(k + kv, v + kv, places.get(), keys, channels, group, scale, q + at, out + at, stride, scores.get(), inverse,
             rest);
      for (int g = 0; g < group && p; g++) {
        const float* e = scores.get() + size_t(g) * room;
        float* to = p + ((size_t(n) * group + g) * length + t) * length;
        for (int j = 0; j < keys; j++) to[j] = e[j] * inverse[g];
        std::fill(to + keys, to + length, 0.0f);
      }
    }
  }
}

// Log-probabilities [count, wide] of `targets` [count, wide], and the log of the sum of exponentials [count], of logits
// [count, vocab] over a temperature.
void skyrl_log_probs(const float* logits, int64_t count, int32_t vocab, const int64_t* targets, int32_t wide,
                     float temperature, float* logprobs, float* logz, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < count; row++) {
    Softmax s(logits + row * vocab, vocab, temperature);
    for (int64_t i = row * wide; i < (row + 1) * wide; i++) logprobs[i] = s.log_prob(targets[i]);
    logz[row] = float(s.top + std::log(s.total));
  }
}

// `half`: logits in bfloat16, else float32.
void skyrl_logit_sums(int32_t half, const void* logits, int64_t count, int32_t width, float heat, const int64_t* targets,
                      int64_t from, float* found, float* peak, float* total, float* moment, int32_t threads) {
  auto all = [&](const auto* z) {
    logit_sums(z, count, width, heat, targets, from, found, peak, total, moment, threads);
  };
  half ? all(static_cast<const bf16*>(logits)) : all(static_cast<const float*>(logits));
}

void skyrl_logit_gradient(int32_t half, void* logits, int64_t count, int32_t width, float heat, const int64_t* targets,
                          int64_t from, const float* logz, const float* g, const float* entropy, const float* h,
                          int32_t threads) {
  auto all = [&](auto* z) { logit_gradient(z, count, width, heat, targets, from, logz, g, entropy, h, threads); };
  half ? all(static_cast<bf16*>(logits)) : all(static_cast<float*>(logits));
}

// out [rows, parts, width] = the sums, in float32 and in order, of those rows of x [count, parts, width] whose `index`
// names them; of bfloat16 (`half`) or float32. `stride` and `part_stride` of x are in numbers.
void skyrl_sum_rows(int32_t half, const void* x, int64_t count, int32_t parts, int32_t width, int64_t stride,
                    int64_t part_stride, const int64_t* index, void* out, int64_t rows, int32_t threads) {
  std::unique_ptr<int64_t[]> ends(new int64_t[rows + 1]()), order(new int64_t[count]);
  for (int64_t i = 0; i < count; i++) ends[index[i] + 1]++;
  for (int64_t row = 0; row < rows; row++) ends[row + 1] += ends[row];
  for (int64_t i = 0; i < count; i++) order[ends[index[i]]++] = i;  // afterwards ends[row] is where its list ends
  auto all = [&](auto* to, const auto* from) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
      int64_t first = row ? ends[row - 1] : 0;
      for (int part = 0; part < parts; part++) {
        auto* y = to + (row * parts + part) * width;
        const auto* base = from + part * part_stride;
        for (int at = 0; at < width; at += LANES) {
          int lanes = std::min(LANES, width - at);
          alignas(64) std::remove_cv_t<std::remove_reference_t<decltype(*y)>> some[LANES] = {};
          vf total{};
          for (int64_t i = first; i < ends[row]; i++) {
            const auto* here = base + order[i] * stride + at;
            if (lanes == LANES) total += get(here);
            else std::memcpy(some, here, lanes * sizeof *y), total += get(some);
          }
          if (lanes == LANES) put(y + at, total);
          else put(some, total), std::memcpy(y + at, some, lanes * sizeof *y);
        }
      }
    }
  };
  if (half) all(static_cast<bf16*>(out), static_cast<const bf16*>(x));
  else all(static_cast<float*>(out), static_cast<const float*>(x));
}
}
