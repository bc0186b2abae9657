// The product of some vectors (tokens) with a packed matrix.
//
// An N x K matrix is cut into panels of 16 rows, a panel into groups of 32 columns. A panel holds
// the 16 scales (and minima) of each group, then the weights: of floats column by column; of codes
// two columns of 16 rows, then the next two. int4 keeps columns 16 to 31 in the upper halves.
//
// Tokens are cut into tiles, whose sums stay in registers. `arrange` puts the tokens of a tile side
// by side, so that a tile reads one stream. With codes it rounds them as well, 32 at a time to 16
// bits: products of integers are exact and take half the time of floats.
#pragma once
#include <algorithm>
#include <utility>

#include "cpu_crew.h"
#include "cpu_vectors.h"

enum Kind { FP32, FP16, INT8, INT4 };
constexpr int64_t ROWS = 16, GROUP = 32, PARTS = ROWS / LANES, BLOCK = 64;
constexpr int64_t HEAD_BYTES[] = {0, 0, 32, 64}, CODE_BYTES[] = {2048, 1024, 512, 256};

struct Matrix { const uint8_t* data; int64_t rows, columns, kind; };

constexpr int64_t most_tokens(int64_t kind) {
  return kind < INT8 ? (LANES == 16 ? 16 : 6) : LANES == 16 ? 8 : 4;
}
// numbers that 32 columns of a token take: as codes 16 pairs, the scale and the sum
constexpr int64_t words(int64_t kind) { return kind < INT8 ? GROUP : 18; }
static int64_t groups_of(int64_t columns) { return (columns + GROUP - 1) / GROUP; }

// M tokens in tiles of nearly the same size
struct Cut {
  int64_t tiles, size, larger;  // the first `larger` tiles have one token more
  Cut(int64_t M, int64_t kind) {
    tiles = (M + most_tokens(kind) - 1) / most_tokens(kind), size = M / tiles, larger = M % tiles;
  }
  int64_t first(int64_t t) const { return t * size + std::min(t, larger); }
  int64_t tokens(int64_t t) const { return size + (t < larger); }
  int64_t of(int64_t m) const {
    return m < larger * (size + 1) ? m / (size + 1) : (m - larger) / size;
  }
};

// 32 values as pairs of codes, their scale and their sum, each `stride` numbers after the one before
static void put_codes(const float* value, float* to, int64_t stride) {
  v8 most = {};
  for (int i = 0; i < GROUP; i += 8) {
    const v8 x = load(value + i), size = x < 0 ? -x : x;
    most = size > most ? size : most;
  }
  const float reach = largest(most), steps = reach > 1e-30f ? 32767 / reach : 0;
  i8 sums = {};
  int16_t codes[GROUP];
  for (int i = 0; i < GROUP; i += 8) {
    typedef int16_t s8 __attribute__((vector_size(16), aligned(2), may_alias));
    const i8 code = whole(load(value + i) * steps);
    *(s8*)(codes + i) = __builtin_convertvector(code, s8);
    sums += code;
  }
  for (int n = 0; n < GROUP / 2; n++) std::memcpy(to + n * stride, codes + 2 * n, 4);
  to[16 * stride] = reach / 32767;
  to[17 * stride] = reach / 32767 * total(__builtin_convertvector(sums, v8));
}

// Arranges M tokens for a matrix with K columns; `fill(m, k, end, to)` gives columns k to end of a
// token. Called by all threads, waits for them.
template <class Fill>
static void arrange(Crew& crew, const Fill& fill, int64_t M, int64_t K, int64_t kind, float* to) {
  const Cut cut(M, kind);
  const int64_t groups = groups_of(K), size = words(kind);
#pragma omp for schedule(static) nowait
  for (int64_t g = 0; g < groups; g++)
    for (int64_t m = 0; m < M; m++) {
      float value[GROUP] = {};
      fill(m, g * GROUP, std::min(K, (g + 1) * GROUP), value);
      const int64_t t = cut.of(m), first = cut.first(t), stride = cut.tokens(t);
      float* place = to + (first * groups + g * stride) * size + m - first;
      if (kind < INT8) for (int i = 0; i < GROUP; i++) place[i * stride] = value[i];
      else put_codes(value, place, stride);
    }
  crew.meet();
}

// y[m, r] (+)= the sums of a tile; `sum` has 16 rows of each token
static void put_sums(const vf* sum, float* y, int64_t M, int64_t N, int64_t rows, bool adds) {
  for (int64_t m = 0; m < M; m++, y += N, sum += PARTS)
    if (rows == ROWS)
      for (int h = 0; h < PARTS; h++) {
        vf* to = (vf*)(y + h * LANES);
        *to = adds ? *to + sum[h] : sum[h];
      }
    else
      for (int64_t r = 0; r < rows; r++) y[r] = ((const float*)sum)[r] + (adds ? y[r] : 0);
}

// 16 rows times M tokens
template <int F, int M>
static void tile_of_floats(const uint8_t* w, const float* x, int64_t groups, vf* out) {
  constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;  // independent sums, to hide the adder's latency
  vf sum[U][M][PARTS] = {};
  for (int64_t k = 0; k < groups * GROUP; k += U, x += U * M)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++, w += CODE_BYTES[F] / GROUP) {
      if (M >= 4) __builtin_prefetch(w + 2048);
#pragma GCC unroll 2
      for (int h = 0; h < PARTS; h++) {
        const vf weight = F == FP32 ? *(const vf*)(w + 4 * LANES * h) : wide_halves(w + 2 * LANES * h);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) sum[u][m][h] += weight * (x[u * M + m] - vf{});
      }
    }
  for (int m = 0; m < M; m++)
    for (int h = 0; h < PARTS; h++) {
      for (int u = 1; u < U; u++) sum[0][m][h] += sum[u][m][h];
      out[m * PARTS + h] = sum[0][m][h];
    }
}

template <int F, int M>
static void tile_of_codes(const uint8_t* w, const float* x, int64_t groups, vf* out) {
  const uint8_t* head = w;
  w += (groups * HEAD_BYTES[F] + 63) / 64 * 64;
  vf sum[M][PARTS] = {};
  for (int64_t g = 0; g < groups; g++, w += CODE_BYTES[F], head += HEAD_BYTES[F], x += words(F) * M) {
    const int32_t* codes = (const int32_t*)x;
    for (int i = 0; i < CODE_BYTES[F]; i += 64) __builtin_prefetch(w + 2048 + i);
#pragma GCC unroll 2
    for (int h = 0; h < PARTS; h++) {
      vi dots[M] = {};
#pragma GCC unroll 16
      for (int n = 0; n < GROUP / 2; n++) {
        vi weight = pairs(w + 32 * (F == INT8 ? n : n % 8) + 2 * LANES * h);
        if (F == INT4) weight = (n < 8 ? weight : weight >> 4) & 0x000F000F;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) dots[m] = dot(dots[m], weight, codes[n * M + m] - vi{});
      }
      const vf scale = wide_halves(head + 2 * LANES * h);
      const vf low = F == INT4 ? wide_halves(head + 32 + 2 * LANES * h) : scale;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        sum[m][h] += __builtin_convertvector(dots[m], vf) * (scale * x[16 * M + m]);
        if (F == INT4) sum[m][h] += low * x[17 * M + m];
      }
    }
  }
  std::memcpy(out, sum, sizeof sum);
}

using Tile = void (*)(const uint8_t*, const float*, int64_t, vf*);
template <int F, class = std::make_index_sequence<most_tokens(F)>> struct Tiles;
template <int F, size_t... I> struct Tiles<F, std::index_sequence<I...>> {
  static constexpr Tile of[] = {
      (F < INT8 ? tile_of_floats<F < INT8 ? F : FP32, I + 1>
                : tile_of_codes<F < INT8 ? INT8 : F, I + 1>)...};
};
constexpr const Tile* TILES[] = {Tiles<FP32>::of, Tiles<FP16>::of, Tiles<INT8>::of, Tiles<INT4>::of};

// y (M x N) = arranged x times the matrix transposed; called by all threads, does not wait for them.
// Dynamic shares: a thread whose core has other work to do, such as HTTP, does not hold the others up.
static void linear(const Matrix& w, const float* x, float* y, int64_t M, bool adds = false) {
  const int64_t N = w.rows, groups = groups_of(w.columns), at_once = BLOCK / most_tokens(w.kind);
  const int64_t panel = (groups * HEAD_BYTES[w.kind] + 63) / 64 * 64 + groups * CODE_BYTES[w.kind];
  const int64_t share = std::max<int64_t>(1, N / ROWS / (8 * omp_get_num_threads()));
  const Cut cut(M, w.kind);
  for (int64_t from = 0; from < cut.tiles; from += at_once) {
    const int64_t end = std::min(cut.tiles, from + at_once);
#pragma omp for schedule(dynamic, share) nowait
    for (int64_t n = 0; n < N; n += ROWS)
      for (int64_t t = from; t < end; t++) {
        const int64_t first = cut.first(t), tokens = cut.tokens(t);
        vf sum[16 * PARTS];
        TILES[w.kind][tokens - 1](w.data + n / ROWS * panel, x + first * groups * words(w.kind),
                                  groups, sum);
        put_sums(sum, y + first * N + n, tokens, N, std::min(ROWS, N - n), adds);
      }
  }
}
