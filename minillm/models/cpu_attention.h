// Attention of new tokens to the caches of their sequences.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_vectors.h"

static void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t K) {
  for (int64_t i = 0; i < K / 2; i++) {  // the first half of sin is negative
    const float a = x[i], b = x[i + K / 2];
    y[i] = a * cos[i] + b * sin[i], y[i + K / 2] = b * cos[i + K / 2] + a * sin[i + K / 2];
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
