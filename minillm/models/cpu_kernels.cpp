// Decoding on a CPU: the product of a few vectors with a packed matrix (`cpu_linear.h`), and the
// whole step of a Llama made of it, in one call. Compiled at first use by `cpu_kernels.py`, which
// says why. Sums are fp32.
#include "cpu_attention.h"
#include "cpu_linear.h"

struct Layer { Matrix q, k, v, o, gate, up, down; const float *norm_in, *norm_post; };
struct Model {
  const Layer* layers;
  const float* norm;
  Matrix head;
  int64_t num_layers, size, inner, heads, kv_heads, head_size;
  float eps, scale;
};

// Arranges M tokens of D numbers, normed. Each thread takes all means: that costs less than waiting.
static void arrange_normed(Crew& crew, const float* x, const float* w, int64_t M, int64_t D,
                           float eps, int64_t kind, float* to) {
  static thread_local std::vector<float> scale;
  scale.resize(M);
  for (int64_t m = 0; m < M; m++) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; d++) squares += x[m * D + d] * x[m * D + d];
    scale[m] = 1 / std::sqrt(squares / D + eps);
  }
  const float* scales = scale.data();
  const auto fill = [=](int64_t m, int64_t k, int64_t end, float* value) {
    for (int64_t d = k; d < end; d++) value[d - k] = x[m * D + d] * scales[m] * w[d];
  };
  arrange(crew, fill, M, D, kind, to);
}

static void arrange_plain(Crew& crew, const float* x, int64_t M, int64_t K, int64_t kind,
                          float* to) {
  const auto fill = [=](int64_t m, int64_t k, int64_t end, float* value) {
    std::memcpy(value, x + m * K + k, 4 * (end - k));
  };
  arrange(crew, fill, M, K, kind, to);
}

// silu(gate) * up; F is a multiple of 8
static void arrange_gated(Crew& crew, const float* gate, const float* up, int64_t M, int64_t F,
                          int64_t kind, float* to) {
  const auto fill = [=](int64_t m, int64_t k, int64_t end, float* value) {
    for (int64_t i = m * F + k; i < m * F + end; i += 8, value += 8) {
      const v8 x = load(gate + i);
      *(v8*)value = x * load(up + i) / (1 + exp(-x));
    }
  };
  arrange(crew, fill, M, F, kind, to);
}

// Rotates q and k of M tokens, writes k and v to the caches, and attends to what is there.
template <class T>
static void attention(Crew& crew, const Model& c, int64_t M, const int64_t* row, const int64_t* at, float* q,
                      float* k, const float* v, const float* cos, const float* sin, T* keys,
                      T* values, int64_t capacity, float* out) {
  const int64_t H = c.heads, G = c.kv_heads, K = c.head_size, R = H / G;
#pragma omp for collapse(2) schedule(static) nowait
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < H + G; n++) {
      const int64_t g = n - H, place = ((row[m] * G + g) * capacity + at[m]) * K;
      float* x = g < 0 ? q + (m * H + n) * K : k + (m * G + g) * K;
      rotate(x, cos + m * K, sin + m * K, x, K);
      if (g < 0) continue;
      store(x, keys + place, K);
      store(v + (m * G + g) * K, values + place, K);
    }
  crew.meet();
#pragma omp for collapse(2) schedule(dynamic, std::max<int64_t>(1, M / 8)) nowait
  for (int64_t g = 0; g < G; g++)  // tokens of one prompt read the same keys
    for (int64_t m = 0; m < M; m++) {
      const int64_t start = (row[m] * G + g) * capacity * K;
      for (int64_t r = 0; r < R; r += 4) {
        const int64_t first = (m * H + g * R + r) * K;
        ATTEND<T>[std::min<int64_t>(4, R - r) - 1](q + first, keys + start, values + start,
                                                   at[m] + 1, K, c.scale, out + first);
      }
    }
  crew.meet();
}

extern "C" void minillm_linear(const Matrix* w, const float* x, float* y, int64_t M, int threads) {
  static thread_local std::vector<float> room;
  room.resize(M * groups_of(w->columns) * words(w->kind));
  float* arranged = room.data();
  Crew crew;
#pragma omp parallel num_threads(threads)
  {
    arrange_plain(crew, x, M, w->columns, w->kind, arranged);
    linear(*w, arranged, y, M);
  }
}

// M tokens, each at position `at[m]` of cache row `row[m]`. Caches are (rows, G, capacity, K), one
// pair for each layer, of fp16 or fp32; `x` holds the embeddings and is overwritten; `logits` are
// of the last `kept`. `room` has M * (32 * groups of the widest + 2 (H + G) K + 2 F) numbers.
extern "C" void minillm_llama(const Model* model, int64_t M, int64_t kept, const int64_t* row,
                              const int64_t* at, float* x, const float* cos, const float* sin,
                              void* const* caches, int64_t capacity, int64_t halves, float* room,
                              float* logits, int threads) {
  const Model& c = *model;
  const int64_t D = c.size, F = c.inner, H = c.heads, G = c.kv_heads, K = c.head_size;
  const int64_t kind = c.head.kind;
  float *q = room, *k = q + M * H * K, *v = k + M * G * K, *a = v + M * G * K,
        *gate = a + M * H * K, *up = gate + M * F, *in = up + M * F;
  Crew crew;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t l = 0; l < c.num_layers; l++) {
      const Layer& w = c.layers[l];
      arrange_normed(crew, x, w.norm_in, M, D, c.eps, kind, in);
      linear(w.q, in, q, M), linear(w.k, in, k, M), linear(w.v, in, v, M);
      crew.meet();
      if (halves)
        attention(crew, c, M, row, at, q, k, v, cos, sin, (uint16_t*)caches[2 * l],
                  (uint16_t*)caches[2 * l + 1], capacity, a);
      else
        attention(crew, c, M, row, at, q, k, v, cos, sin, (float*)caches[2 * l],
                  (float*)caches[2 * l + 1], capacity, a);
      arrange_plain(crew, a, M, H * K, kind, in);
      linear(w.o, in, x, M, true);
      crew.meet();
      arrange_normed(crew, x, w.norm_post, M, D, c.eps, kind, in);
      linear(w.gate, in, gate, M), linear(w.up, in, up, M);
      crew.meet();
      arrange_gated(crew, gate, up, M, F, kind, in);
      linear(w.down, in, x, M, true);
      crew.meet();
    }
    arrange_normed(crew, x + (M - kept) * D, c.norm, kept, D, c.eps, kind, in);
    linear(c.head, in, logits, kept);
  }
}
