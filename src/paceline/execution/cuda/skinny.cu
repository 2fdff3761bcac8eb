// Matrix products for 1 to 64 activation rows at the speed of memory (ours).
//
// y[n][f] = sum_k w[f][k] x[n][k]. Weights are the large operand, so they are the 16-row side of mma.m16n8k16; activations are
// its 8-column side. Weights are packed in the order in which lanes want them (packing.py), and so that what a block needs for a
// step of 64 inputs is consecutive: a few threads keep a ring of shared-memory stages filled by bulk copies of weights and
// activations, and other warps multiply. A block fetches its first weights before it waits for the kernel that makes its
// activations (programmatic dependent launch), so that the memory stays busy between kernels.
//
// A group is GROUP tiles of 16 rows. Its inputs are dealt out to the SHARERS blocks of a cluster, and what a block has of them, step
// by step, to the SLICES warps of each tile. Tiles are chosen to fill all multiprocessors (`linears.split`). Sums of a tile come
// together in the shared memory of one of the blocks, which adds them in order: the order of every sum depends on the weight's
// shape alone, and a row of activations gets the same bits in any company.
//
// Activations lie in column tiles: for every step 8 tiles of 8 rows, in each of which the 8 inputs of a lane's half step are
// consecutive (`place`).
//
// Compile-time: FORMAT (0 bf16, 1 int8, 2 fp8 e4m3, 3 int4), NT (column tiles of 8), EPILOGUE, GROUP, SHARERS, SLICES, DEPTH (steps of
// a warp in a stage of the ring).

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
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(&barriers.norms)), "r"(max(1, NORM_WARPS) * 32));
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
        asm volatile("" : "+r"(first_stage), "+r"(first_full), "+r"(end));  // not to be computed anew each time
    }
    DEVICE u32 empty() const { return full + MAX_STAGES * 8; }
    DEVICE void next() {
        stage += STAGE_BYTES, full += 8;
        if (full == end) stage = first_stage, full = first_full, parity ^= 1;
    }
};

// A block's share of the product: `steps` steps from `begin` on, of `groups` groups from `group` on. Blocks begin at different
// stages (`first`) and go round, so that they do not all ask for the same activations at once.
struct Share {
    int group, groups, rank, begin, steps, stages, first;
    DEVICE Share(const Args &p) {
        const int cluster = blockIdx.x / SHARERS;
        group = cluster * p.rounds, groups = min(p.rounds, p.groups - group), rank = blockIdx.x % SHARERS;
        begin = p.k_steps * rank / SHARERS, steps = p.k_steps * (rank + 1) / SHARERS - begin;
        stages = (steps + STEPS - 1) / STEPS;
        first = cluster * ((steps + 2 * SLICES - 1) / (2 * SLICES)) / (gridDim.x / SHARERS) * (2 / DEPTH);  // the same for any DEPTH
    }
    DEVICE int next(int stage) const { return stage + 1 == stages ? 0 : stage + 1; }
    DEVICE int left(int stage) const { return steps - stage * STEPS; }
};

DEVICE void feed_weights(const Args &p, Cursor at, const Share &share) {
    const char *source = p.weights + ((long long)share.group * p.k_steps + share.begin) * WEIGHT_BYTES;
    const int count = share.groups * share.stages, first = min(count, p.stages);
    int stage = share.first, wraps = share.stages;
    for (int i = 0; i < count; ++i, at.next(), stage = share.next(stage)) {
        if (i == wraps) source += (long long)p.k_steps * WEIGHT_BYTES, wraps += share.stages;
        const int bytes = min(share.left(stage), STEPS) * WEIGHT_BYTES;
        if (i >= first) wait(at.empty(), at.parity ^ 1);
        expect(at.full, bytes);
        copy(at.stage, source + stage * STEPS * WEIGHT_BYTES, bytes, at.full);
        if (i + 1 == first) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    }
}

DEVICE void feed_inputs(const Args &p, Cursor at, const Share &share, int turn) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int count = share.groups * share.stages;
    int stage = share.first;
    for (int i = 0; i < count; ++i, at.next(), stage = share.next(stage)) {
        if (i % INPUT_WARPS != turn) continue;
        const int steps = min(share.left(stage), STEPS);
        const char *source = p.x + (share.begin + stage * STEPS) * 8192;
        if (i >= p.stages) wait(at.empty(), at.parity ^ 1);
        expect(at.full, steps * INPUT_BYTES);
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
            if (s < steps) copy(at.stage + STEPS * WEIGHT_BYTES + s * INPUT_BYTES, source + s * 8192, INPUT_BYTES, at.full);
    }
}

DEVICE uint4 read(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

// Where a lane's part of its warp's first step lies within a stage; its others follow at distances of SLICES steps.
struct Lane {
    u32 words, scales, inputs, last;  // last: of the last column tile, whose rows beyond those that count repeat a live one
    DEVICE Lane(int rows, int tile, int slice) {
        const int live_row = min((NT - 1) * 8 + (int)(lane_id() >> 2), rows - 1) - (NT - 1) * 8;
        words = slice * WEIGHT_BYTES + tile * WEIGHT_WORDS * 512 + lane_id() * 16;
        scales = slice * WEIGHT_BYTES + WORD_BYTES + tile * 128 + lane_id() / 4 * 16;
        inputs = STEPS * WEIGHT_BYTES + slice * INPUT_BYTES + lane_id() * 16;
        last = STEPS * WEIGHT_BYTES + slice * INPUT_BYTES + (live_row * 4 + (lane_id() & 3)) * 16 + (NT - 1) * 1024;
        asm volatile("" : "+r"(words), "+r"(scales), "+r"(inputs), "+r"(last));  // not to be computed anew each time
    }
};

// COUNT steps of a warp, `stage` on. How the 16 inputs of an mma are numbered is free as long as both operands agree: a lane's 8
// inputs of a half are inputs 2t, 2t + 1, 2t + 8, 2t + 9 of two mma's.
template <int COUNT>
DEVICE void multiply(u32 stage, const Lane &lane, int first, u32 exponent, float (&sums)[NT][4]) {
    const u32 weights = stage + first * SLICES * WEIGHT_BYTES, inputs = stage + first * SLICES * INPUT_BYTES;
    uint4 w[COUNT][WORDS];
#pragma unroll
    for (int s = 0; s < COUNT; ++s) {
#pragma unroll
        for (int i = 0; i < WEIGHT_WORDS; ++i) w[s][i] = read(weights + lane.words + s * SLICES * WEIGHT_BYTES + i * 512);
#if FORMAT == 3
        w[s][1] = read(weights + lane.scales + s * SLICES * WEIGHT_BYTES);
#endif
    }
#pragma unroll
    for (int s = 0; s < COUNT; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 x[NT];
#pragma unroll
            for (int j = 0; j < NT; ++j)
                x[j] = read(inputs + (j == NT - 1 ? lane.last : lane.inputs + j * 1024) + s * SLICES * INPUT_BYTES + half * 512);
            u32 a[4];
            operand(w[s], half, 0, exponent, a);
#pragma unroll
            for (int j = 0; j < NT; ++j) mma(sums[j], a, x[j].x, x[j].y);
            operand(w[s], half, 1, exponent, a);
#pragma unroll
            for (int j = 0; j < NT; ++j) mma(sums[j], a, x[j].z, x[j].w);
        }
}

// ---- sums of a tile that several warps share: [tile / SHARERS][column tile][part][lane] of the block `tile % SHARERS` ----

DEVICE void clusters_arrive() { __syncwarp(); asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void clusters_wait() { __syncwarp(); asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

#if SHARERS > 1
#define STORE "st.shared::cluster"
#else
#define STORE "st.shared"
#endif
DEVICE void hand_over(u32 parts, int tile, int part, const float (&sums)[NT][4]) {
    u32 to = parts + (tile / SHARERS * NT * PARTS + part) * 512 + lane_id() * 16;
    if (SHARERS > 1) asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(to), "r"(tile % SHARERS));
#pragma unroll
    for (int j = 0; j < NT; ++j)
        asm volatile(STORE ".v4.f32 [%0], {%1,%2,%3,%4};"
                     ::"r"(to + j * PARTS * 512), "f"(sums[j][0]), "f"(sums[j][1]), "f"(sums[j][2]), "f"(sums[j][3]) : "memory");
}

DEVICE void add_up(u32 parts, int item, float (&sums)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = 0.f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const uint4 v = read(parts + (item * PARTS + part) * 512 + lane_id() * 16);
        sums[0] += __uint_as_float(v.x), sums[1] += __uint_as_float(v.y);
        sums[2] += __uint_as_float(v.z), sums[3] += __uint_as_float(v.w);
    }
}

// The i-th of the columns of tiles that a warp finishes: its own tile's where nobody shares it, else all warps take turns.
struct Item {
    int tile, column;
    bool live;
    DEVICE Item(const Args &p, int group, int rank, int warp, int i) {
        const int turn = warp + i * WARPS, in_group = PARTS == 1 ? warp : turn / NT * SHARERS + rank;
        tile = group * GROUP + in_group, column = PARTS == 1 ? i : turn % NT, live = in_group < GROUP && tile < p.tiles;
    }
};

DEVICE void finish_columns(const Args &p, const Prepared &ready, const Item &item, const float (&sums)[4], const float *norms) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float norm = EPILOGUE == RESIDUAL ? 1.f : norms[item.column * 8 + (lane_id() & 3) * 2 + i];
        finish(p, ready, item.tile, item.column, i, sums[i], sums[i + 2], norm);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) skinny(const __grid_constant__ Args p) {
    extern __shared__ __align__(128) char ring[];
    __shared__ Barriers barriers;
    __shared__ float norms[NT * 8];
    __shared__ float4 norm_sums[NORM_WARPS ? SUBSETS * NT * 2 : 1];
    const int warp = threadIdx.x / 32;
    const Share share(p);
    if (threadIdx.x == 0) initialise(barriers, p.stages);
    __syncthreads();
    if (SHARERS > 1) clusters_arrive();
    Cursor at(ring, barriers, p.stages);
    if (warp >= WARPS) {
        if (threadIdx.x == WARPS * 32) feed_weights(p, at, share);
        else if (warp <= WARPS + INPUT_WARPS && lane_id() == 0) feed_inputs(p, at, share, warp - WARPS - 1);
        if (warp > WARPS + INPUT_WARPS) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            row_norms(p, norm_sums, norms);
            arrive(shared(&barriers.norms));
        }
        return;
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");

    const int tile = warp % GROUP, slice = warp / GROUP;
    const Lane lane(p.rows, tile, slice);
    const u32 parts = shared(ring) + p.stages * STAGE_BYTES;
    const int short_one = share.steps % STEPS ? share.stages - 1 - share.first : -1;  // the turn of the stage that is not full
    for (int group = share.group; group < share.group + share.groups; ++group) {
        Prepared ready[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Item item(p, group, share.rank, warp, i);
            if (item.live) ready[i].load(p, item.tile, item.column);
        }
        float sums[NT][4] = {};
        for (int i = 0; i < share.stages; ++i, at.next()) {
            wait(at.full, at.parity);
            if (i != short_one)
                multiply<DEPTH>(at.stage, lane, 0, p.exponent, sums);
            else
                for (int s = 0; s < DEPTH && slice + s * SLICES < share.steps % STEPS; ++s)
                    multiply<1>(at.stage, lane, s, p.exponent, sums);
            __syncwarp();
            if (lane_id() == 0) arrive(at.empty());
        }
        if (PARTS > 1) {
            if (SHARERS > 1) clusters_wait();  // until all blocks run
            hand_over(parts, tile, share.rank * SLICES + slice, sums);
            if (SHARERS > 1) {
                clusters_arrive();
                clusters_wait();
            } else {
                asm volatile("bar.sync 2, %0;" ::"n"(WARPS * 32) : "memory");
            }
        }
        if (NORM_WARPS) wait(shared(&barriers.norms), 0);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Item item(p, group, share.rank, warp, i);
            if (!item.live) continue;
            if (PARTS > 1) add_up(parts, warp + i * WARPS, sums[0]);
            finish_columns(p, ready[i], item, sums[PARTS > 1 ? 0 : i], norms);
        }
    }
}

// Weights back to bf16 [rows][k], for products with many rows through the library. One warp a tile of 16 rows and 64 inputs.
extern "C" __global__ void unpack(const char *weights, const float *row_scales, u16 *out, int k_steps) {
    const int tile = blockIdx.y, step = blockIdx.x * 8 + threadIdx.x / 32;
    if (step >= k_steps) return;
    const char *at = weights + ((long long)(tile / GROUP) * k_steps + step) * WEIGHT_BYTES;
    uint4 w[WORDS];
#pragma unroll
    for (int i = 0; i < WEIGHT_WORDS; ++i) w[i] = ((const uint4 *)at)[(tile % GROUP * WEIGHT_WORDS + i) * 32 + lane_id()];
#if FORMAT == 3
    w[1] = ((const uint4 *)(at + WORD_BYTES))[tile % GROUP * 8 + lane_id() / 4];
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
