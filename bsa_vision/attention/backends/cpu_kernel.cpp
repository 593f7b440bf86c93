// Block-sparse attention in float32 for x86-64.
//
// Compiled once per instruction set; cpu_kernel.py picks one. Keys and values are read in place, at
// any row stride and in any token order, without a gathered copy. Logits are stored transposed,
// (keys, queries): keys and values are read as scalars only, and vectors run along the queries, of
// which one block is transposed per row of blocks. The softmax is online (arXiv 2205.14135), one
// chunk of keys at a time. Plain C functions of pointers, without torch or Python, called without
// the interpreter's lock.

#include <cmath>
#include <cstdint>

// One tensor; strides are in elements. Element d of a token is
// data[image * image_stride + head * head_stride + token * stride + d].
struct Matrix {
    float *data;                          // null: not needed
    int64_t image_stride, head_stride, stride;
};

// Images with the same number of tokens. Mirrored by cpu_kernel._Batch.
struct Batch {
    Matrix q, k, v;
    Matrix out;                           // (n_q, dim_v); an input of the gradient
    Matrix lse;                           // (n_q,)
    Matrix rel_h, rel_w;                  // (n_q, rel_rows), (n_q, rel_columns): bias of the logits
    // grad_k and grad_v are accumulated; their rows are padded to whole vectors.
    Matrix grad_out, grad_q, grad_k, grad_v, grad_rel_h, grad_rel_w;
    const int64_t *key_row, *key_column;  // (n_k,) patch coordinates of the keys, or null
    const int64_t *order_q, *order_k;     // (n,) index of each packed token; null: already packed
    const int32_t *row_start;             // (rows + 1,) first packed query of each row of blocks
    const int32_t *row_ptr;               // (mask images, heads, rows + 1) first range of each row
    const int32_t *key_ranges;            // (ranges, 2) first packed key, and one past the last
    float *scratch;                       // its size is computed in cpu_kernel.py
    int64_t heads, group, rows;           // query heads, query heads per key head, rows of blocks
    int64_t mask_image_stride;            // of row_ptr; 0: one mask for all images
    int64_t dim, dim_v, rel_rows, rel_columns;
    // Work of this call. Forward: rows of blocks over images and heads. Gradient: key heads over
    // images.
    int64_t first, last;
    float scale;
};

// One head of one image: `Batch` with the pointers resolved.
struct Attend {
    const float *q, *k, *v;
    float *out, *lse;
    const float *rel_h, *rel_w, *grad_out;
    float *grad_q, *grad_k, *grad_v, *grad_rel_h, *grad_rel_w;
    int64_t q_stride, k_stride, v_stride, out_stride, lse_stride;
    int64_t rel_h_stride, rel_w_stride, grad_out_stride;
    int64_t grad_q_stride, grad_k_stride, grad_v_stride, grad_rel_h_stride, grad_rel_w_stride;
    const int64_t *key_row, *key_column, *order_q, *order_k;
    const int32_t *row_start, *row_ptr, *key_ranges;
    float *scratch;
    int64_t dim, dim_v, rel_rows, rel_columns;
    float scale;
};

static Attend resolve(const Batch &b, int64_t image, int64_t head) {
    const auto at = [&](const Matrix &m, int64_t h) {
        return m.data ? m.data + image * m.image_stride + h * m.head_stride : nullptr;
    };
    const int64_t key_head = head / b.group;
    return {
        at(b.q, head), at(b.k, key_head), at(b.v, key_head), at(b.out, head), at(b.lse, head),
        at(b.rel_h, head), at(b.rel_w, head), at(b.grad_out, head),
        at(b.grad_q, head), at(b.grad_k, key_head), at(b.grad_v, key_head),
        at(b.grad_rel_h, head), at(b.grad_rel_w, head),
        b.q.stride, b.k.stride, b.v.stride, b.out.stride, b.lse.stride,
        b.rel_h.stride, b.rel_w.stride, b.grad_out.stride,
        b.grad_q.stride, b.grad_k.stride, b.grad_v.stride,
        b.grad_rel_h.stride, b.grad_rel_w.stride,
        b.key_row, b.key_column, b.order_q, b.order_k,
        b.row_start, b.row_ptr + image * b.mask_image_stride + head * (b.rows + 1), b.key_ranges,
        b.scratch, b.dim, b.dim_v, b.rel_rows, b.rel_columns, b.scale,
    };
}

constexpr int64_t INTERFACE = 2;
constexpr int CHUNK = 128;                 // keys per step of the online softmax
constexpr float LOG2E = 1.44269504088896341f;
constexpr float LOWEST = -3.40282347e38f;  // start of the running maximum: -inf - -inf would be NaN
// 2^f for f in [-1/2, 1/2] as 1 + f * (C1 + f * (...)). Minimax fit: relative error at most 9e-8,
// and 2^0 = 1 exactly.
constexpr float C1 = 0.6931470036506653f, C2 = 0.24022242426872253f, C3 = 0.05550733581185341f,
                C4 = 0.009671512991189957f, C5 = 0.001326472731307149f;

#if defined(__x86_64__) && defined(__GNUC__)

// A product keeps KEYS x VECTORS sums, as many as fit into the registers: KEYS keys or dims, and
// VECTORS vectors of queries.
#define TARGET __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#define LANES 16
#define KEYS 4
#define VECTORS 4
namespace avx512 {
#include "online_softmax.h"
#include "online_softmax_backward.h"
}
#undef TARGET
#undef LANES
#undef KEYS

#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define KEYS 3
namespace avx2 {
#include "online_softmax.h"
#include "online_softmax_backward.h"
}

extern "C" {
// cpu_kernel.py rejects a library with another INTERFACE. Raise it whenever the meaning of `Batch`
// or a result changes.
int64_t attend_interface() { return INTERFACE * 10000 + int64_t(sizeof(Batch)); }
void attend_avx512(const Batch *b) { avx512::attend(*b); }
void attend_avx2(const Batch *b) { avx2::attend(*b); }
void attend_gradient_avx512(const Batch *b) { avx512::attend_gradient(*b); }
void attend_gradient_avx2(const Batch *b) { avx2::attend_gradient(*b); }
}

#endif
