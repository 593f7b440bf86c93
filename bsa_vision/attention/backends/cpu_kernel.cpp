// Block-sparse attention in float32, for x86-64: compiled once per instruction set, chosen by cpu_kernel.py.
//
// Keys and values are read where they lie, at any row stride and in any token order; nothing is copied together first.
// Logits are kept transposed, (keys, queries): then keys and values are only ever read as scalars, while vectors run along
// the queries, of which one block is transposed per row of blocks. Softmax is online (arXiv 2205.14135), per chunk of keys.
// No torch, no Python: plain C functions of pointers, called without the interpreter's lock.

#include <cmath>
#include <cstdint>

// One tensor: element d of a token at data[image * image_stride + head * head_stride + token * stride + d]; strides in elements.
struct Matrix {
    float *data;                         // null: not asked for
    int64_t image_stride, head_stride, stride;
};

// A batch of images with as many tokens each. Mirrored by cpu_kernel._Batch.
struct Batch {
    Matrix q, k, v;
    Matrix out;                          // (n_q, dim_v); read for gradients
    Matrix lse;                          // (n_q,)
    Matrix rel_h, rel_w;                 // (n_q, rel_rows), (n_q, rel_columns): added to the logits
    Matrix grad_out, grad_q, grad_k, grad_v, grad_rel_h, grad_rel_w;  // grad_k, grad_v: added to, rows of whole vectors
    const int64_t *key_row, *key_column; // (n_k,) patch coordinates of the keys, or null
    const int64_t *order_q, *order_k;    // index of each packed token; null: tokens as they come
    const int32_t *row_start;               // (rows + 1,) first packed query of each row of blocks
    const int32_t *row_ptr;               // (mask images, heads, rows + 1) first run of each row
    const int32_t *key_ranges;                 // (runs, 2) first and one past the last packed key
    float *scratch;                      // see cpu_kernel.py for how much
    int64_t heads, group, rows;          // query heads, query heads per key head, rows of blocks
    int64_t mask_image_stride;           // of run_at; 0: one mask for all images
    int64_t dim, dim_v, rel_rows, rel_columns;
    int64_t first, last;                 // forward: rows of blocks over images and heads; gradients: key heads over images
    float scale;
};

// One head of one image: `Batch` with the pointers resolved.
struct Attend {
    const float *q, *k, *v;
    float *out, *lse;
    const float *rel_h, *rel_w, *grad_out;
    float *grad_q, *grad_k, *grad_v, *grad_rel_h, *grad_rel_w;
    int64_t q_stride, k_stride, v_stride, out_stride, lse_stride, rel_h_stride, rel_w_stride, grad_out_stride;
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
        at(b.q, head), at(b.k, key_head), at(b.v, key_head), at(b.out, head), at(b.lse, head), at(b.rel_h, head),
        at(b.rel_w, head), at(b.grad_out, head), at(b.grad_q, head), at(b.grad_k, key_head), at(b.grad_v, key_head),
        at(b.grad_rel_h, head), at(b.grad_rel_w, head),
        b.q.stride, b.k.stride, b.v.stride, b.out.stride, b.lse.stride, b.rel_h.stride, b.rel_w.stride, b.grad_out.stride,
        b.grad_q.stride, b.grad_k.stride, b.grad_v.stride, b.grad_rel_h.stride, b.grad_rel_w.stride,
        b.key_row, b.key_column, b.order_q, b.order_k,
        b.row_start, b.row_ptr + image * b.mask_image_stride + head * (b.rows + 1), b.key_ranges,
        b.scratch, b.dim, b.dim_v, b.rel_rows, b.rel_columns, b.scale,
    };
}

constexpr int64_t INTERFACE = 2;
constexpr int CHUNK = 128;               // keys per step of the online softmax
constexpr float LOG2E = 1.44269504088896341f;
constexpr float LOWEST = -3.40282347e38f;  // the lowest number: a maximum of -inf would make NaN of its differences
// 2^f for f in [-1/2, 1/2] as 1 + f * (C1 + f * (...)): least maximal relative error, 9e-8, with 2^0 = 1 exactly.
constexpr float C1 = 0.6931470036506653f, C2 = 0.24022242426872253f, C3 = 0.05550733581185341f,
                C4 = 0.009671512991189957f, C5 = 0.001326472731307149f;

#if defined(__x86_64__) && defined(__GNUC__)

#define TARGET __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#define LANES 16
#define KEYS 4    // keys, or dims, per step of a product, and vectors of queries: as many sums as fit the registers
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
// cpu_kernel.py refuses a library of another INTERFACE: raise it whenever the meaning of `Batch`, or a result, changes.
int64_t attend_interface() { return INTERFACE * 10000 + int64_t(sizeof(Batch)); }
void attend_avx512(const Batch *b) { avx512::attend(*b); }
void attend_avx2(const Batch *b) { avx2::attend(*b); }
void attend_gradient_avx512(const Batch *b) { avx512::attend_gradient(*b); }
void attend_gradient_avx2(const Batch *b) { avx2::attend_gradient(*b); }
}

#endif
