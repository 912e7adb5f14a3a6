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
}
