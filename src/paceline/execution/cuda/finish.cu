// What becomes of a tile's sums: logits, residual stream, gated units, or queries, keys and values.

// ---- what becomes of the sums: c[0], c[1] are weight row g, columns n and n + 1; c[2], c[3] weight row g + 8 ----

DEVICE float activate(float v, int gelu) {
    if (gelu) {
        const float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
        return v / (1.f + __expf(-2.f * u));
    }
    return v / (1.f + __expf(-v));
}

// What finishing 8 columns of a tile needs from memory besides its sums; asked for before the steps, so that it is there behind them.
struct Prepared {
    float scale[2], bias[2];  // of weight rows g and g + 8
#if EPILOGUE == RESIDUAL
    u16 old[2][2];
#elif EPILOGUE == QKV
    float2 turn[2];
    int slot[2];
#endif
    DEVICE void load(const Args &p, int tile, int j) {
        const int g = lane_id() >> 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            scale[i] = FORMAT == 1 || FORMAT == 2 ? p.row_scales[tile * 16 + g + 8 * i] : 1.f;
            bias[i] = p.bias ? p.bias[tile * 16 + g + 8 * i] : 0.f;
#if EPILOGUE == RESIDUAL || EPILOGUE == QKV
            const int n = min(j * 8 + (int)(lane_id() & 3) * 2 + i, p.rows - 1);
#endif
#if EPILOGUE == RESIDUAL
            const u16 *out = (const u16 *)p.out + place(n, tile * 16 + g);
            old[i][0] = fresh(out);
            old[i][1] = fresh(out + 8);
#elif EPILOGUE == QKV
            const int d = tile % (p.head_dim / 16) * 8 + g;
            turn[i] = ((const float2 *)p.rotary)[p.positions[n] * (p.head_dim / 2) + d];
            slot[i] = p.slots[n];
#endif
        }
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
    const u16 a = to_bf16(from_bf16(ready.old[i][0]) + top), b = to_bf16(from_bf16(ready.old[i][1]) + low);
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
        const float2 turn = ready.turn[i];
        const float a = top * turn.x - low * turn.y;
        low = low * turn.x + top * turn.y;
        top = a;
    }
    u16 *out;
    if (head < p.heads) {
        out = (u16 *)p.out + (long long)n * p.out_stride + head * p.head_dim;
    } else {
        const bool value = head >= p.heads + p.kv_heads;
        const int h = head - p.heads - (value ? p.kv_heads : 0), slot = ready.slot[i];
        out = (value ? p.v_cache : p.k_cache);
        out += (((long long)(slot / PAGE) * p.kv_heads + h) * PAGE + slot % PAGE) * p.head_dim;
    }
    out[d] = to_bf16(top);
    out[d + p.head_dim / 2] = to_bf16(low);
#endif
}

// norms[n] = 1 / rms of activation row n (1 without a norm), by NORM_WARPS warps. The order of the sum does not depend on the
// number of rows; several loads are on their way at once.
DEVICE void row_norms(const Args &p, float4 *sums, float *norms) {
    const int thread = threadIdx.x - (WARPS + 1 + INPUT_WARPS) * 32;
    if (p.squares) {
        for (int i = thread; i < SUBSETS * NT * 2; i += NORM_WARPS * 32) {  // of four rows each
            const float4 *from = (const float4 *)p.squares + i % (NT * 2);
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
            for (int j = i / (NT * 2); j < p.num_squares; j += 9 * SUBSETS) {
                float4 part[9];
#pragma unroll
                for (int k = 0; k < 9; ++k) part[k] = fresh(from + min(j + k * SUBSETS, p.num_squares - 1) * 16);
#pragma unroll
                for (int k = 0; k < 9; ++k) {
                    const float live = j + k * SUBSETS < p.num_squares ? 1.f : 0.f;
                    sum.x += live * part[k].x, sum.y += live * part[k].y, sum.z += live * part[k].z, sum.w += live * part[k].w;
                }
            }
            sums[i] = sum;
        }
        asm volatile("bar.sync 1, %0;" ::"n"(NORM_WARPS * 32) : "memory");
    }
    for (int n = thread; n < NT * 8; n += NORM_WARPS * 32) {
        float sum = 0.f;
        if (p.squares)
            for (int i = 0; i < SUBSETS; ++i) sum += ((const float *)sums)[i * NT * 8 + n];
        norms[n] = p.squares ? rsqrtf(sum * p.inv_width + p.eps) : 1.f;
    }
}
