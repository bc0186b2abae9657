// Products of matrices that fit into the cache, fp32, for one thread. Rows are filled up to whole
// vectors: a loop over a row never ends inside one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vector_math.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, WIDE = 4;  // numbers of a vector, vectors of a tile
#else
constexpr int64_t LANES = 8, WIDE = 2;
#endif
constexpr int64_t TALL = 4;  // rows of a tile
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Numbers at the start of a cache line, zeros at first.
struct Buffer {
    explicit Buffer(int64_t size) : at(static_cast<float*>(std::aligned_alloc(64, bytes(size)))) {
        std::memset(at, 0, bytes(size));
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(at); }
    operator float*() const { return at; }
    static size_t bytes(int64_t size) { return (size * sizeof(float) + 63) / 64 * 64; }
    float* at;
};

// The left factor of a product, or by its strides its transpose; LOWER has only zeros right of the
// diagonal, UPPER left of it.
enum Form { FULL, LOWER, UPPER };
struct Factor {
    const float* at;
    int64_t row, column;
    Form form;
};

template <int VECS>
inline void tile(const Factor& a, const float* left, const float* b, int64_t depth, int64_t columns,
                 float keep, float* c) {
    vec sum[TALL][VECS] = {};
    for (int64_t d = 0; d < depth; ++d) {
        vec right[VECS];
        for (int n = 0; n < VECS; ++n)
            right[n] = *reinterpret_cast<const vec*>(b + d * columns + n * LANES);
        for (int m = 0; m < TALL; ++m)
            for (int n = 0; n < VECS; ++n)
                sum[m][n] += left[m * a.row + d * a.column] * right[n];
    }
    for (int m = 0; m < TALL; ++m)
        for (int n = 0; n < VECS; ++n) {
            vec* to = reinterpret_cast<vec*>(c + m * columns + n * LANES);
            *to = keep == 0.0f ? sum[m][n] : *to * keep + sum[m][n];
        }
}

// c = keep c + a b, b of `depth` rows; `columns` are whole vectors and `rows` whole tiles.
void product(Factor a, const float* b, int64_t rows, int64_t depth, int64_t columns, float keep,
             float* c) {
    for (int64_t m = 0; m < rows; m += TALL) {
        const int64_t from = a.form == UPPER ? m : 0, to = a.form == LOWER ? m + TALL : depth;
        const float *left = a.at + m * a.row + from * a.column, *right = b + from * columns;
        float* out = c + m * columns;
        int64_t n = 0;
        for (; n + WIDE * LANES <= columns; n += WIDE * LANES)
            tile<WIDE>(a, left, right + n, to - from, columns, keep, out + n);
        for (; n + 2 * LANES <= columns; n += 2 * LANES)
            tile<2>(a, left, right + n, to - from, columns, keep, out + n);
        for (; n < columns; n += LANES)
            tile<1>(a, left, right + n, to - from, columns, keep, out + n);
    }
}

// to (columns x rows) = from (rows x columns) transposed, four rows and columns at a time
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
    typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
    for (int64_t j = 0; j < columns; j += 4)
        for (int64_t i = 0; i < rows; i += 4) {
            four in[4], pair[4];
            for (int n = 0; n < 4; ++n)
                in[n] = *reinterpret_cast<const four*>(from + (i + n) * columns + j);
            for (int n = 0; n < 2; ++n) {
                pair[n] = __builtin_shufflevector(in[2 * n], in[2 * n + 1], 0, 4, 1, 5);
                pair[n + 2] = __builtin_shufflevector(in[2 * n], in[2 * n + 1], 2, 6, 3, 7);
            }
            float* out = to + j * rows + i;
            for (int n = 0; n < 2; ++n) {
                const four low = pair[2 * n], high = pair[2 * n + 1];
                *reinterpret_cast<four*>(out + 2 * n * rows) =
                    __builtin_shufflevector(low, high, 0, 1, 4, 5);
                *reinterpret_cast<four*>(out + (2 * n + 1) * rows) =
                    __builtin_shufflevector(low, high, 2, 3, 6, 7);
            }
        }
}

template <class From, class To>
void copy(const From* from, To* to, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) store(to[i], load(from[i]));
}

inline void add(float* to, const float* from, float by, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] += by * from[i];
}

inline void scale(float* to, const float* from, float by, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = by * from[i];
}

inline float dot(const float* a, const float* b, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

}  // namespace
