// Matrix products for 1 to 64 activation rows at the speed of memory (ours).
//
// y[n][f] = sum_k w[f][k] x[n][k]. Weights are the large operand, so they are the 16-row side of mma.m16n8k16; activations are
// its 8-column side. Weights are packed in the order in which lanes want them (packing.py), and so that what a block needs for a
// step of 64 inputs is consecutive: one thread keeps a ring of shared-memory stages filled by bulk copies, the other warps
// multiply. A block fetches its first weights before it waits for the kernel that makes its activations (programmatic dependent
// launch), so that the memory stays busy between kernels.
//
// A group is the rows of a block, 16 for each of its warps. All groups' steps, one after another, are dealt out evenly to one
// block a multiprocessor: a block that ends inside a group adds the sums of the blocks that go on with it, in order. So the order
// of every sum depends on the weight's shape alone: a row of activations gets the same bits in any company.
//
// Activations lie in column tiles: for every 32 inputs 8 tiles of 8 rows, in each of which a lane's 8 inputs are consecutive
// (`place`).
//
// Compile-time: FORMAT (0 bf16, 1 int8, 2 fp8 e4m3, 3 int4), NT (column tiles of 8), EPILOGUE, BLOCKS (a multiprocessor has room
// for at least so many: a second one for the next kernel's early start).

typedef unsigned int u32;
typedef unsigned short u16;

#define LOGITS 0
#define RESIDUAL 1
#define GATED 2
#define QKV 3
#define PAGE 64
#define WARPS (FORMAT == 0 ? 8 : 16)  // that multiply; one more copies
#define THREADS (WARPS * 32 + 32)
#define MAX_STAGES 16

struct Args {
    const uint4 *weights;
    const uint4 *group_scales;  // int4: (scale, offset) in bf16 of 32 inputs of a row
    const float *row_scales;    // int8, fp8: [rows of w]
    const float *bias;          // [rows of w] in packed order, or null
    const u16 *x;               // [k / 32][8] column tiles of bf16
    const float *squares;       // [NT * 8][num_squares]: partial sums of squares of the un-normalised activations, or null
    void *out;                  // LOGITS: float [n][f]; RESIDUAL, GATED: column tiles; QKV: q, bf16 [n][f]
    float *out_squares;         // RESIDUAL: [n][tiles]
    u16 *k_cache, *v_cache;     // QKV: [page][kv head][64][head_dim]
    const float *rotary;        // QKV: [position][head_dim / 2][2], cosine and sine
    const int *positions;       // QKV: [n]
    const int *slots;           // QKV: [n], page * 64 + offset
    float4 *parts;              // [blocks][16][8][32]: sums that another block will add
    int *ready;                 // [blocks][16]: 1 when they are there; the reader sets it back
    float inv_width, eps;       // of the RMS norm before this product
    int k_steps;                // k / 64
    int tiles;                  // rows of w / 16
    int rows;                   // rows of x that count
    int num_squares;
    int out_stride;
    int heads, kv_heads, head_dim;
    int gelu;                   // GATED: 0 silu, 1 gelu (tanh form)
    int stages;                 // of the ring in shared memory
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

DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE u32 sub2(u32 a, u32 b) { u32 r; asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 mul2(u32 a, u32 b) { u32 r; asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 fma2(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }

// ---- formats: a lane's 16-byte words of one step (16 weight rows x 64 inputs), and their unpacking into mma operands ----

#define WORDS (FORMAT == 0 ? 4 : 2)                  // in registers
#define WEIGHT_WORDS (FORMAT == 3 ? 1 : WORDS)       // that hold weights; int4 has one of scales, shared by 4 lanes
#define WEIGHT_BYTES (WARPS * WEIGHT_WORDS * 512)    // of a block's step
#define SCALE_BYTES (FORMAT == 3 ? WARPS * 128 : 0)
#define INPUT_BYTES (NT * 1024)
#define STAGE_BYTES (WEIGHT_BYTES + SCALE_BYTES + INPUT_BYTES)

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

// Where input k of activation row n lies in column tiles.
DEVICE int place(int n, int k) { return ((k / 32) * 8 + n / 8) * 256 + ((n % 8) * 4 + k % 32 / 8) * 8 + k % 8; }

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
    u16 *out = (u16 *)p.out + place(n, tile * 16 + g);
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
    if (live) ((u16 *)p.out)[place(n, tile * 8 + g)] = to_bf16(activate(top, p.gelu) * low);
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

// ---- the ring: `full` stages hold a step's weights and activations, `empty` ones may be overwritten ----

DEVICE u32 shared(const void *p) { return (u32)__cvta_generic_to_shared(p); }

struct Barriers {
    unsigned long long full[MAX_STAGES], empty[MAX_STAGES];
    DEVICE void initialise(int stages) {
        for (int i = 0; i < stages; ++i) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(full + i)));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(empty + i)), "r"(WARPS));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
};
DEVICE void wait(const unsigned long long *barrier, int parity) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(shared(barrier)), "r"(parity) : "memory");
    } while (!done);
}
DEVICE void arrive(unsigned long long *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(barrier)) : "memory");
}
DEVICE void expect(unsigned long long *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(barrier)), "r"(bytes) : "memory");
}
DEVICE void copy(void *to, const void *from, int bytes, unsigned long long *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared(to)), "l"(from), "r"(bytes), "r"(shared(barrier)) : "memory");
}

// The copying thread: walks over the block's steps. `at` counts from the first step of the first group.
DEVICE void copy_weights(const Args &p, char *stage, unsigned long long *full, int at) {
    expect(full, STAGE_BYTES);
    copy(stage, (const char *)p.weights + (long long)at * WEIGHT_BYTES, WEIGHT_BYTES, full);
    if (SCALE_BYTES) copy(stage + WEIGHT_BYTES, (const char *)p.group_scales + (long long)at * SCALE_BYTES, SCALE_BYTES, full);
}
DEVICE void copy_inputs(const Args &p, char *stage, unsigned long long *full, int at) {
    const char *x = (const char *)p.x + at % p.k_steps * 8192;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        copy(stage + WEIGHT_BYTES + SCALE_BYTES + half * NT * 512, x + half * 4096, NT * 512, full);
}
DEVICE void feed(const Args &p, char *ring, Barriers &barriers, int from, int count) {
    const int first = min(count, p.stages);
    for (int i = 0; i < first; ++i) copy_weights(p, ring + i * STAGE_BYTES, barriers.full + i, from + i);
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = 0; i < first; ++i) copy_inputs(p, ring + i * STAGE_BYTES, barriers.full + i, from + i);
    for (int i = first, slot = 0, parity = 0; i < count; ++i) {
        wait(barriers.empty + slot, parity);
        copy_weights(p, ring + slot * STAGE_BYTES, barriers.full + slot, from + i);
        copy_inputs(p, ring + slot * STAGE_BYTES, barriers.full + slot, from + i);
        if (++slot == p.stages) slot = 0, parity ^= 1;
    }
}

// A multiplying warp's step. How the 16 inputs of an mma are numbered is free as long as both operands agree: a lane's 8
// inputs of a half are inputs 2t, 2t + 1, 2t + 8, 2t + 9 of two mma's.
DEVICE void multiply(const char *stage, int last_lane, float (&sums)[NT][4]) {
    const uint4 *weights = (const uint4 *)stage + threadIdx.x / 32 * WEIGHT_WORDS * 32 + lane_id();
    const uint4 *inputs = (const uint4 *)(stage + WEIGHT_BYTES + SCALE_BYTES);
    uint4 w[WORDS];
#pragma unroll
    for (int i = 0; i < WEIGHT_WORDS; ++i) w[i] = weights[i * 32];
#if FORMAT == 3
    w[1] = ((const uint4 *)(stage + WEIGHT_BYTES))[threadIdx.x / 32 * 8 + lane_id() / 4];
#endif
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint4 x[NT];
#pragma unroll
        for (int j = 0; j < NT; ++j) x[j] = inputs[(half * NT + j) * 32 + (j == NT - 1 ? last_lane : lane_id())];
        u32 a[4];
        operand(w, half, 0, a);
#pragma unroll
        for (int j = 0; j < NT; ++j) mma(sums[j], a, x[j].x, x[j].y);
        operand(w, half, 1, a);
#pragma unroll
        for (int j = 0; j < NT; ++j) mma(sums[j], a, x[j].z, x[j].w);
    }
}

// ---- sums of a group that several blocks share ----

DEVICE int range_start(int total, int block) { return (int)((long long)total * block / gridDim.x); }

DEVICE void publish(const Args &p, const float4 *sums) {
    const int at = blockIdx.x * 16 + threadIdx.x / 32;
    for (int j = 0; j < NT; ++j) p.parts[(at * 8 + j) * 32 + lane_id()] = sums[j * 32 + lane_id()];
    __syncwarp();
    if (lane_id() == 0) {
        __threadfence();
        asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(p.ready + at) : "memory");
    }
}

// Adds what the following blocks have summed of the group that ends at `end`, in their order.
DEVICE void collect(const Args &p, float4 *sums, int total, int end) {
    for (int block = blockIdx.x + 1; range_start(total, block) < end; ++block) {
        const int at = block * 16 + threadIdx.x / 32;
        if (lane_id() == 0) {
            int there = 0;
            while (!there) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(p.ready + at) : "memory");
        }
        __syncwarp();
        for (int j = 0; j < NT; ++j) {
            const float4 part = __ldcg(&p.parts[(at * 8 + j) * 32 + lane_id()]);
            float4 &sum = sums[j * 32 + lane_id()];
            sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
        }
        __syncwarp();
        if (lane_id() == 0) p.ready[at] = 0;
    }
}

// A warp's sums over a group's steps begin .. end - 1 are complete.
DEVICE void emit(const Args &p, int group, int begin, int end, float (&sums)[NT][4], float4 *scratch, const float *norms) {
    const int tile = group * WARPS + threadIdx.x / 32, total = (p.tiles + WARPS - 1) / WARPS * p.k_steps;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        scratch[j * 32 + lane_id()] = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
        sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.f;
    }
    if (tile >= p.tiles) return;
    if (begin > 0) return publish(p, scratch);
    if (end < p.k_steps) collect(p, scratch, total, (group + 1) * p.k_steps);
    for (int j = 0; j < NT; ++j) finish_tile(p, tile, j, scratch[j * 32 + lane_id()], norms);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) skinny(const __grid_constant__ Args p) {
    extern __shared__ __align__(128) char ring[];  // stages, then a scratch area for each warp
    __shared__ Barriers barriers;
    __shared__ float norms[NT * 8];
    const int warp = threadIdx.x / 32, total = (p.tiles + WARPS - 1) / WARPS * p.k_steps;
    const int from = range_start(total, blockIdx.x), count = range_start(total, blockIdx.x + 1) - from;
    if (threadIdx.x == 0) barriers.initialise(p.stages);
    __syncthreads();
    if (warp == WARPS) {
        if (lane_id() == 0) feed(p, ring, barriers, from, count);
        return;
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    row_norms(p, norms);
    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");

    float4 *scratch = (float4 *)(ring + p.stages * STAGE_BYTES) + warp * NT * 32;
    const int last_lane = (min((NT - 1) * 8 + (int)(lane_id() >> 2), p.rows - 1) - (NT - 1) * 8) * 4 + (lane_id() & 3);
    int group = from / p.k_steps, step = from % p.k_steps, begin = step;
    float sums[NT][4] = {};
    for (int i = 0, slot = 0, parity = 0; i < count; ++i) {
        wait(barriers.full + slot, parity);
        multiply(ring + slot * STAGE_BYTES, last_lane, sums);
        __syncwarp();
        if (lane_id() == 0) arrive(barriers.empty + slot);
        if (++slot == p.stages) slot = 0, parity ^= 1;
        if (++step == p.k_steps || i + 1 == count) {
            emit(p, group++, begin, step, sums, scratch, norms);
            begin = step = 0;
        }
    }
}

// Weights back to bf16 [rows][k], for products with many rows through the library. One warp a tile of 16 rows and 64 inputs.
extern "C" __global__ void unpack(const uint4 *weights, const uint4 *group_scales, const float *row_scales, u16 *out, int k_steps) {
    const int tile = blockIdx.y, step = blockIdx.x * 8 + threadIdx.x / 32;
    if (step >= k_steps) return;
    const long long at = ((long long)(tile / WARPS) * k_steps + step) * WARPS + tile % WARPS;
    uint4 w[WORDS];
#pragma unroll
    for (int i = 0; i < WEIGHT_WORDS; ++i) w[i] = weights[(at * WEIGHT_WORDS + i) * 32 + lane_id()];
#if FORMAT == 3
    w[1] = group_scales[at * 8 + lane_id() / 4];
#endif
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
