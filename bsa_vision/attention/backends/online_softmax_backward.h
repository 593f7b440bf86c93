// Gradient for one instruction set; continues online_softmax.h. Recomputes the softmax of every
// block.

// State of the gradient of one row of blocks, besides `Row`.
struct GradientRow {
    float *grad_out, *grad_q;         // transposed, (dim_v, width) and (dim, width)
    // Rows for the sums over queries, (width, dim) and (width, dim_v), padded to whole vectors.
    float *q_rows, *grad_out_rows;
    float *delta;                     // (width,) grad_out . out
    float *grad_rel_h, *grad_rel_w;   // transposed, (rel_rows, width), (rel_columns, width)
    float *probs, *grad_logits;       // (CHUNK, width)
};

INLINE int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

// Like `transpose` without transposing: (count, dim) -> (width, padded dim), padded with 0.
INLINE void copy_rows(const Attend &a, const Row &row, const float *from, int64_t stride,
                      int64_t dim, float scale, float *to) {
    const int64_t size = padded(dim);
    for (int64_t i = 0; i < row.width; i++) {
        const float *x = i < row.count ? from + token(a.order_q, row.start + i) * stride : nullptr;
        for (int64_t d = 0; d < size; d++) to[i * size + d] = x && d < dim ? x[d] * scale : 0;
    }
}

INLINE GradientRow load_gradient_row(const Attend &a, const Row &row) {
    GradientRow g;
    g.grad_out = row.probs + CHUNK * VECTORS * LANES;
    g.grad_q = g.grad_out + a.dim_v * row.width;
    g.q_rows = g.grad_q + a.dim * row.width;
    g.grad_out_rows = g.q_rows + row.width * padded(a.dim);
    g.delta = g.grad_out_rows + row.width * padded(a.dim_v);
    g.grad_rel_h = g.delta + row.width;
    g.grad_rel_w = g.grad_rel_h + a.rel_rows * row.width;
    g.probs = g.grad_rel_w + a.rel_columns * row.width;
    g.grad_logits = g.probs + CHUNK * row.width;
    transpose(a, row, a.grad_out, a.grad_out_stride, a.dim_v, 1, g.grad_out);
    copy_rows(a, row, a.grad_out, a.grad_out_stride, a.dim_v, 1, g.grad_out_rows);
    copy_rows(a, row, a.q, a.q_stride, a.dim, a.scale, g.q_rows);
    for (int64_t i = 0; i < row.width; i++) {
        g.delta[i] = 0;
        if (i >= row.count) continue;
        const float *out = a.out + token(a.order_q, row.start + i) * a.out_stride;
        const float *grad = g.grad_out_rows + i * padded(a.dim_v);
        for (int64_t d = 0; d < a.dim_v; d++) g.delta[i] += out[d] * grad[d];
    }
    for (int64_t i = 0; i < a.dim * row.width; i++) g.grad_q[i] = 0;
    for (int64_t i = 0; i < (a.rel_rows + a.rel_columns) * row.width; i++) g.grad_rel_h[i] = 0;
    return g;
}

// Update row maximum and row sum for one chunk of keys, as `attend_chunk` does, without the values.
template <int V>
INLINE void update_softmax(const Attend &a, const Chunk &chunk, const Row &row, int64_t i) {
    Vec m[V], l[V] = {};
    chunk_logits<V>(a, chunk, row, i, m);
    for (int n = 0; n < V; n++) m[n] = larger(m[n], load(row.m + i + n * LANES));
    for (int64_t j = 0; j < chunk.count; j++)
        for (int n = 0; n < V; n++) l[n] += exp(load(row.probs + (j * V + n) * LANES) - m[n]);
    for (int n = 0; n < V; n++) {
        float *at = row.l + i + n * LANES;
        const Vec alpha = exp(load(row.m + i + n * LANES) - m[n]);
        store(at, load(at) * alpha + l[n]);
        store(row.m + i + n * LANES, m[n]);
    }
}

// Clear q and grad_out of queries without keys: they may hold infinity, and 0 * inf would be NaN.
INLINE void clear_empty_queries(const Attend &a, const Row &row, const GradientRow &g) {
    const int64_t dim = padded(a.dim), dim_v = padded(a.dim_v);
    for (int64_t i = 0; i < row.count; i++) {
        if (row.l[i] != 0) continue;
        for (int64_t d = 0; d < dim; d++) g.q_rows[i * dim + d] = 0;
        for (int64_t d = 0; d < dim_v; d++) g.grad_out_rows[i * dim_v + d] = 0;
    }
}

// probs[j][i], and grad_logits[j][i] = probs[j][i] * (v_j . grad_out_i - delta_i), for N keys from
// j on and V vectors of queries from i on.
template <int N, int V>
INLINE void differentiate(const Attend &a, const Chunk &chunk, const Row &row, const GradientRow &g,
                          int64_t j, int64_t i) {
    Vec unused[V] = {}, sums[N][V] = {};
    logits<N, V>(a, chunk, j, row, i, g.probs + i, row.width, unused);
    multiply<N, V>(sums, chunk.values + j, g.grad_out + i, row.width, a.dim_v);
    for (int r = 0; r < N; r++)
        for (int n = 0; n < V; n++) {
            const int64_t at = i + n * LANES;
            float *prob = g.probs + (j + r) * row.width + at;
            float *grad = g.grad_logits + (j + r) * row.width + at;
            const Vec l = load(row.l + at), p = exp(load(prob) - load(row.m + at)) / l;
            store(prob, l == 0 ? Vec{} : p);
            store(grad, l == 0 ? Vec{} : p * (sums[r][n] - load(g.delta + at)));
        }
}

// All keys of a chunk: their probs and grad_logits, and their part of grad_q.
template <int V>
INLINE void differentiate(const Attend &a, const Chunk &chunk, const Row &row, const GradientRow &g,
                          int64_t i) {
    int64_t j = 0, d = 0;
    for (; j + KEYS <= chunk.count; j += KEYS) differentiate<KEYS, V>(a, chunk, row, g, j, i);
    for (; j < chunk.count; j++) differentiate<1, V>(a, chunk, row, g, j, i);
    Vec one[V];
    for (int n = 0; n < V; n++) one[n] = splat(1);
    for (; d + KEYS <= a.dim; d += KEYS)
        accumulate_pv<KEYS, V>(chunk.keys, chunk.count, d, g.grad_logits + i, row.width,
                               g.grad_q + i, row.width, one);
    for (; d < a.dim; d++)
        accumulate_pv<1, V>(chunk.keys, chunk.count, d, g.grad_logits + i, row.width,
                            g.grad_q + i, row.width, one);
}

// grad[t][d] += sum over i of weights[j][i] * rows[i][d], for N keys (tokens t) from j on and V
// vectors of dims from d on.
template <int N, int V>
INLINE void collect(const int64_t *tokens, int64_t j, const float *weights, const Row &row,
                    const float *rows, int64_t d, int64_t dim, float *grad, int64_t stride) {
    Vec sums[N][V] = {};
    const float *weight[N];
    for (int r = 0; r < N; r++) weight[r] = weights + (j + r) * row.width;
    multiply<N, V>(sums, weight, rows + d, padded(dim), row.count);
    for (int r = 0; r < N; r++)
        for (int n = 0; n < V; n++) {
            float *at = grad + tokens[j + r] * stride + d + n * LANES;
            store(at, load(at) + sums[r][n]);
        }
}

template <int N>
INLINE void collect(const int64_t *tokens, int64_t j, const float *weights, const Row &row,
                    const float *rows, int64_t dim, float *grad, int64_t stride) {
    int64_t d = 0;
    for (; d + VECTORS * LANES <= padded(dim); d += VECTORS * LANES)
        collect<N, VECTORS>(tokens, j, weights, row, rows, d, dim, grad, stride);
    for (; d < dim; d += LANES) collect<N, 1>(tokens, j, weights, row, rows, d, dim, grad, stride);
}

INLINE void collect(const Chunk &chunk, const float *weights, const Row &row, const float *rows,
                    int64_t dim, float *grad, int64_t stride) {
    int64_t j = 0;
    for (; j + KEYS <= chunk.count; j += KEYS)
        collect<KEYS>(chunk.tokens, j, weights, row, rows, dim, grad, stride);
    for (; j < chunk.count; j++)
        collect<1>(chunk.tokens, j, weights, row, rows, dim, grad, stride);
}

INLINE void collect_rel(const Attend &a, const Chunk &chunk, const Row &row, const GradientRow &g) {
    for (int64_t j = 0; j < chunk.count; j++) {
        const float *from = g.grad_logits + j * row.width;
        float *to_h = g.grad_rel_h + a.key_row[chunk.tokens[j]] * row.width;
        float *to_w = g.grad_rel_w + a.key_column[chunk.tokens[j]] * row.width;
        for (int64_t i = 0; i < row.width; i += LANES) {
            store(to_h + i, load(to_h + i) + load(from + i));
            store(to_w + i, load(to_w + i) + load(from + i));
        }
    }
}

// (dim, width), times `scale` -> (count, dim) rows of `to`; 0 for queries without keys.
INLINE void untranspose(const Attend &a, const Row &row, const float *from, int64_t dim,
                        float scale, float *to, int64_t stride) {
    for (int64_t i = 0; i < row.count; i++) {
        float *x = to + token(a.order_q, row.start + i) * stride;
        for (int64_t d = 0; d < dim; d++)
            x[d] = row.l[i] == 0 ? 0 : from[d * row.width + i] * scale;
    }
}

#define BY_WIDTH(call)                                                                             \
    for (int64_t i = 0; i < row.width;) {                                                          \
        if (i + VECTORS * LANES <= row.width) { constexpr int V = VECTORS; call; i += V * LANES; } \
        else { constexpr int V = 1; call; i += LANES; }                                            \
    }

// All rows of blocks of one head.
TARGET static void attend_gradient(const Attend &a, int64_t rows) {
    Chunk chunk;
    for (int64_t number = 0; number < rows; number++) {
        const int64_t begin = a.row_ptr[number], end = a.row_ptr[number + 1];
        if (begin == end) continue;
        int64_t range = begin, key = a.key_ranges[2 * begin];
        const Row row = load_row(a, number);
        const GradientRow g = load_gradient_row(a, row);
        while (range < end) {
            gather_chunk(a, row, range, end, key, chunk);
            BY_WIDTH(update_softmax<V>(a, chunk, row, i))
        }
        clear_empty_queries(a, row, g);
        range = begin, key = a.key_ranges[2 * begin];
        while (range < end) {
            gather_chunk(a, row, range, end, key, chunk);
            BY_WIDTH(differentiate<V>(a, chunk, row, g, i))
            collect(chunk, g.probs, row, g.grad_out_rows, a.dim_v, a.grad_v, a.grad_v_stride);
            collect(chunk, g.grad_logits, row, g.q_rows, a.dim, a.grad_k, a.grad_k_stride);
            if (a.rel_h) collect_rel(a, chunk, row, g);
        }
        untranspose(a, row, g.grad_q, a.dim, a.scale, a.grad_q, a.grad_q_stride);
        if (a.rel_h) {
            untranspose(a, row, g.grad_rel_h, a.rel_rows, 1, a.grad_rel_h, a.grad_rel_h_stride);
            untranspose(a, row, g.grad_rel_w, a.rel_columns, 1, a.grad_rel_w, a.grad_rel_w_stride);
        }
    }
}

#undef BY_WIDTH

// The query heads of a group accumulate into the same keys, so they run one after the other.
static void attend_gradient(const Batch &b) {
    const int64_t key_heads = b.heads / b.group;
    for (int64_t unit = b.first; unit < b.last; unit++)
        for (int64_t member = 0; member < b.group; member++) {
            const int64_t head = unit % key_heads * b.group + member;
            attend_gradient(resolve(b, unit / key_heads, head), b.rows);
        }
}
