// Matrix products for 1 to 64 activation rows at the speed of memory (ours).
//
// y[n][f] = sum_k w[f][k] x[n][k]. Weights are the large operand, so they are the 16-row side of mma.m16n8k16; activations are
// its 8-column side. Weights are packed in the order in which lanes want them (packing.py), and so that what a block needs for a
// step of 64 inputs is consecutive: two threads keep a ring of shared-memory stages filled by bulk copies, one with weights, one
// with activations, and the other warps multiply. A block fetches its first weights before it waits for the kernel that makes its activations (programmatic dependent
// launch), so that the memory stays busy between kernels.
//
// A group is the rows of a block, 16 for each of its warps. All groups' stages, one after another, are dealt out evenly to one
// block a multiprocessor: a block that ends inside a group adds the sums of the blocks that go on with it, in order. So the order
// of every sum depends on the weight's shape alone: a row of activations gets the same bits in any company.
//
// Activations lie in column tiles: for every step 8 tiles of 8 rows, in each of which the 8 inputs of a lane's half step are
// consecutive (`place`).
//
// Compile-time: FORMAT (0 bf16, 1 int8, 2 fp8 e4m3, 3 int4), NT (column tiles of 8), EPILOGUE, STEPS (steps of a stage: 1 or 2).

typedef unsigned int u32;
typedef unsigned short u16;

#define LOGITS 0
#define RESIDUAL 1
#define GATED 2
#define QKV 3
#define PAGE 64
#define WARPS (FORMAT == 0 ? 8 : 16)  // that multiply; two more copy, a few prepare the norms
#define NORM_WARPS (FORMAT == 0 ? 4 : 2)
#define THREADS ((WARPS + 2 + NORM_WARPS) * 32)
#define SUBSETS 32  // of the partial sums of squares
#define MAX_STAGES 16

struct Args {
    const char *weights;        // int4: a step's words, then its (scale, offset) pairs in bf16, one for 32 inputs of a row
    const float *row_scales;    // int8, fp8: [rows of w]
    const float *bias;          // [rows of w] in packed order, or null
    const char *x;              // column tiles of bf16
    const float *squares;       // [num_squares][64]: partial sums of squares of the un-normalised activations, or null
    void *out;                  // LOGITS: float [n][f]; RESIDUAL, GATED: column tiles; QKV: q, bf16 [n][f]
    float *out_squares;         // RESIDUAL: [tiles][64]
    u16 *k_cache, *v_cache;     // QKV: [page][kv head][64][head_dim]
    const float *rotary;        // QKV: [position][head_dim / 2][2], cosine and sine
    const int *positions;       // QKV: [n]
    const int *slots;           // QKV: [n], page * 64 + offset
    uint4 *parts;               // [blocks][16][8][32]: sums that another block will add; EMPTY until they are there
    float inv_width, eps;       // of the RMS norm before this product
    int k_steps;                // k / 64, a multiple of STEPS
    int tiles;                  // rows of w / 16
    int rows;                   // rows of x that count
    int num_squares;
    int out_stride;
    int heads, kv_heads, head_dim;
    int gelu;                   // GATED: 0 silu, 1 gelu (tanh form)
    int stages;                 // of the ring in shared memory
    u32 exponent;               // EXPONENT
    int ahead_units, ahead_unit_bytes, ahead_bytes;
    const char *ahead;          // the weights of a later product that the second-level cache is asked for, or null
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
#define WORD_BYTES (WARPS * WEIGHT_WORDS * 512)      // of a block's step
#define WEIGHT_BYTES (WORD_BYTES + (FORMAT == 3 ? WARPS * 128 : 0))
#define INPUT_BYTES (NT * 1024)
#define STAGE_BYTES (STEPS * (WEIGHT_BYTES + INPUT_BYTES))
#define EXPONENT (FORMAT == 3 ? 0x41804180u : 0x43004300u)

#if FORMAT == 1
// Bytes 0 and 2 of a word. 0x4300 | m is the bf16 number 128 + m for m < 128, and 0x4380 is 256: (128 + low bits) - (128 or 256).
// The exponent comes with the arguments: as a literal it would be loaded into a register each time.
DEVICE u32 widen(u32 v, u32 exponent) { return sub2((v & 0x007f007fu) | exponent, (v & 0x00800080u) | exponent); }
#elif FORMAT == 2
// e4m3 in the upper bytes of both halves: exponent and mantissa move to bf16's places, 2^120 mends the exponent's bias.
DEVICE u32 widen(u32 v, u32) { return mul2((v & 0x80008000u) | ((v >> 4) & 0x07f007f0u), 0x7b807b80u); }
#endif

// half: which 32 inputs; step: which 16 of them.
DEVICE void operand(const uint4 (&w)[WORDS], int half, int step, u32 exponent, u32 (&a)[4]) {
#if FORMAT == 0
    const uint4 top = w[2 * half], low = w[2 * half + 1];
    a[0] = step ? top.z : top.x;
    a[1] = step ? low.z : low.x;
    a[2] = step ? top.w : top.y;
    a[3] = step ? low.w : low.y;
#elif FORMAT == 1
    const u32 top = step ? w[half].y : w[half].x, low = step ? w[half].w : w[half].z;
    a[0] = widen(top, exponent);
    a[1] = widen(low, exponent);
    a[2] = widen(top >> 8, exponent);
    a[3] = widen(low >> 8, exponent);
#elif FORMAT == 2
    const u32 top = step ? w[half].y : w[half].x, low = step ? w[half].w : w[half].z;
    a[0] = widen(top << 8, exponent);
    a[1] = widen(low << 8, exponent);
    a[2] = widen(top, exponent);
    a[3] = widen(low, exponent);
#else
    // A nibble in bits 3 to 6 of 0x4180 is the bf16 number 16 + q; the fourth nibbles cross the middle of the word.
    const u32 top = half ? w[0].z : w[0].x, low = half ? w[0].w : w[0].y;
    const u32 top_scale = half ? w[1].z : w[1].x, low_scale = half ? w[1].w : w[1].y;
    const u32 ts = __byte_perm(top_scale, 0, 0x1010), to = __byte_perm(top_scale, 0, 0x3232);
    const u32 ls = __byte_perm(low_scale, 0, 0x1010), lo = __byte_perm(low_scale, 0, 0x3232);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int shift = 4 * (2 * step + i);
        a[2 * i] = fma2((__funnelshift_r(top, top, shift) & 0x00780078u) | exponent, ts, to);
        a[2 * i + 1] = fma2((__funnelshift_r(low, low, shift) & 0x00780078u) | exponent, ls, lo);
    }
#endif
}

// Where input k of activation row n lies in column tiles.
DEVICE int place(int n, int k) { return ((k / 64) * 8 + n / 8) * 512 + (k % 64 / 32) * 256 + ((n % 8) * 4 + k % 32 / 8) * 8 + k % 8; }

// ---- what becomes of the sums: c[0], c[1] are weight row g, columns n and n + 1; c[2], c[3] weight row g + 8 ----

DEVICE float activate(float v, int gelu) {
    if (gelu) {
        const float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
        return v / (1.f + __expf(-2.f * u));
    }
    return v / (1.f + __expf(-v));
}

// What finishing a tile needs from memory besides its sums; asked for before the steps, so that it is there behind them.
struct Prepared {
    float scale[2], bias[2];  // of weight rows g and g + 8
#if EPILOGUE == RESIDUAL
    u16 old[NT][2][2];
#elif EPILOGUE == QKV
    float2 turn[NT][2];
    int slot[NT][2];
#endif
    DEVICE void load(const Args &p, int tile) {
        const int g = lane_id() >> 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            scale[i] = FORMAT == 1 || FORMAT == 2 ? p.row_scales[tile * 16 + g + 8 * i] : 1.f;
            bias[i] = p.bias ? p.bias[tile * 16 + g + 8 * i] : 0.f;
        }
#if EPILOGUE == RESIDUAL || EPILOGUE == QKV
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = min(j * 8 + (int)(lane_id() & 3) * 2 + i, p.rows - 1);
#if EPILOGUE == RESIDUAL
                const u16 *out = (const u16 *)p.out + place(n, tile * 16 + g);
                old[j][i][0] = out[0];
                old[j][i][1] = out[8];
#else
                const int d = tile % (p.head_dim / 16) * 8 + g;
                turn[j][i] = ((const float2 *)p.rotary)[p.positions[n] * (p.head_dim / 2) + d];
                slot[j][i] = p.slots[n];
#endif
            }
#endif
    }
};

// Column i of column tile j: the sums of weight rows g (top) and g + 8 (low).
DEVICE void finish(const Args &p, const Prepared &ready, int tile, int j, int i, float top, float low, float norm) {
    const int g = lane_id() >> 2, n = j * 8 + (lane_id() & 3) * 2 + i;
    const bool live = n < p.rows;
    top = top * ready.scale[0] * norm + ready.bias[0];
    low = low * ready.scale[1] * norm + ready.bias[1];
#if EPILOGUE == LOGITS
    if (live) {
        float *out = (float *)p.out + (long long)n * p.out_stride + tile * 16 + g;
        out[0] = top;
        out[8] = low;
    }
#elif EPILOGUE == RESIDUAL
    const u16 a = to_bf16(from_bf16(ready.old[j][i][0]) + top), b = to_bf16(from_bf16(ready.old[j][i][1]) + low);
    float square = from_bf16(a) * from_bf16(a) + from_bf16(b) * from_bf16(b);
    if (live) {
        u16 *out = (u16 *)p.out + place(n, tile * 16 + g);
        out[0] = a;
        out[8] = b;
    }
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) square += __shfl_xor_sync(0xffffffffu, square, distance);
    if (live && g == 0) p.out_squares[tile * 64 + n] = square;
#elif EPILOGUE == GATED
    if (live) ((u16 *)p.out)[place(n, tile * 8 + g)] = to_bf16(activate(top, p.gelu) * low);
#else
    if (!live) return;
    const int per_head = p.head_dim / 16, head = tile / per_head, d = (tile % per_head) * 8 + g;
    if (head < p.heads + p.kv_heads) {
        const float2 turn = ready.turn[j][i];
        const float a = top * turn.x - low * turn.y;
        low = low * turn.x + top * turn.y;
        top = a;
    }
    u16 *out;
    if (head < p.heads) {
        out = (u16 *)p.out + (long long)n * p.out_stride + head * p.head_dim;
    } else {
        const bool value = head >= p.heads + p.kv_heads;
        const int h = head - p.heads - (value ? p.kv_heads : 0), slot = ready.slot[j][i];
        out = (value ? p.v_cache : p.k_cache);
        out += (((long long)(slot / PAGE) * p.kv_heads + h) * PAGE + slot % PAGE) * p.head_dim;
    }
    out[d] = to_bf16(top);
    out[d + p.head_dim / 2] = to_bf16(low);
#endif
}

// norms[n] = 1 / rms of activation row n (1 without a norm), by NORM_WARPS warps. The order of the sum does not depend on the
// number of rows; several loads are on their way at once.
DEVICE void row_norms(const Args &p, float *sums, float *norms) {
    const int thread = threadIdx.x - (WARPS + 2) * 32;
    if (p.squares) {
#pragma unroll 4
        for (int i = thread; i < SUBSETS * NT * 8; i += NORM_WARPS * 32) {
            const float *from = p.squares + i % (NT * 8);
            float sum = 0.f;
            for (int j = i / (NT * 8); j < p.num_squares; j += 9 * SUBSETS) {
                float part[9];
#pragma unroll
                for (int k = 0; k < 9; ++k) part[k] = j + k * SUBSETS < p.num_squares ? from[(j + k * SUBSETS) * 64] : 0.f;
#pragma unroll
                for (int k = 0; k < 9; ++k) sum += part[k];
            }
            sums[i] = sum;
        }
        asm volatile("bar.sync 1, %0;" ::"n"(NORM_WARPS * 32) : "memory");
    }
    if (thread < NT * 8) {
        const int n = thread;
        float sum = 0.f;
        if (p.squares)
            for (int i = 0; i < SUBSETS; ++i) sum += sums[i * NT * 8 + n];
        norms[n] = p.squares ? rsqrtf(sum * p.inv_width + p.eps) : 1.f;
    }
}

// ---- the ring: a `full` stage holds its weights and activations, an `empty` one may be overwritten ----

struct Barriers {
    unsigned long long full[MAX_STAGES], empty[MAX_STAGES], norms;
};

DEVICE u32 shared(const void *p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void initialise(Barriers &barriers, int stages) {
    for (int i = 0; i < stages; ++i) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(shared(barriers.full + i)));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(barriers.empty + i)), "r"(WARPS));
    }
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(&barriers.norms)), "r"(NORM_WARPS * 32));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void wait(u32 barrier, int parity) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}
DEVICE void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
DEVICE void expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void copy(u32 to, const char *from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Where a thread is in the ring, as addresses: the copying threads have no time for arithmetic.
struct Cursor {
    u32 stage, full, first_stage, first_full, end;
    int parity;
    DEVICE Cursor(const char *ring, const Barriers &barriers, int stages) {
        stage = first_stage = shared(ring), full = first_full = shared(barriers.full), end = full + stages * 8, parity = 0;
    }
    DEVICE u32 empty() const { return full + MAX_STAGES * 8; }
    DEVICE void next() {
        stage += STAGE_BYTES, full += 8;
        if (full == end) stage = first_stage, full = first_full, parity ^= 1;
    }
};

DEVICE int range_start(int total, int block) { return (u32)total * (u32)block / gridDim.x; }

DEVICE void feed_weights(const Args &p, Cursor at, int from, int count) {
    const char *source = p.weights + (long long)from * STEPS * WEIGHT_BYTES;
    const int first = min(count, p.stages);
    for (int i = 0; i < count; ++i, source += STEPS * WEIGHT_BYTES, at.next()) {
        if (i >= first) wait(at.empty(), at.parity ^ 1);
        expect(at.full, STEPS * WEIGHT_BYTES);
        copy(at.stage, source, STEPS * WEIGHT_BYTES, at.full);
        if (i + 1 == first) {
            const char *ahead = p.ahead + (long long)range_start(p.ahead_units, blockIdx.x) * p.ahead_unit_bytes;
            if (p.ahead)
                for (int piece = 0; piece < p.ahead_bytes; piece += 16384)
                    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(ahead + piece), "r"(16384) : "memory");
            asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        }
    }
}

DEVICE void feed_inputs(const Args &p, Cursor at, int unit, int count) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int units = p.k_steps / STEPS;
    const char *source = p.x + unit * STEPS * 8192;
    for (int i = 0; i < count; ++i, at.next()) {
        if (i >= p.stages) wait(at.empty(), at.parity ^ 1);
        expect(at.full, STEPS * INPUT_BYTES);
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
            copy(at.stage + STEPS * WEIGHT_BYTES + s * INPUT_BYTES, source + s * 8192, INPUT_BYTES, at.full);
        source += STEPS * 8192;
        if (++unit == units) unit = 0, source = p.x;
    }
}

DEVICE uint4 read(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

// A stage, by a multiplying warp. How the 16 inputs of an mma are numbered is free as long as both operands agree: a lane's 8
// inputs of a half are inputs 2t, 2t + 1, 2t + 8, 2t + 9 of two mma's.
DEVICE void multiply(u32 weights, u32 scales, u32 inputs, u32 last, u32 exponent, float (&sums)[NT][4]) {
    uint4 w[STEPS][WORDS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int i = 0; i < WEIGHT_WORDS; ++i) w[s][i] = read(weights + s * WEIGHT_BYTES + i * 512);
#if FORMAT == 3
        w[s][1] = read(scales + s * WEIGHT_BYTES);
#endif
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 x[NT];
#pragma unroll
            for (int j = 0; j < NT; ++j)
                x[j] = read((j == NT - 1 ? last : inputs) + s * INPUT_BYTES + j * 1024 + half * 512);
            u32 a[4];
            operand(w[s], half, 0, exponent, a);
#pragma unroll
            for (int j = 0; j < NT; ++j) mma(sums[j], a, x[j].x, x[j].y);
            operand(w[s], half, 1, exponent, a);
#pragma unroll
            for (int j = 0; j < NT; ++j) mma(sums[j], a, x[j].z, x[j].w);
        }
}

// ---- sums of a group that several blocks share ----

// A word that no sum is made of (`settled`): the place of a part that has not come yet. Data and flag are one, so that a part
// costs a store and a load.
#define EMPTY 0xffffffffu

DEVICE u32 settled(float v) { return __float_as_uint(v) == EMPTY ? 0x7fffffffu : __float_as_uint(v); }
DEVICE bool arrived(const uint4 &v) { return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY; }
DEVICE void store_part(uint4 *to, const uint4 &v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE uint4 load_part(const uint4 *from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
DEVICE uint4 *part(const Args &p, int block, int column) {
    return p.parts + ((block * 16 + threadIdx.x / 32) * 8 + column) * 32 + lane_id();
}

DEVICE void publish(const Args &p, const float (&sums)[NT][4]) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
        store_part(part(p, blockIdx.x, j),
                   make_uint4(settled(sums[j][0]), settled(sums[j][1]), settled(sums[j][2]), settled(sums[j][3])));
}

// Adds what the following blocks have summed of the group that ends at `end`, in their order, and empties the places.
#define AT_ONCE (NT <= 2 ? 4 : NT <= 4 ? 2 : 1)
DEVICE void collect(const Args &p, float (&sums)[NT][4], int total, int end) {
    int upto = blockIdx.x + 1;
    while (range_start(total, upto) < end) ++upto;
    for (int first = blockIdx.x + 1; first < upto; first += AT_ONCE) {
        uint4 parts[AT_ONCE][NT];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + i < upto)
#pragma unroll
                for (int j = 0; j < NT; ++j) parts[i][j] = load_part(part(p, first + i, j));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + i < upto)
#pragma unroll
                for (int j = 0; j < NT; ++j) {
                    while (!arrived(parts[i][j])) parts[i][j] = load_part(part(p, first + i, j));
                    store_part(part(p, first + i, j), make_uint4(EMPTY, EMPTY, EMPTY, EMPTY));
                    sums[j][0] += __uint_as_float(parts[i][j].x);
                    sums[j][1] += __uint_as_float(parts[i][j].y);
                    sums[j][2] += __uint_as_float(parts[i][j].z);
                    sums[j][3] += __uint_as_float(parts[i][j].w);
                }
    }
}

// Sums over all of a group's inputs are complete.
DEVICE void finish_tile(const Args &p, const Prepared &ready, int tile, float (&sums)[NT][4], const float *norms) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            finish(p, ready, tile, j, i, sums[j][i], sums[j][i + 2], norms[j * 8 + (lane_id() & 3) * 2 + i]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) skinny(const __grid_constant__ Args p) {
    extern __shared__ __align__(128) char ring[];
    __shared__ Barriers barriers;
    __shared__ float norms[NT * 8], norm_sums[SUBSETS * NT * 8];
    const int warp = threadIdx.x / 32, units = p.k_steps / STEPS, total = (p.tiles + WARPS - 1) / WARPS * units;
    const int from = range_start(total, blockIdx.x), count = range_start(total, blockIdx.x + 1) - from;
    if (threadIdx.x == 0) initialise(barriers, p.stages);
    __syncthreads();
    Cursor at(ring, barriers, p.stages);
    if (warp >= WARPS) {
        if (threadIdx.x == WARPS * 32) feed_weights(p, at, from, count);
        if (threadIdx.x == WARPS * 32 + 32) feed_inputs(p, at, from % units, count);
        if (warp >= WARPS + 2) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            row_norms(p, norm_sums, norms);
            arrive(shared(&barriers.norms));
        }
        return;
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");

    const int live_row = min((NT - 1) * 8 + (int)(lane_id() >> 2), p.rows - 1) - (NT - 1) * 8;
    u32 words = warp * WEIGHT_WORDS * 512 + lane_id() * 16, scales = WORD_BYTES + warp * 128 + lane_id() / 4 * 16;
    u32 inputs = STEPS * WEIGHT_BYTES + lane_id() * 16, last = STEPS * WEIGHT_BYTES + (live_row * 4 + (lane_id() & 3)) * 16;
    u32 exponent = p.exponent;
    asm volatile("" : "+r"(words), "+r"(scales), "+r"(inputs), "+r"(last), "+r"(exponent));  // not to be computed anew each time
    int group = from / units, begin = from % units;
    for (int left = count; left > 0; ++group, begin = 0) {
        const int end = min(units, begin + left), tile = group * WARPS + warp;
        const bool mine = begin == 0 && tile < p.tiles;
        Prepared ready;
        if (mine) ready.load(p, tile);
        float sums[NT][4] = {};
        for (int unit = begin; unit < end; ++unit, at.next()) {
            wait(at.full, at.parity);
            multiply(at.stage + words, at.stage + scales, at.stage + inputs, at.stage + last, exponent, sums);
            __syncwarp();
            if (lane_id() == 0) arrive(at.empty());
        }
        left -= end - begin;
        if (mine) {
            if (end < units) collect(p, sums, total, (group + 1) * units);
            wait(shared(&barriers.norms), 0);
            finish_tile(p, ready, tile, sums, norms);
        } else if (tile < p.tiles) {
            publish(p, sums);
        }
    }
}

// Weights back to bf16 [rows][k], for products with many rows through the library. One warp a tile of 16 rows and 64 inputs.
extern "C" __global__ void unpack(const char *weights, const float *row_scales, u16 *out, int k_steps) {
    const int tile = blockIdx.y, step = blockIdx.x * 8 + threadIdx.x / 32;
    if (step >= k_steps) return;
    const char *at = weights + ((long long)(tile / WARPS) * k_steps + step) * WEIGHT_BYTES;
    uint4 w[WORDS];
#pragma unroll
    for (int i = 0; i < WEIGHT_WORDS; ++i) w[i] = ((const uint4 *)at)[(tile % WARPS * WEIGHT_WORDS + i) * 32 + lane_id()];
#if FORMAT == 3
    w[1] = ((const uint4 *)(at + WORD_BYTES))[tile % WARPS * 8 + lane_id() / 4];
#endif
    const int g = lane_id() >> 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 a[2][4];
        operand(w, half, 0, EXPONENT, a[0]);
        operand(w, half, 1, EXPONENT, a[1]);
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
