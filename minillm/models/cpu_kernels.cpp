// Decoding on a CPU: the product of a few vectors with a packed matrix, and the whole step of a
// Llama made of it, in one call. Compiled at first use by `cpu_kernels.py`, which says why.
//
// An N x K matrix is cut into panels of 16 rows, a panel into groups of 32 columns. A group holds
// its 16 scales (and minima) and then its columns, so that a panel is read from front to back and
// one vector has the same column of 8 rows. Weights become fp32 in registers; sums are fp32.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
enum Kind { FP32, FP16, INT8, INT4 };
constexpr int64_t ROWS = 16, GROUP = 32, TOKENS = 6;
constexpr int64_t HEAD_BYTES[] = {0, 0, 32, 64}, COLUMN_BYTES[] = {64, 32, 16, 8};

struct Matrix { const uint8_t* data; int64_t rows, columns, kind; };
struct Layer { Matrix q, k, v, o, gate, up, down; const float *norm_in, *norm_post; };
struct Model {
  const Layer* layers;
  const float* norm;
  Matrix head;
  int64_t num_layers, size, inner, heads, kv_heads, head_size;
  float eps, scale;
};

static v8 halves(const void* p) {
#ifdef __F16C__
  return (v8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  typedef _Float16 h8 __attribute__((vector_size(16), aligned(2), may_alias));
  return __builtin_convertvector(*(const h8*)p, v8);
#endif
}

template <class Byte> static i8 bytes(const uint8_t* p) {
#ifdef __AVX2__
  const __m128i x = _mm_loadl_epi64((const __m128i*)p);
  return (i8)(Byte(-1) < 0 ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#else
  typedef Byte b8 __attribute__((vector_size(8), aligned(1), may_alias));
  return __builtin_convertvector(*(const b8*)p, i8);
#endif
}

// e^x to the last bits but one: e^x = 2^n e^r, and Taylor's series for r (at most 0.35)
static v8 exp(v8 x) {
  x = x < -87 ? v8{} - 87 : x > 88 ? v8{} + 88 : x;
  const v8 n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // rounds to a whole number
  const v8 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v8 sum = r * (1 / 5040.0f) + 1 / 720.0f;
  for (float c : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) sum = sum * r + c;
  return sum * (v8)((__builtin_convertvector(n, i8) + 127) << 23);
}

static v8 floats(i8 x) { return __builtin_convertvector(x, v8); }

// what a group begins with
template <int F> static void head(const uint8_t* w, v8* scale, v8* low) {
  if (F >= INT8) for (int h = 0; h < 2; h++) scale[h] = halves(w + 16 * h);
  if (F == INT4) for (int h = 0; h < 2; h++) low[h] = halves(w + 32 + 16 * h);
}

// the weights of 16 rows in one column
template <int F>
static void column(const uint8_t* p, const v8* scale, const v8* low, v8& a, v8& b) {
  if (F == FP32) a = *(const v8*)p, b = *(const v8*)(p + 32);
  if (F == FP16) a = halves(p), b = halves(p + 16);
  if (F == INT8) a = floats(bytes<int8_t>(p)), b = floats(bytes<int8_t>(p + 8));
  if (F == INT4) {
    const i8 both = bytes<uint8_t>(p);
    a = floats(both & 15), b = floats(both >> 4);
  }
  if (F == INT8) a *= scale[0], b *= scale[1];
  if (F == INT4) a = a * scale[0] + low[0], b = b * scale[1] + low[1];
}

// a panel as fp32
template <int F> static void unpack(const uint8_t* w, int64_t K, v8* to) {
  v8 scale[2], low[2];
  for (int64_t k = 0; k < K; k++, w += COLUMN_BYTES[F], to += 2) {
    if (k % GROUP == 0) head<F>(w, scale, low), w += HEAD_BYTES[F];
    column<F>(w, scale, low, to[0], to[1]);
  }
}

// 16 rows times M vectors; y[m, r] (+)= sum over k of w[r, k] x[m, k]
template <int F, int M>
static void tile(const uint8_t* w, const float* x, int64_t K, float* y, int64_t N, int64_t rows,
                 bool adds, const uint8_t* ahead, int64_t lines) {
  constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;  // independent sums, to hide the adder's latency
  v8 sum[U][M][2] = {}, scale[2], low[2];
  for (int64_t start = 0; start < K; start += GROUP) {
    const int64_t end = std::min(K, start + GROUP);
    head<F>(w, scale, low);
    w += HEAD_BYTES[F];
    for (int64_t i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    for (int64_t k = start; k < end; k += U, w += U * COLUMN_BYTES[F]) {
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        v8 a, b;
        column<F>(w + u * COLUMN_BYTES[F], scale, low, a, b);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
          const v8 value = x[m * K + k + u] - v8{};
          sum[u][m][0] += a * value, sum[u][m][1] += b * value;
        }
      }
    }
  }
  for (int m = 0; m < M; m++) {
    for (int u = 1; u < U; u++) for (int h = 0; h < 2; h++) sum[0][m][h] += sum[u][m][h];
    const float* from = (const float*)sum[0][m];
    for (int64_t r = 0; r < rows; r++) y[m * N + r] = from[r] + (adds ? y[m * N + r] : 0);
  }
}

using Tile = void (*)(const uint8_t*, const float*, int64_t, float*, int64_t, int64_t, bool,
                      const uint8_t*, int64_t);
template <int F> struct Tiles {
  static constexpr Tile of[] = {tile<F, 1>, tile<F, 2>, tile<F, 3>, tile<F, 4>, tile<F, 5>,
                                tile<F, 6>};
};
constexpr const Tile* TILES[] = {Tiles<FP32>::of, Tiles<FP16>::of, Tiles<INT8>::of, Tiles<INT4>::of};

// y (M x N) = x (M x K) times the matrix transposed; called by all threads, does not wait for them.
// Dynamic shares: a thread whose core has other work to do, such as HTTP, does not hold the others up.
static void linear(const Matrix& w, const float* x, float* y, int64_t M, bool adds = false) {
  const int64_t K = w.columns, N = w.rows, groups = (K + GROUP - 1) / GROUP;
  const int64_t panel = groups * HEAD_BYTES[w.kind] + K * COLUMN_BYTES[w.kind];
  const int64_t share = std::max<int64_t>(1, N / ROWS / (8 * omp_get_num_threads()));
  for (int64_t first = 0; first < M; first += 8 * TOKENS) {
    const int64_t last = std::min(M, first + 8 * TOKENS), all = (last - first + TOKENS - 1) / TOKENS;
    const int64_t lines = all > 1 ? (panel + 64 * groups * all - 1) / (64 * groups * all) : 0;
    const bool unpacks = all > 1 && w.kind >= INT8;  // once for all, not for each tile
    static thread_local std::vector<float> room;
    if (unpacks && (int64_t)room.size() < ROWS * K) room.resize(ROWS * K);
#pragma omp for schedule(dynamic, share) nowait
    for (int64_t n = 0; n < N; n += ROWS) {
      const uint8_t *data = w.data + n / ROWS * panel, *ahead = data + panel;
      if (unpacks) {
        (w.kind == INT8 ? unpack<INT8> : unpack<INT4>)(data, K, (v8*)room.data());
        data = (const uint8_t*)room.data();
      }
      for (int64_t m = first, parts = all; m < last; parts--) {
        const int64_t num = (last - m + parts - 1) / parts;
        TILES[unpacks ? FP32 : w.kind][num - 1](data, x + m * K, K, y + m * N + n, N,
                                                std::min(ROWS, N - n), adds, ahead, lines);
        ahead += lines * groups * 64;
        m += num;
      }
    }
  }
}

static void rms_norm(const float* x, const float* w, float* y, int64_t M, int64_t D, float eps) {
#pragma omp for schedule(static)
  for (int64_t m = 0; m < M; m++) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; d++) squares += x[m * D + d] * x[m * D + d];
    const float r = 1 / std::sqrt(squares / D + eps);
    for (int64_t d = 0; d < D; d++) y[m * D + d] = x[m * D + d] * r * w[d];
  }
}

static void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t K) {
  for (int64_t i = 0; i < K / 2; i++) {  // the first half of sin is negative
    const float a = x[i], b = x[i + K / 2];
    y[i] = a * cos[i] + b * sin[i], y[i + K / 2] = b * cos[i + K / 2] + a * sin[i + K / 2];
  }
}

static float total(v8 x) {
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  return x[0] + x[1];
}

static v8 load(const float* p) { return *(const v8*)p; }
static v8 load(const uint16_t* p) { return halves(p); }

static void store(const float* from, float* to, int64_t K) { std::memcpy(to, from, 4 * K); }
static void store(const float* from, uint16_t* to, int64_t K) {
  for (int64_t i = 0; i < K; i += 8) {
#ifdef __F16C__
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph((__m256)load(from + i), 0));
#else
    typedef _Float16 h8 __attribute__((vector_size(16), aligned(2), may_alias));
    *(h8*)(to + i) = __builtin_convertvector(load(from + i), h8);
#endif
  }
}

// out[r, i:i + 8 N] = sum over s of p[r, s] values[s, i:i + 8 N]
template <int R, int N, class T>
static void mix(const float* p, int64_t room, const T* values, int64_t S, int64_t K, float* out) {
  v8 sum[R][N] = {};
  for (int64_t s = 0; s < S; s++, values += K)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const v8 value = load(values + 8 * n);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum[r][n] += p[r * room + s] * value;
    }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) *(v8*)(out + r * K + 8 * n) = sum[r][n];
}

// softmax(q k^T scale) v of R query heads with the same keys, over S positions; K is a multiple of 8
template <int R, class T>
static void attend(const float* q, const T* keys, const T* values, int64_t S, int64_t K,
                   float scale, float* out) {
  constexpr int N = R < 2 ? 8 : R < 4 ? 4 : 2;  // keys at a time: independent sums, few loads
  static thread_local std::vector<float> score;
  const int64_t room = (S + 15) / 8 * 8;
  if ((int64_t)score.size() < R * room) score.resize(2 * R * room);
  float* p = score.data();
  for (int64_t s = 0; s < S; s += N) {
    v8 dot[N][R] = {};
    const T* key[N];
    for (int n = 0; n < N; n++) key[n] = keys + std::min(s + n, S - 1) * K;
    for (int64_t i = 0; i < K; i += 8)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        const v8 part = load(key[n] + i);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) dot[n][r] += load(q + r * K + i) * part;
      }
    for (int n = 0; n < N; n++)
      for (int r = 0; r < R; r++) p[r * room + s + n] = total(dot[n][r]) * scale;
  }
  for (int r = 0; r < R; r++) {
    float* row = p + r * room;
    for (int64_t s = S; s < room; s++) row[s] = -INFINITY;
    v8 top = load(row), sums = {};
    for (int64_t s = 8; s < room; s += 8) top = load(row + s) > top ? load(row + s) : top;
    float most = top[0];
    for (int i = 1; i < 8; i++) most = std::max(most, top[i]);
    for (int64_t s = 0; s < room; s += 8) sums += *(v8*)(row + s) = exp(load(row + s) - most);
    const float share = 1 / total(sums);
    for (int64_t s = 0; s < S; s += 8) *(v8*)(row + s) *= share;
  }
  constexpr int64_t WIDE = R < 4 ? 4 : 2;
  int64_t i = 0;
  for (; i + 8 * WIDE <= K; i += 8 * WIDE) mix<R, WIDE>(p, room, values + i, S, K, out + i);
  for (; i < K; i += 8) mix<R, 1>(p, room, values + i, S, K, out + i);
}

template <class T> using Attend = void (*)(const float*, const T*, const T*, int64_t, int64_t, float,
                                           float*);
template <class T> constexpr Attend<T> ATTEND[] = {attend<1, T>, attend<2, T>, attend<3, T>,
                                                   attend<4, T>};

// Rotates q and k of M tokens, writes k and v to the caches, and attends to what is there.
template <class T>
static void attention(const Model& c, int64_t M, const int64_t* row, const int64_t* at, float* q,
                      float* k, const float* v, const float* cos, const float* sin, T* keys,
                      T* values, int64_t capacity, float* out) {
  const int64_t H = c.heads, G = c.kv_heads, K = c.head_size, R = H / G;
#pragma omp for collapse(2) schedule(static)
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < H + G; n++) {
      const int64_t g = n - H, place = ((row[m] * G + g) * capacity + at[m]) * K;
      float* x = g < 0 ? q + (m * H + n) * K : k + (m * G + g) * K;
      rotate(x, cos + m * K, sin + m * K, x, K);
      if (g < 0) continue;
      store(x, keys + place, K);
      store(v + (m * G + g) * K, values + place, K);
    }
#pragma omp for collapse(2) schedule(dynamic, std::max<int64_t>(1, M / 8))
  for (int64_t g = 0; g < G; g++)  // tokens of one prompt read the same keys
    for (int64_t m = 0; m < M; m++) {
      const int64_t start = (row[m] * G + g) * capacity * K;
      for (int64_t r = 0; r < R; r += 4) {
        const int64_t first = (m * H + g * R + r) * K;
        ATTEND<T>[std::min<int64_t>(4, R - r) - 1](q + first, keys + start, values + start,
                                                   at[m] + 1, K, c.scale, out + first);
      }
    }
}

extern "C" void minillm_linear(const Matrix* w, const float* x, float* y, int64_t M, int threads) {
#pragma omp parallel num_threads(threads)
  linear(*w, x, y, M);
}

// M tokens, each at position `at[m]` of cache row `row[m]`. Caches are (rows, G, capacity, K), one
// pair for each layer, of fp16 or fp32; `x` holds the embeddings and is overwritten; `logits` are of the last `kept`.
extern "C" void minillm_llama(const Model* model, int64_t M, int64_t kept, const int64_t* row,
                              const int64_t* at, float* x, const float* cos, const float* sin,
                              void* const* caches, int64_t capacity, int64_t halves, float* room,
                              float* logits, int threads) {
  const Model& c = *model;
  const int64_t D = c.size, F = c.inner, H = c.heads, G = c.kv_heads, K = c.head_size;
  float *h = room, *q = h + M * D, *k = q + M * H * K, *v = k + M * G * K, *a = v + M * G * K,
        *gate = a + M * H * K, *up = gate + M * F;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t l = 0; l < c.num_layers; l++) {
      const Layer& w = c.layers[l];
      rms_norm(x, w.norm_in, h, M, D, c.eps);
      linear(w.q, h, q, M), linear(w.k, h, k, M), linear(w.v, h, v, M);
#pragma omp barrier
      if (halves)
        attention(c, M, row, at, q, k, v, cos, sin, (uint16_t*)caches[2 * l],
                  (uint16_t*)caches[2 * l + 1], capacity, a);
      else
        attention(c, M, row, at, q, k, v, cos, sin, (float*)caches[2 * l],
                  (float*)caches[2 * l + 1], capacity, a);
      linear(w.o, a, x, M, true);
#pragma omp barrier
      rms_norm(x, w.norm_post, h, M, D, c.eps);
      linear(w.gate, h, gate, M), linear(w.up, h, up, M);
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t i = 0; i < M * F / 8; i++) {
        const v8 x = ((v8*)gate)[i];
        ((v8*)gate)[i] = x * ((v8*)up)[i] / (1 + exp(-x));
      }
      linear(w.down, gate, x, M, true);
#pragma omp barrier
    }
    rms_norm(x + (M - kept) * D, c.norm, h, kept, D, c.eps);
    linear(c.head, h, logits, kept);
  }
}
