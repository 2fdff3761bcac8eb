// A token drawn from each row of logits: the fast form of execution/draws.py, whose text says what is drawn.
// One block of 1024 threads a row. Sums are of whole numbers, so their order does not matter.

typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define THREADS 1024
#define WARPS (THREADS / 32)
// Distances from the largest logit as bits of a float: 28, beyond which all weights are 0.
#define FARTHEST 0x41E00000u
#define UNIT 1099511627776.f

struct Law {  // `LAW` of drawing.py
    float temperature;  // 0: the most probable token
    float min_p;
    double top_p;
    int top_k, vocab;
    u64 number;  // of 64 bits, the upper 53 random
};

DEVICE u64 weight_of(float distance, float min_p) {
    const float share = expf(-distance);
    return share >= min_p ? (u64)(share * UNIT) : 0;
}

// The sum over all threads, known to all.
DEVICE u64 total_of(u64 value, u64 *parts) {
#pragma unroll
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    u64 sum = parts[threadIdx.x % WARPS];
#pragma unroll
    for (int step = WARPS / 2; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// Tokens up to a distance, or what they weigh.
DEVICE u64 within(const u32 *distances, int vocab, u32 limit, bool weighed, u64 *parts) {
    u64 sum = 0;
    for (int i = threadIdx.x; i < vocab; i += THREADS)
        if (distances[i] <= limit) sum += weighed ? weight_of(__uint_as_float(distances[i]), 0.f) : 1;
    return total_of(sum, parts);
}

// The smallest distance within which there are `least` tokens, or weights of that sum; at most `limit`.
DEVICE u32 nearest(const u32 *distances, int vocab, double least, u32 limit, bool weighed, u64 *parts) {
    u32 low = 0, high = limit;
    while (low < high) {
        const u32 middle = low + (high - low) / 2;
        if ((double)within(distances, vocab, middle, weighed, parts) >= least) high = middle;
        else low = middle + 1;
    }
    return high;
}

extern "C" __global__ void __launch_bounds__(THREADS) draw(
    const float *logits, long long stride, const int *best, const Law *laws,
    const u64 *numbers,  // [lines, width], or none: those of the laws
    const int *line, int width,
    const int *sources,  // row of the logits for each draw, or none: its own
    u32 *scratch,  // [draws, scratch_stride]: distances, where a law filters
    long long scratch_stride, int *drawn, float *chances) {
    __shared__ u64 parts[WARPS];
    const int draw = blockIdx.x, row = sources ? sources[draw] : draw;
    const Law law = laws[draw];
    if (law.temperature <= 0.f || best[row] < 0) {
        if (threadIdx.x == 0) {
            drawn[draw] = best[row];
            chances[draw] = -1.f;
        }
        return;
    }
    const float *scores = logits + row * stride;
    float peak = __int_as_float(0xff800000);
    for (int i = threadIdx.x; i < law.vocab; i += THREADS) peak = fmaxf(peak, scores[i]);
#pragma unroll
    for (int step = 16; step; step >>= 1) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
    if (threadIdx.x % 32 == 0) ((float *)parts)[threadIdx.x / 32] = peak;
    __syncthreads();
    peak = ((float *)parts)[threadIdx.x % WARPS];
#pragma unroll
    for (int step = WARPS / 2; step; step >>= 1) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));

    u32 limit = FARTHEST;
    const bool counts = law.top_k > 0 && law.top_k < law.vocab, masses = law.top_p < 1.;
    if (counts || masses) {
        u32 *distances = scratch + draw * scratch_stride;
        for (int i = threadIdx.x; i < law.vocab; i += THREADS)
            distances[i] = __float_as_uint(__fdiv_rn(peak - scores[i], law.temperature));
        // Each thread reads what it wrote itself.
        if (counts) limit = nearest(distances, law.vocab, law.top_k, limit, false, parts);
        if (masses) {
            const double all = (double)within(distances, law.vocab, limit, true, parts);
            limit = nearest(distances, law.vocab, law.top_p * all, limit, true, parts);
        }
    }

    // Each warp sums a run of tokens; the one in which the place lies looks for it, 32 tokens at a time.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int run = (law.vocab + THREADS - 1) / THREADS * 32, begin = warp * run, end = min(begin + run, law.vocab);
    auto weight = [&](int i) -> u64 {
        const float distance = __fdiv_rn(peak - scores[i], law.temperature);
        return __float_as_uint(distance) <= limit ? weight_of(distance, law.min_p) : 0;
    };
    u64 sum = 0;
    for (int i = begin + lane; i < end; i += 32) sum += weight(i);
#pragma unroll
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    __syncthreads();
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    u64 total = 0, before = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w == warp) before = total;
        total += parts[w];
    }
    const u64 number = numbers ? numbers[(long long)*line * width + draw] : law.number;
    const u64 place = __umul64hi(number, total);
    if (place < before || place >= before + sum) return;
    for (int first = begin; first < end; first += 32) {
        const u64 own = first + lane < end ? weight(first + lane) : 0;
        u64 upto = own;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            const u64 other = __shfl_up_sync(~0u, upto, step);
            if (lane >= step) upto += other;
        }
        const u32 beyond = __ballot_sync(~0u, before + upto > place);
        if (beyond) {
            if (lane == __ffs(beyond) - 1) {
                drawn[draw] = first + lane;
                chances[draw] = (float)((double)own / (double)total);
            }
            return;
        }
        before += __shfl_sync(~0u, upto, 31);
    }
}
