// Matrix products for 1 to 64 activation rows at the speed of memory (ours).
//
// y[n][f] = sum_k w[f][k] x[n][k]. Weights are the large operand, so they are the 16-row side of mma.m16n8k16 and stream once
// from memory straight into registers; activations are its 8-column side and come from the caches. Weights are packed in the
// order in which lanes want them (packing.py): every load is 16 bytes a lane and 512 consecutive bytes a warp.
//
// A block has 8 warps with 16 weight rows each. The blocks of a cluster share those 128 rows and split k; they add their sums
// through distributed shared memory, rank by rank. So the order of every sum depends on the weight's shape alone: a row of
// activations gets the same bits in any company.
//
// Kernels are chained with programmatic dependent launch: a block fetches its first weights before it waits for the kernel
// that makes its activations.
//
// Compile-time: FORMAT (0 bf16, 1 int8, 2 fp8 e4m3, 3 int4), NT (column tiles of 8), EPILOGUE, DEPTH (even; steps of k = 64 in
// flight), BLOCKS (a multiprocessor holds at least so many).

typedef unsigned int u32;
typedef unsigned short u16;

#define LOGITS 0
#define RESIDUAL 1
#define GATED 2
#define QKV 3
#define WARPS 8
#define PAGE 64

struct Args {
    const uint4 *weights;
    const uint4 *group_scales;  // int4: per 64 inputs and row pair (scale, offset) in bf16
    const float *row_scales;    // int8, fp8: [rows of w]
    const float *bias;          // [rows of w] in packed order, or null
    const u16 *x;               // [NT * 8][k] bf16
    const float *squares;       // [NT * 8][num_squares]: partial sums of squares of the un-normalised activations, or null
    void *out;                  // LOGITS: float [n][f]; RESIDUAL, GATED: bf16 [n][f]; QKV: q, bf16 [n][f]
    float *out_squares;         // RESIDUAL: [n][tiles]
    u16 *k_cache, *v_cache;     // QKV: [page][kv head][64][head_dim]
    const float *rotary;        // QKV: [position][head_dim / 2][2], cosine and sine
    const int *positions;       // QKV: [n]
    const int *slots;           // QKV: [n], page * 64 + offset
    float inv_width, eps;       // of the RMS norm before this product
    int k_steps;                // k / 64
    int tiles;                  // rows of w / 16
    int rows;                   // rows of x that count
    int num_squares;
    int out_stride;
    int heads, kv_heads, head_dim;
    int gelu;                   // GATED: 0 silu, 1 gelu (tanh form)
    int prefetch;               // 4 KiB pieces that a warp asks the second-level cache for, ahead of time
};

#define DEVICE __device__ __forceinline__

DEVICE u32 lane_id() { return threadIdx.x & 31; }
DEVICE float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }

DEVICE u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE u16 to_bf16(float v) { return (u16)pack_bf16(v, 0.f); }

DEVICE void stream_if(bool wanted, const uint4 *p, uint4 &v) {
    asm volatile("{ .reg .pred w;\nsetp.ne.b32 w, %5, 0;\n@w ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"((int)wanted));
}

DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE u32 sub2(u32 a, u32 b) { u32 r; asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 mul2(u32 a, u32 b) { u32 r; asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 fma2(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }

// ---- formats: words of one step (16 weight rows x 64 inputs) of a lane, and their unpacking into mma operands ----

// WORDS: 16-byte words of a lane; WEIGHT_WORDS: those that hold weights (int4: one, and one of scales).
#if FORMAT == 0
#define WORDS 4
#define WEIGHT_WORDS 4
#else
#define WORDS 2
#define WEIGHT_WORDS (FORMAT == 3 ? 1 : 2)
#endif

// A constant that stays in a register: lop3 takes one immediate, and the compiler would load the other one each time. The
// blocks are one-dimensional, but it cannot know that threadIdx.y is 0.
DEVICE u32 held(u32 value) { return value | threadIdx.y; }

#if FORMAT == 1
// Bytes 0 and 2 of a word. 0x4300 | m is the bf16 number 128 + m for m < 128, and 0x4380 is 256: (128 + low bits) - (128 or 256).
DEVICE u32 widen(u32 v) { return sub2((v & held(0x007f007fu)) | 0x43004300u, (v & held(0x00800080u)) | 0x43004300u); }
#elif FORMAT == 2
// e4m3 in the upper bytes of both halves: exponent and mantissa move to bf16's places, 2^120 mends the exponent's bias.
DEVICE u32 widen(u32 v) { return mul2((v & held(0x80008000u)) | ((v >> 4) & 0x07f007f0u), 0x7b807b80u); }
#endif

// half: which 32 inputs; step: which 16 of them.
DEVICE void operand(const uint4 (&w)[WORDS], int half, int step, u32 (&a)[4]) {
#if FORMAT == 0
    const uint4 top = w[2 * half], low = w[2 * half + 1];
    a[0] = step ? top.z : top.x;
    a[1] = step ? low.z : low.x;
    a[2] = step ? top.w : top.y;
    a[3] = step ? low.w : low.y;
#elif FORMAT == 1
    const u32 top = step ? w[half].y : w[half].x, low = step ? w[half].w : w[half].z;
    a[0] = widen(top);
    a[1] = widen(low);
    a[2] = widen(top >> 8);
    a[3] = widen(low >> 8);
#elif FORMAT == 2
    const u32 top = step ? w[half].y : w[half].x, low = step ? w[half].w : w[half].z;
    a[0] = widen(top << 8);
    a[1] = widen(low << 8);
    a[2] = widen(top);
    a[3] = widen(low);
#else
    const u32 top = half ? w[0].z : w[0].x, low = half ? w[0].w : w[0].y;
    const u32 top_scale = half ? w[1].z : w[1].x, low_scale = half ? w[1].w : w[1].y;
    const u32 ts = __byte_perm(top_scale, 0, 0x1010), to = __byte_perm(top_scale, 0, 0x3232);
    const u32 ls = __byte_perm(low_scale, 0, 0x1010), lo = __byte_perm(low_scale, 0, 0x3232);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int shift = 4 * (2 * step + i);
        const u32 t = sub2(((top >> shift) & held(0x000f000fu)) | 0x43004300u, 0x43004300u);
        const u32 l = sub2(((low >> shift) & held(0x000f000fu)) | 0x43004300u, 0x43004300u);
        a[2 * i] = fma2(t, ts, to);
        a[2 * i + 1] = fma2(l, ls, lo);
    }
#endif
}

struct Stream {
    const uint4 *weights, *scales;
    DEVICE void load(uint4 (&w)[WORDS], int step, bool wanted) const {
#if FORMAT == 3
        stream_if(wanted, weights + step * 32, w[0]);
        stream_if(wanted, scales + step * 8, w[1]);
#else
#pragma unroll
        for (int i = 0; i < WORDS; ++i) stream_if(wanted, weights + (step * WORDS + i) * 32, w[i]);
#endif
    }
};

// Asks the second-level cache for what follows the steps that are already on their way.
DEVICE void prefetch_behind(const Stream &source, int count, int pieces) {
    const char *start = (const char *)(source.weights - lane_id()), *end = start + (long long)count * WEIGHT_WORDS * 512;
    const char *ahead = start + DEPTH * WEIGHT_WORDS * 512 + lane_id() * 128;
    for (int i = 0; i < pieces; ++i, ahead += 4096)
        if (ahead < end) asm volatile("prefetch.global.L2 [%0];" ::"l"(ahead));
}

// ---- what becomes of the sums: c[0], c[1] are weight row g, columns n and n + 1; c[2], c[3] weight row g + 8 ----

DEVICE float activate(float v, int gelu) {
    if (gelu) {
        const float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
        return v / (1.f + __expf(-2.f * u));
    }
    return v / (1.f + __expf(-v));
}

DEVICE void finish(const Args &p, int tile, int n, float top, float low, float norm) {
    const int g = lane_id() >> 2;
    const bool live = n < p.rows;
#if FORMAT == 1 || FORMAT == 2
    top *= p.row_scales[tile * 16 + g];
    low *= p.row_scales[tile * 16 + g + 8];
#endif
    top *= norm;
    low *= norm;
    if (p.bias) {
        top += p.bias[tile * 16 + g];
        low += p.bias[tile * 16 + g + 8];
    }
#if EPILOGUE == LOGITS
    if (live) {
        float *out = (float *)p.out + (long long)n * p.out_stride + tile * 16 + g;
        out[0] = top;
        out[8] = low;
    }
#elif EPILOGUE == RESIDUAL
    u16 *out = (u16 *)p.out + (long long)n * p.out_stride + tile * 16 + g;
    float square = 0.f;
    if (live) {
        const u16 a = to_bf16(from_bf16(out[0]) + top), b = to_bf16(from_bf16(out[8]) + low);
        out[0] = a;
        out[8] = b;
        square = from_bf16(a) * from_bf16(a) + from_bf16(b) * from_bf16(b);
    }
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) square += __shfl_xor_sync(0xffffffffu, square, distance);
    if (live && g == 0) p.out_squares[n * p.tiles + tile] = square;
#elif EPILOGUE == GATED
    if (live) ((u16 *)p.out)[(long long)n * p.out_stride + tile * 8 + g] = to_bf16(activate(top, p.gelu) * low);
#else
    if (!live) return;
    const int half = p.head_dim / 2, per_head = p.head_dim / 16;
    const int head = tile / per_head, d = (tile % per_head) * 8 + g;
    if (head < p.heads + p.kv_heads) {
        const float *turn = p.rotary + ((long long)p.positions[n] * half + d) * 2;
        const float a = top * turn[0] - low * turn[1];
        low = low * turn[0] + top * turn[1];
        top = a;
    }
    u16 *out;
    if (head < p.heads) {
        out = (u16 *)p.out + (long long)n * p.out_stride + head * p.head_dim;
    } else {
        const bool value = head >= p.heads + p.kv_heads;
        const int h = head - p.heads - (value ? p.kv_heads : 0), slot = p.slots[n];
        out = (value ? p.v_cache : p.k_cache);
        out += (((long long)(slot / PAGE) * p.kv_heads + h) * PAGE + slot % PAGE) * p.head_dim;
    }
    out[d] = to_bf16(top);
    out[d + half] = to_bf16(low);
#endif
}

DEVICE void finish_tile(const Args &p, int tile, int column, float4 c, const float *norms) {
    const int n = column * 8 + (lane_id() & 3) * 2;
    finish(p, tile, n, c.x, c.z, norms[n]);
    finish(p, tile, n + 1, c.y, c.w, norms[n + 1]);
}

// norms[n] = 1 / rms of activation row n (1 without a norm); each row is summed by one warp in a fixed order.
DEVICE void row_norms(const Args &p, float *norms) {
    for (int n = threadIdx.x / 32; n < NT * 8; n += WARPS) {
        float sum = 0.f;
        if (p.squares && n < p.rows)
            for (int i = lane_id(); i < p.num_squares; i += 32) sum += p.squares[n * p.num_squares + i];
#pragma unroll
        for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane_id() == 0) norms[n] = p.squares ? rsqrtf(sum * p.inv_width + p.eps) : 1.f;
    }
}

DEVICE u32 cluster_rank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE u32 cluster_size() { u32 r; asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE float4 peer(const float4 *p, u32 rank) {
    float4 v;
    asm volatile("{ .reg .u32 a;\nmapa.shared::cluster.u32 a, %4, %5;\nld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [a]; }"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"((u32)__cvta_generic_to_shared(p)), "r"(rank) : "memory");
    return v;
}

// Activations of one step: 8 consecutive inputs of row g (and g + 8, ...) for each of the two halves. How the 16 inputs of an
// mma are numbered is free as long as both operands agree: a lane's 8 are inputs 2t, 2t + 1, 2t + 8, 2t + 9 of two mma's.
struct Activations {
    uint4 words[2][NT];
    DEVICE void load(const Args &p, int step, int half) {
        const int g = lane_id() >> 2, width = p.k_steps * 64;
        const u16 *x = p.x + step * 64 + half * 32 + (lane_id() & 3) * 8;
#pragma unroll
        for (int j = 0; j < NT; ++j)  // columns past the last row repeat it: their sums are not used
            words[half][j] = *(const uint4 *)(x + min(j * 8 + g, p.rows - 1) * width);
    }
};

DEVICE void multiply(const uint4 (&w)[WORDS], const Activations &x, int half, float (&sums)[NT][4]) {
    u32 a[4];
    operand(w, half, 0, a);
#pragma unroll
    for (int j = 0; j < NT; ++j) mma(sums[j], a, x.words[half][j].x, x.words[half][j].y);
    operand(w, half, 1, a);
#pragma unroll
    for (int j = 0; j < NT; ++j) mma(sums[j], a, x.words[half][j].z, x.words[half][j].w);
}

// One step; with few columns there are registers to fetch the next step's activations before they are needed.
#define AHEAD (NT <= 2)
DEVICE void advance(const Args &p, const uint4 (&w)[WORDS], Activations (&x)[2], int d, int step, int end, float (&sums)[NT][4]) {
    Activations &now = x[AHEAD ? d & 1 : 0], &next = x[1 - (d & 1)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (AHEAD)
            next.load(p, min(step + 1, end - 1), half);
        else
            now.load(p, step, half);
        if (!AHEAD) multiply(w, now, half, sums);
    }
    if (AHEAD) {
        multiply(w, now, 0, sums);
        multiply(w, now, 1, sums);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) skinny(const __grid_constant__ Args p) {
    __shared__ float4 partial[WARPS][NT][32];
    __shared__ float norms[NT * 8];
    const u32 warp = threadIdx.x / 32, rank = cluster_rank(), ranks = cluster_size();
    const int first_tile = blockIdx.x / ranks * WARPS, tile = first_tile + warp;
    const int from = (int)((long long)p.k_steps * rank / ranks), upto = (int)((long long)p.k_steps * (rank + 1) / ranks);
    const int count = tile < p.tiles ? upto - from : 0;

    Stream source;
    source.weights = p.weights + ((long long)tile * p.k_steps + from) * WEIGHT_WORDS * 32 + lane_id();
    source.scales = p.group_scales + ((long long)tile * p.k_steps + from) * 8 + (lane_id() >> 2);
    uint4 ring[DEPTH][WORDS] = {};
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) source.load(ring[d], d, d < count);
    prefetch_behind(source, count, p.prefetch);
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");

    row_norms(p, norms);
    float sums[NT][4] = {};
    Activations x[2];
    if (AHEAD && count)
#pragma unroll
        for (int half = 0; half < 2; ++half) x[0].load(p, from, half);
    int i = 0;
    for (; i + DEPTH <= count; i += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            advance(p, ring[d], x, d, from + i + d, from + count, sums);
            source.load(ring[d], i + d + DEPTH, i + d + DEPTH < count);
        }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (i + d < count) advance(p, ring[d], x, d, from + i + d, from + count, sums);

    if (ranks == 1) {
        __syncthreads();
        if (tile < p.tiles)
#pragma unroll
            for (int j = 0; j < NT; ++j) finish_tile(p, tile, j, make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]), norms);
        return;
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) partial[warp][j][lane_id()] = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
    cluster_barrier();
    // The ranks share the finishing of the 8 tiles' columns.
    for (int item = rank + ranks * warp; item < WARPS * NT; item += ranks * WARPS) {
        const int owner = item / NT, j = item % NT;
        if (first_tile + owner >= p.tiles) continue;
        float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
        for (u32 r = 0; r < ranks; ++r) {
            const float4 part = peer(&partial[owner][j][lane_id()], r);
            total.x += part.x;
            total.y += part.y;
            total.z += part.z;
            total.w += part.w;
        }
        finish_tile(p, first_tile + owner, j, total, norms);
    }
    cluster_barrier();
}

// Weights back to bf16 [rows][k], for products with many rows through the library. One warp a tile of 16 rows and 64 inputs.
extern "C" __global__ void unpack(const uint4 *weights, const uint4 *group_scales, const float *row_scales, u16 *out, int k_steps) {
    const int tile = blockIdx.y, step = blockIdx.x * WARPS + threadIdx.x / 32;
    if (step >= k_steps) return;
    const long long at = (long long)tile * k_steps + step;
    Stream source;
    source.weights = weights + at * WEIGHT_WORDS * 32 + lane_id();
    source.scales = group_scales + at * 8 + (lane_id() >> 2);
    uint4 w[WORDS] = {};
    source.load(w, 0, true);
    const int g = lane_id() >> 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 a[2][4];
        operand(w, half, 0, a[0]);
        operand(w, half, 1, a[1]);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            u32 v[4] = {a[0][row], a[0][row + 2], a[1][row], a[1][row + 2]};
#if FORMAT == 1 || FORMAT == 2
            const float scale = row_scales[tile * 16 + g + 8 * row];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                v[i] = pack_bf16(__uint_as_float(v[i] << 16) * scale, __uint_as_float(v[i] & 0xffff0000u) * scale);
#endif
            u16 *to = out + ((long long)(tile * 16 + g + 8 * row) * k_steps + step) * 64 + half * 32 + (lane_id() & 3) * 8;
            *(uint4 *)to = make_uint4(v[0], v[1], v[2], v[3]);
        }
    }
}
