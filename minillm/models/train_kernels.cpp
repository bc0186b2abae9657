// Row passes of training on a CPU: between two matrix products, everything in one walk through
// the cache. `train_kernels.py` compiles this and says when it is used.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// exp(x) for x <= 0, within 2 units in the last place: 2^n * e^r, r within half a ln 2.
// A NaN stays one; below -87 the result is about 1e-38 and not 0.
inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds
    const float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4B400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float sigmoid_of(float x) {
    const float small = exp_of(-std::fabs(x));
    return (x < 0 ? small : 1.0f) / (1.0f + small);
}

inline float row_max(const float* x, int64_t size) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

inline float exp_row(float* x, int64_t size, float top) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
        x[i] = exp_of(x[i] - top);
        sum += x[i];
    }
    return sum;
}

}  // namespace

extern "C" {

// Each row of x becomes exp(x - its maximum).
void minillm_exp_rows(
    float* x, int64_t rows, int64_t size, int64_t stride, float* top, float* sum
) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        top[r] = row_max(x + r * stride, size);
        sum[r] = exp_row(x + r * stride, size, top[r]);
    }
}

// Scores of `count` queries, the first of which is token `first` of its document, become weights
// that are still to be divided by `sum`; what a query may not see becomes 0.
void minillm_attend(
    float* s, int64_t heads, int64_t count, int64_t size, int64_t first, float* log_sum, float* sum
) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < heads * count; ++r) {
        float* row = s + r * size;
        const int64_t seen = first + r % count + 1;
        const float top = row_max(row, seen);
        sum[r] = exp_row(row, seen, top);
        log_sum[r] = top + std::log(sum[r]);
        std::memset(row + seen, 0, (size - seen) * sizeof(float));
    }
}

// Scores become weights, and the gradient d of weights that of scores.
void minillm_attend_backward(
    float* s, float* d, int64_t heads, int64_t count, int64_t size, int64_t first,
    const float* log_sum, const float* mean
) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < heads * count; ++r) {
        float *row = s + r * size, *grad = d + r * size;
        const int64_t seen = first + r % count + 1;
        const float shift = log_sum[r], average = mean[r];
#pragma omp simd
        for (int64_t i = 0; i < seen; ++i) {
            row[i] = exp_of(row[i] - shift);
            grad[i] = row[i] * (grad[i] - average);
        }
        std::memset(row + seen, 0, (size - seen) * sizeof(float));
        std::memset(grad + seen, 0, (size - seen) * sizeof(float));
    }
}

// y = silu(gate) * up
void minillm_swiglu(const float* gate, const float* up, float* y, int64_t rows, int64_t size,
                    int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float *g = gate + r * stride, *u = up + r * stride;
        float* out = y + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            const float share = sigmoid_of(g[i]);
            out[i] = g[i] * share * u[i];
        }
    }
}

// Gradients of gate and up, in rows of the same stride.
void minillm_swiglu_backward(const float* gate, const float* up, const float* d, float* d_gate,
                             float* d_up, int64_t rows, int64_t size, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float *g = gate + r * stride, *u = up + r * stride, *dy = d + r * size;
        float *dg = d_gate + r * stride, *du = d_up + r * stride;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            const float share = sigmoid_of(g[i]);
            du[i] = dy[i] * g[i] * share;
            dg[i] = dy[i] * u[i] * share * (1.0f + g[i] * (1.0f - share));
        }
    }
}

// y[t] = silu(sum over w of weight[W - 1 - w] x[t - w]), x[t - w] of the same document only.
// `weight` is (W, size): each of its rows weighs one shift of all channels. `start` (rows x length)
// is how many tokens of its document come before each token.
void minillm_conv(const float* x, const float* weight, const int32_t* start, float* y, int64_t rows,
                  int64_t length, int64_t size, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows * length; ++r) {
        float* out = y + r * size;
        const float *now = x + r * size, *last = weight + (width - 1) * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) out[i] = now[i] * last[i];
        for (int64_t w = 1; w < width && w <= start[r]; ++w) {
            const float *past = now - w * size, *by = last - w * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) out[i] += past[i] * by[i];
        }
    }
}

// d, the gradient of silu(y), becomes that of y; then those of x and, a sum for each row, weight.
void minillm_conv_backward(const float* x, const float* weight, const int32_t* start,
                           const float* y, float* d, float* d_x, float* d_weight, int64_t rows,
                           int64_t length, int64_t size, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float* sums = d_weight + row * width * size;
        for (int64_t t = 0; t < length; ++t) {
            const int64_t r = row * length + t;
            const float *now = x + r * size, *pre = y + r * size;
            float *grad = d + r * size, *out = d_x + r * size;
            const float* last = weight + (width - 1) * size;
            float* last_sum = sums + (width - 1) * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) {
                const float share = sigmoid_of(pre[i]);
                grad[i] *= share * (1.0f + pre[i] * (1.0f - share));
                out[i] = grad[i] * last[i];
                last_sum[i] += grad[i] * now[i];
            }
            for (int64_t w = 1; w < width && w <= start[r]; ++w) {
                const float *past = now - w * size, *by = last - w * size;
                float *to = out - w * size, *sum = last_sum - w * size;
#pragma omp simd
                for (int64_t i = 0; i < size; ++i) {
                    to[i] += grad[i] * by[i];
                    sum[i] += grad[i] * past[i];
                }
            }
        }
    }
}

// y = silu(x)
void minillm_silu(const float* x, float* y, int64_t size) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < size; ++i) y[i] = x[i] * sigmoid_of(x[i]);
}

// out[n] = sum over k of weight[n, k] * y[place[n, k]]
void minillm_mix(const float* y, const int64_t* place, const float* weight, float* out,
                 int64_t tokens, int64_t chosen, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        float* to = out + n * size;
        for (int64_t k = 0; k < chosen; ++k) {
            const float by = weight[n * chosen + k];
            const float* from = y + place[n * chosen + k] * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = k ? to[i] + by * from[i] : by * from[i];
        }
    }
}

// Gradients of y and weight; every row of y has one place.
void minillm_mix_backward(const float* y, const int64_t* place, const float* weight, const float* g,
                          float* d_y, float* d_weight, int64_t tokens, int64_t chosen,
                          int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < tokens * chosen; ++m) {
        const float *grad = g + m / chosen * size, *row = y + place[m] * size;
        float *to = d_y + place[m] * size, by = weight[m], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            to[i] = by * grad[i];
            sum += row[i] * grad[i];
        }
        d_weight[m] = sum;
    }
}

}  // extern "C"
