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
        if (i + 1 == first) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
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
