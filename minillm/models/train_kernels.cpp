// Row passes of training on a CPU: between two matrix products, everything in one walk through
// the cache. `train_kernels.py` compiles this, once for each NUMBER that tensors hold, and says
// when it is used. All arithmetic, and every sum, is fp32.

#include "vector_math.h"

using T = NUMBER;  // float or bf16

constexpr int64_t TILE = 128;  // sums of a row that are kept until they are whole

namespace {

template <class X>
float row_max(const X* x, int64_t size) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; ++i) top = load(x[i]) > top ? load(x[i]) : top;
    return top;
}

float exp_row(T* x, int64_t size, float top) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
        const float value = exp_of(load(x[i]) - top);
        store(x[i], value);
        sum += value;
    }
    return sum;
}

// y = weight * x * r, r = 1 / sqrt(mean(x^2) + eps); with `gate` also times silu(gate). X is T, or
// float before a bf16 y.
template <class X>
void norm(const X* x, const float* weight, const T* gate, T* y, float* r, int64_t rows,
          int64_t size, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
        const X* in = x + n * size;
        T* out = y + n * size;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) sum += load(in[i]) * load(in[i]);
        const float scale = r[n] = 1.0f / std::sqrt(sum / size + eps);
        if (gate) {
            const T* open = gate + n * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) {
                const float z = load(open[i]);
                store(out[i], weight[i] * load(in[i]) * scale * (z * sigmoid_of(z)));
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) store(out[i], weight[i] * load(in[i]) * scale);
        }
    }
}

// With n = x r and h = g silu(gate): d_x = r (w h - n mean(w h n)), and sums of h n for d_weight:
// one for each of `parts` runs of rows, so that their order does not depend on the threads.
template <class X>
void norm_backward(const X* x, const float* weight, const T* gate, const float* r, const T* g,
                   X* d_x, float* d_weight, T* d_gate, int64_t rows, int64_t size, int64_t parts) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
        float* sums = d_weight + part * size;
        for (int64_t n = rows * part / parts; n < rows * (part + 1) / parts; ++n) {
            const X* in = x + n * size;
            const T *grad = g + n * size, *open = gate + n * size;
            X* out = d_x + n * size;
            const float scale = r[n];
            float total = 0;
            if (gate) {
                T* d_open = d_gate + n * size;
#pragma omp simd reduction(+ : total)
                for (int64_t i = 0; i < size; ++i) {
                    const float z = load(open[i]), share = sigmoid_of(z);
                    const float normed = load(in[i]) * scale;
                    const float h = load(grad[i]) * z * share * normed;
                    store(d_open[i], load(grad[i]) * weight[i] * normed * share *
                                         (1.0f + z * (1.0f - share)));
                    sums[i] += h;
                    total += weight[i] * h;
                }
            } else {
#pragma omp simd reduction(+ : total)
                for (int64_t i = 0; i < size; ++i) {
                    const float h = load(grad[i]) * load(in[i]) * scale;
                    sums[i] += h;
                    total += weight[i] * h;
                }
            }
            const float mean = total / size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) {
                float h = load(grad[i]) * weight[i];
                if (gate) h *= load(open[i]) * sigmoid_of(load(open[i]));
                store(out[i], scale * (h - load(in[i]) * scale * mean));
            }
        }
    }
}

}  // namespace

extern "C" {

// Each row of x becomes exp(x - its maximum).
void minillm_exp_rows(T* x, int64_t rows, int64_t size, int64_t stride, float* top, float* sum) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        top[r] = row_max(x + r * stride, size);
        sum[r] = exp_row(x + r * stride, size, top[r]);
    }
}

// to += from
void minillm_add_to(float* to, const T* from, int64_t size) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < size; ++i) to[i] += load(from[i]);
}

// Scores of `count` queries and `size` keys, the first of which are tokens `query` and `key`, for
// all `heads` of each row, become weights w that are still to be divided by `sum`. What lies in the
// future, or before the `start` (rows x length) of a query's document, becomes 0. w may be s.
void minillm_attend(float* s, T* w, int64_t rows, int64_t count, int64_t size,
                    const int32_t* start, int64_t heads, int64_t length, int64_t query,
                    int64_t key, float* log_sum, float* sum) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows * count; ++r) {
        const int64_t at = query + r % count, first = start[r / count / heads * length + at];
        const int64_t begin = first > key ? first - key : 0, end = at - key + 1;
        float* row = s + r * size;
        T* weights = w + r * size;
        const float top = row_max(row + begin, end - begin);
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = begin; i < end; ++i) {
            const float weight = exp_of(row[i] - top);
            store(weights[i], weight);
            total += weight;
        }
        sum[r] = total;
        log_sum[r] = top + std::log(total);
        std::memset(weights, 0, begin * sizeof(T));
        std::memset(weights + end, 0, (size - end) * sizeof(T));
    }
}

// Scores become weights, and the gradient d of weights that of scores.
void minillm_attend_backward(float* s, T* w, int64_t rows, int64_t count, int64_t size,
                             const int32_t* start, int64_t heads, int64_t length, int64_t query,
                             int64_t key, T* d, const float* log_sum, const float* mean) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows * count; ++r) {
        const int64_t at = query + r % count, first = start[r / count / heads * length + at];
        const int64_t begin = first > key ? first - key : 0, end = at - key + 1;
        const float *row = s + r * size, shift = log_sum[r], average = mean[r];
        T *weights = w + r * size, *grad = d + r * size;
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float weight = exp_of(row[i] - shift);
            store(weights[i], weight);
            store(grad[i], weight * (load(grad[i]) - average));
        }
        std::memset(weights, 0, begin * sizeof(T));
        std::memset(grad, 0, begin * sizeof(T));
        std::memset(weights + end, 0, (size - end) * sizeof(T));
        std::memset(grad + end, 0, (size - end) * sizeof(T));
    }
}

// y = silu(gate) * up
void minillm_swiglu(const T* gate, const T* up, T* y, int64_t rows, int64_t size, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const T *g = gate + r * stride, *u = up + r * stride;
        T* out = y + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            const float x = load(g[i]);
            store(out[i], x * sigmoid_of(x) * load(u[i]));
        }
    }
}

// Gradients of gate and up, in rows of the same stride.
void minillm_swiglu_backward(const T* gate, const T* up, const T* d, T* d_gate, T* d_up,
                             int64_t rows, int64_t size, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const T *g = gate + r * stride, *u = up + r * stride, *dy = d + r * size;
        T *dg = d_gate + r * stride, *du = d_up + r * stride;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            const float x = load(g[i]), share = sigmoid_of(x), grad = load(dy[i]);
            store(du[i], grad * x * share);
            store(dg[i], grad * load(u[i]) * share * (1.0f + x * (1.0f - share)));
        }
    }
}

// y[t] = silu(sum over w of weight[W - 1 - w] x[t - w]), x[t - w] of the same document only; `pre`
// is what is given to silu. `weight` is (W, size): each of its rows weighs one shift of all
// channels. `start` (rows x length) is how many tokens of its document come before each token.
void minillm_conv(const T* x, const float* weight, const int32_t* start, T* pre, T* y, int64_t rows,
                  int64_t length, int64_t size, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows * length; ++r) {
        const T* now = x + r * size;
        const float* last = weight + (width - 1) * size;
        for (int64_t at = 0; at < size; at += TILE) {
            const int64_t end = at + TILE < size ? at + TILE : size;
            float sum[TILE] = {};
            for (int64_t w = 0; w < width && w <= start[r]; ++w) {
                const T* past = now - w * size;
                const float* by = last - w * size;
#pragma omp simd
                for (int64_t i = at; i < end; ++i) sum[i - at] += load(past[i]) * by[i];
            }
#pragma omp simd
            for (int64_t i = at; i < end; ++i) {
                store(pre[r * size + i], sum[i - at]);
                store(y[r * size + i], sum[i - at] * sigmoid_of(sum[i - at]));
            }
        }
    }
}

// From d, the gradient of y, those of x and, a sum for each row, weight. `room` (rows x width x
// size) is for the gradients of `pre` of the last W tokens.
void minillm_conv_backward(const T* x, const float* weight, const int32_t* start, const T* pre,
                           const T* d, T* d_x, float* d_weight, float* room, int64_t rows,
                           int64_t length, int64_t size, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float *sums = d_weight + row * width * size, *ring = room + row * width * size;
        const float* last = weight + (width - 1) * size;
        for (int64_t t = length - 1; t >= 0; --t) {  // token t gets from t, t + 1, .. t + W - 1
            const int64_t r = row * length + t;
            const T *in = x + r * size, *before = pre + r * size, *grad = d + r * size;
            float* mine = ring + t % width * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) {
                const float p = load(before[i]), share = sigmoid_of(p);
                mine[i] = load(grad[i]) * share * (1.0f + p * (1.0f - share));
            }
            for (int64_t w = 0; w < width && w <= start[r]; ++w) {
                const T* past = in - w * size;
                float* sum = sums + (width - 1 - w) * size;
#pragma omp simd
                for (int64_t i = 0; i < size; ++i) sum[i] += mine[i] * load(past[i]);
            }
            for (int64_t at = 0; at < size; at += TILE) {
                const int64_t end = at + TILE < size ? at + TILE : size;
                float sum[TILE] = {};
                for (int64_t w = 0; w < width && t + w < length && w <= start[r + w]; ++w) {
                    const float *by = last - w * size, *later = ring + (t + w) % width * size;
#pragma omp simd
                    for (int64_t i = at; i < end; ++i) sum[i - at] += later[i] * by[i];
                }
#pragma omp simd
                for (int64_t i = at; i < end; ++i) store(d_x[r * size + i], sum[i - at]);
            }
        }
    }
}

// out[n] = sum over k of weight[n, k] * y[place[n, k]]
void minillm_mix(const T* y, const int64_t* place, const float* weight, T* out, int64_t tokens,
                 int64_t chosen, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t at = 0; at < size; at += TILE) {
            const int64_t end = at + TILE < size ? at + TILE : size;
            float sum[TILE] = {};
            for (int64_t k = n * chosen; k < (n + 1) * chosen; ++k) {
                const T* from = y + place[k] * size;
                const float by = weight[k];
#pragma omp simd
                for (int64_t i = at; i < end; ++i) sum[i - at] += by * load(from[i]);
            }
#pragma omp simd
            for (int64_t i = at; i < end; ++i) store(out[n * size + i], sum[i - at]);
        }
    }
}

// Gradients of y and weight; every row of y has one place.
void minillm_mix_backward(const T* y, const int64_t* place, const float* weight, const T* g, T* d_y,
                          float* d_weight, int64_t tokens, int64_t chosen, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < tokens * chosen; ++m) {
        const T *grad = g + m / chosen * size, *row = y + place[m] * size;
        T* to = d_y + place[m] * size;
        const float by = weight[m];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            store(to[i], by * load(grad[i]));
            sum += load(row[i]) * load(grad[i]);
        }
        d_weight[m] = sum;
    }
}

// y = x[i] cos[i] + x[i + half] sin[i] over the first `turned` of `size`, `sign` 1 or, to turn
// back, -1; the rest is copied. Rows are tokens x heads, `x_token` and `x_head` numbers apart; the
// tables have a row for each of `places` tokens, after which they begin again.
void minillm_rope(const T* x, const float* cos, const float* sin, T* y, int64_t tokens,
                  int64_t heads, int64_t size, int64_t turned, int64_t places, int64_t x_token,
                  int64_t x_head, int64_t sign) {
    const int64_t half = turned / 2;
    const float by = static_cast<float>(sign);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
        const float *c = cos + t % places * turned, *s = sin + t % places * turned;
        for (int64_t h = 0; h < heads; ++h) {
            const T* in = x + t * x_token + h * x_head;
            T* out = y + (t * heads + h) * size;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float a = load(in[i]), b = load(in[i + half]);
                store(out[i], a * c[i] + by * (b * s[i]));
                store(out[i + half], b * c[i + half] + by * (a * s[i + half]));
            }
            for (int64_t i = turned; i < size; ++i) out[i] = in[i];
        }
    }
}

void minillm_norm(const T* x, const float* weight, const T* gate, T* y, float* r, int64_t rows,
                  int64_t size, float eps) {
    norm(x, weight, gate, y, r, rows, size, eps);
}

void minillm_norm_wide(const float* x, const float* weight, const T* gate, T* y, float* r,
                       int64_t rows, int64_t size, float eps) {
    norm(x, weight, gate, y, r, rows, size, eps);
}

void minillm_norm_backward(const T* x, const float* weight, const T* gate, const float* r,
                           const T* g, T* d_x, float* d_weight, T* d_gate, int64_t rows,
                           int64_t size, int64_t parts) {
    norm_backward(x, weight, gate, r, g, d_x, d_weight, d_gate, rows, size, parts);
}

void minillm_norm_wide_backward(const float* x, const float* weight, const T* gate, const float* r,
                                const T* g, float* d_x, float* d_weight, T* d_gate, int64_t rows,
                                int64_t size, int64_t parts) {
    norm_backward(x, weight, gate, r, g, d_x, d_weight, d_gate, rows, size, parts);
}

}  // extern "C"
