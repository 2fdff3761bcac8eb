// What the parts of the kernel share: arguments, numbers, and the weight formats. `driver.py` puts the parts together.

typedef unsigned int u32;
typedef unsigned short u16;

#define LOGITS 0
#define RESIDUAL 1
#define GATED 2
#define QKV 3
#define PAGE 64
#define WARPS (GROUP * SLICES)                      // that multiply; one more copies weights
#define INPUT_WARPS (NT <= 2 ? 2 : 1)               // that copy activations, which come in small pieces if rows are few
#define NORM_WARPS (EPILOGUE == RESIDUAL ? 0 : 3 - INPUT_WARPS)
#define THREADS ((WARPS + 1 + INPUT_WARPS + NORM_WARPS) * 32)
#define STEPS (SLICES * DEPTH)                      // of a stage of the ring
#define PARTS (SLICES * SHARERS)                    // of a tile's sums, in as many warps
#define OWN_TILES ((GROUP + SHARERS - 1) / SHARERS)  // of a group that a block finishes
#define ITEMS (PARTS == 1 ? NT : (OWN_TILES * NT + WARPS - 1) / WARPS)  // columns of tiles that a warp finishes
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
    float inv_width, eps;       // of the RMS norm before this product
    int k_steps;                // k / 64
    int tiles;                  // rows of w / 16
    int groups;                 // of tiles
    int rounds;                 // groups of a block, one after another
    int rows;                   // rows of x that count
    int num_squares;
    int out_stride;
    int heads, kv_heads, head_dim;
    int gelu;                   // GATED: 0 silu, 1 gelu (tanh form)
    int stages;                 // of the ring in shared memory
    u32 exponent;               // EXPONENT
};

#define DEVICE __device__ __forceinline__

DEVICE u32 lane_id() { return threadIdx.x & 31; }
DEVICE float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }

// What the kernel before made: past the first-level cache, which may hold what it was when an earlier kernel read it.
DEVICE u16 fresh(const u16 *p) { u16 v; asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p)); return v; }
DEVICE float4 fresh(const float4 *p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}

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
// Both halves of a times the lower half of b, plus the upper half of b.
DEVICE u32 scaled(u32 a, u32 b) {
    u32 r;
    asm("{ .reg .b16 s, o;\n.reg .b32 ss, oo;\nmov.b32 {s, o}, %2;\nmov.b32 ss, {s, s};\nmov.b32 oo, {o, o};\nfma.rn.bf16x2 %0, %1, ss, oo; }"
        : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// ---- formats: a lane's 16-byte words of one step (16 weight rows x 64 inputs), and their unpacking into mma operands ----

#define WORDS (FORMAT == 0 ? 4 : 2)                  // in registers
#define WEIGHT_WORDS (FORMAT == 3 ? 1 : WORDS)       // that hold weights; int4 has one of scales, shared by 4 lanes
#define WORD_BYTES (GROUP * WEIGHT_WORDS * 512)      // of a group's step
#define WEIGHT_BYTES (WORD_BYTES + (FORMAT == 3 ? GROUP * 128 : 0))
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
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int shift = 4 * (2 * step + i);
        a[2 * i] = scaled((__funnelshift_r(top, top, shift) & 0x00780078u) | exponent, top_scale);
        a[2 * i + 1] = scaled((__funnelshift_r(low, low, shift) & 0x00780078u) | exponent, low_scale);
    }
#endif
}

// Where input k of activation row n lies in column tiles.
DEVICE int place(int n, int k) { return ((k / 64) * 8 + n / 8) * 512 + (k % 64 / 32) * 256 + ((n % 8) * 4 + k % 32 / 8) * 8 + k % 8; }
