/* Q4_K, Q5_K and Q6_K with the bytes of ggml's own quantizers, several times as fast.

   A K-quantizer tries some twenty scales for every sub-block of 32 or 16 weights and sums up the error of each. The sums are of floats, so
   their order counts; one after the other, each addition waits for the last. Here as many sub-blocks as a vector has lanes are searched side
   by side, and within its lane every sum keeps ggml's order. Nothing may be contracted, reordered or flushed: see lanes.py for the flags. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define SUPER 256 /* weights of a block */
#define SIDE 16   /* sub-blocks at once: two blocks of Q4_K or Q5_K, one of Q6_K */
#define ALWAYS static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static const float MAGIC = 12582912.f; /* 1.5 * 2^23: what is added to it is rounded to a whole number, in its low bits */
static const float NONE = 1e-15f;      /* Q6_K takes smaller weights for zeros */

ALWAYS floats pick(ints which, floats yes, floats no) { return (floats)((which & (ints)yes) | (~which & (ints)no)); }

ALWAYS floats magnitude(floats a) { return (floats)((ints)a & 0x7fffffff); }

ALWAYS floats load(const float *from) {
    floats a;
    memcpy(&a, from, sizeof a);
    return a;
}

ALWAYS void store(float *to, floats a) { memcpy(to, &a, sizeof a); }

/* The whole number nearest to `a`, as ggml takes it from the low 23 bits whatever `a` is, but between `low` and `high`. */
ALWAYS floats level(floats a, float low, float high) {
    const floats floor = (floats){0} + (MAGIC + low), ceiling = (floats){0} + (MAGIC + high);
    a = (floats)((((ints)(a + MAGIC)) & 0x7fffff) | 0x4b000000);
    a = pick(a < ceiling, a, ceiling);
    a = pick(a > floor, a, floor);
    return a - MAGIC;
}

static int nearest(float a) {
    int32_t bits;
    a += MAGIC;
    memcpy(&bits, &a, 4);
    return (bits & 0x7fffff) - 0x400000;
}

static uint16_t to_half(float a) {
    uint32_t bits;
    memcpy(&bits, &a, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) { /* denormal: rounded by an addition */
        memcpy(&a, &bits, 4);
        a += 0.5f;
        memcpy(&bits, &a, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

static float from_half(uint16_t half) {
    const uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float a;
    memcpy(&a, &bits, 4);
    a *= 0x1p112f;
    return half & 0x8000 ? -a : a;
}

/* What a search finds for each sub-block. level(step * (x - base)): the levels that gave the scale. weight: of all. */
struct found {
    float scale[SIDE], low[SIDE], step[SIDE], base[SIDE], weight[SIDE];
};

/* LANES sub-blocks of `size` weights that lie one after the other, so that each becomes a lane. */
ALWAYS void side_by_side(const float *from, int size, floats *to) {
    float lanes[32][LANES];
    for (int v = 0; v < LANES; v++)
        for (int i = 0; i < size; i++) lanes[i][v] = from[v * size + i];
    for (int i = 0; i < size; i++) to[i] = load(lanes[i]);
}

/* Where a search looks: levels 0 to `top`, `steps` divisions of the range, `delta` apart from `first` on. */
struct range {
    float top, first, delta;
    int steps;
};

/* Scale and minimum of sub-blocks of 32, by least squares with `weights`, or else with weights that grow with x. */
ALWAYS void search_pairs(const float *from, const float *weights, struct range range, struct found *found, int at) {
    const floats zero = {0};
    const float top = range.top;
    floats x[32], w[32], levels[32], mean = zero;
    side_by_side(from, 32, x);
    if (weights) {
        side_by_side(weights, 32, w);
    } else {
        for (int i = 0; i < 32; i++) mean += x[i] * x[i];
        mean /= 32.f;
        for (int v = 0; v < LANES; v++) mean[v] = __builtin_sqrtf(mean[v]);
        for (int i = 0; i < 32; i++) w[i] = mean + magnitude(x[i]);
    }

    floats low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < 32; i++) {
        low = pick(x[i] < low, x[i], low);
        high = pick(x[i] > high, x[i], high);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    low = pick(low > zero, zero, low);
    const ints flat = high == low;
    const floats lowest = low;

    floats step = top / (high - low), base = low, scale = 1.f / step, best = zero;
    for (int i = 0; i < 32; i++) {
        const floats error = scale * level(step * (x[i] - low), 0, top) + low - x[i];
        best += w[i] * (error * error);
    }
    for (int n = 0; n <= range.steps; n++) {
        const floats trial = (range.first + range.delta * (float)n + top) / (high - low);
        floats sum_l = zero, sum_l2 = zero, sum_xl = zero, sum_error = zero;
        for (int i = 0; i < 32; i++) {
            const floats l = level(trial * (x[i] - low), 0, top), wl = w[i] * l;
            levels[i] = l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[i];
        }
        const floats divisor = sum_w * sum_l2 - sum_l * sum_l;
        floats this_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor;
        floats this_low = (sum_l2 * sum_x - sum_l * sum_xl) / divisor;
        const ints above = this_low > zero;
        this_scale = pick(above, sum_xl / sum_l2, this_scale);
        this_low = pick(above, zero, this_low);
        for (int i = 0; i < 32; i++) {
            const floats error = this_scale * levels[i] + this_low - x[i];
            sum_error += w[i] * (error * error);
        }
        const ints better = (divisor > zero) & (sum_error < best);
        best = pick(better, sum_error, best);
        step = pick(better, trial, step);
        base = pick(better, low, base);
        scale = pick(better, this_scale, scale);
        low = pick(better, this_low, low);
    }
    store(found->scale + at, pick(flat, zero, scale));
    store(found->low + at, -pick(flat, lowest, low));
    store(found->step + at, pick(flat, zero, step));
    store(found->base + at, pick(flat, lowest, base));
    store(found->weight + at, sum_w);
}

/* Scale of sub-blocks of 16 with levels -32 to 31. weights: none for squares. step: 0 where all is as good as zero. */
ALWAYS void search_scales(const float *from, const float *weights, struct found *found, int at) {
    const floats zero = {0};
    floats x[16], w[16], peak = zero, size = zero;
    side_by_side(from, 16, x);
    if (weights) side_by_side(weights, 16, w);
    for (int i = 0; i < 16; i++) {
        const ints larger = magnitude(x[i]) > size;
        size = pick(larger, magnitude(x[i]), size);
        peak = pick(larger, x[i], peak);
        if (!weights) w[i] = x[i] * x[i];
    }
    const ints empty = size < NONE;
    floats scale = zero, best = zero, step = zero;
    for (int n = -10; n <= 9; n++) { /* -10 stands for 0, which comes first */
        if (n == 0) continue;
        const floats trial = (n == -10 ? -32.f : -(32.f + 0.1f * (float)n)) / peak;
        floats sum_xl = zero, sum_l2 = zero;
        for (int i = 0; i < 16; i++) {
            const floats l = level(trial * x[i], -32, 31);
            sum_xl += w[i] * x[i] * l;
            sum_l2 += w[i] * l * l;
        }
        ints better = (sum_l2 > zero) & (sum_xl * sum_xl > best * sum_l2);
        if (n == -10) better = ~(ints){0};
        const floats this_scale = pick(sum_l2 == zero, zero, sum_xl / sum_l2);
        scale = pick(better, this_scale, scale);
        best = pick(better, this_scale * sum_xl, best);
        step = pick(better, trial, step);
    }
    store(found->scale + at, pick(empty, zero, scale));
    store(found->step + at, pick(empty, zero, step));
}

/* level((x + shift) * factor), or / factor, of `size` weights. */
ALWAYS void round_up(const float *x, int size, float shift, float factor, int divide, float low, float high, uint8_t *to) {
    float rounded[32];
    for (int i = 0; i < size; i += LANES) {
        const floats a = load(x + i) + shift;
        store(rounded + i, level(divide ? a / factor : a * factor, low, high) - low);
    }
    for (int i = 0; i < size; i++) to[i] = (uint8_t)(int)rounded[i];
}

/* The 6-bit levels of eight scales or minima that are as good as can be, each with its weight; gives the scale of these. */
static float settle_six(const float *x, const float *weight, uint8_t *levels) {
    float peak = 0;
    for (int i = 0; i < 8; i++)
        if (!(peak > x[i])) peak = x[i];
    if (peak < NONE) {
        memset(levels, 0, 8);
        return 0;
    }
    float step = 63.f / peak, best = 0;
    const float scale = 1 / step;
    for (int i = 0; i < 8; i++) {
        const float error = x[i] - scale * (float)(uint8_t)nearest(step * x[i]);
        best += weight[i] * error * error;
    }
    for (int n = -4; n <= 4; n++) {
        if (n == 0) continue;
        const float trial = (0.1f * (float)n + 63.f) / peak, this_scale = 1 / trial;
        float sum = 0;
        for (int i = 0; i < 8; i++) {
            const int l = nearest(trial * x[i]);
            const float error = x[i] - this_scale * (float)(l < 63 ? l : 63);
            sum += weight[i] * error * error;
        }
        if (sum < best) best = sum, step = trial;
    }
    float sum_xl = 0, sum_l2 = 0;
    for (int i = 0; i < 8; i++) {
        int l = nearest(step * x[i]);
        l = l < 63 ? l : 63;
        levels[i] = (uint8_t)l;
        sum_xl += weight[i] * x[i] * (float)l;
        sum_l2 += weight[i] * (float)l * (float)l;
    }
    for (int round = 0, changed = 1; round < 5 && changed; round++) {
        changed = 0;
        for (int i = 0; i < 8; i++) {
            const float w = weight[i], old = (float)levels[i];
            float xl = sum_xl - w * x[i] * old, l2 = sum_l2 - w * old * old;
            if (!(xl > 0 && l2 > 0)) continue;
            int l = nearest(x[i] * l2 / xl);
            l = l < 63 ? l : 63;
            if (l == levels[i]) continue;
            xl += w * x[i] * (float)l;
            l2 += w * (float)l * (float)l;
            if (xl * xl * sum_l2 > sum_xl * sum_xl * l2) {
                levels[i] = (uint8_t)l, sum_xl = xl, sum_l2 = l2;
                changed = 1;
            }
        }
    }
    return sum_l2 > 0 ? sum_xl / sum_l2 : 0;
}

/* The same without weights: the largest becomes 63. */
static float settle_largest(const float *x, uint8_t *levels) {
    float peak = 0;
    for (int i = 0; i < 8; i++)
        if (x[i] > peak) peak = x[i];
    const float step = peak > 0 ? 63.f / peak : 0.f;
    for (int i = 0; i < 8; i++) levels[i] = (uint8_t)nearest(step * x[i]);
    return peak / 63.f;
}

/* Scales and minima in 6 bits, and the levels. to: two halves, then 12 bytes. clamp: what does not fit into 6 bits. */
ALWAYS void settle_pairs(const float *x, const struct found *found, int at, int weighted, int clamp, float top, uint8_t *to, uint8_t *levels) {
    const float *scale = found->scale + at, *low = found->low + at, *weight = found->weight + at;
    uint8_t s[8], m[8], *bits = to + 4;
    const uint16_t halves[2] = {
        to_half(weighted ? settle_six(scale, weight, s) : settle_largest(scale, s)),
        to_half(weighted ? settle_six(low, weight, m) : settle_largest(low, m)),
    };
    memcpy(to, halves, 4);
    for (int j = 0; j < 8; j++) {
        if (clamp && s[j] > 63) s[j] = 63;
        if (clamp && m[j] > 63) m[j] = 63;
    }
    for (int j = 0; j < 4; j++) {
        bits[j] = (uint8_t)(s[j] | s[j + 4] >> 4 << 6);
        bits[j + 4] = (uint8_t)(m[j] | m[j + 4] >> 4 << 6);
        bits[j + 8] = (uint8_t)((s[j + 4] & 15) | (m[j + 4] & 15) << 4);
    }
    for (int j = 0; j < 8; j++) {
        /* As it will be read. */
        const int six_s = j < 4 ? bits[j] & 63 : (bits[j + 4] & 15) | bits[j - 4] >> 6 << 4;
        const int six_m = j < 4 ? bits[j + 4] & 63 : bits[j + 4] >> 4 | bits[j] >> 6 << 4;
        const float d = from_half(halves[0]) * (float)six_s;
        if (d != 0)
            round_up(x + 32 * j, 32, from_half(halves[1]) * (float)six_m, d, 1, 0, top, levels + 32 * j);
        else
            round_up(x + 32 * j, 32, -found->base[at + j], found->step[at + j], 0, 0, top, levels + 32 * j);
    }
}

/* What ggml weighs the errors of a block with: how much a column matters, and the size of x in the block. */
static void weigh(const float *x, const float *importance, float *weights) {
    float sum = 0;
    for (int i = 0; i < SUPER; i++) sum += x[i] * x[i];
    const float mean = 2 * sum / SUPER;
    for (int i = 0; i < SUPER; i++) weights[i] = importance[i] * __builtin_sqrtf(mean + x[i] * x[i]);
}

/* importance: of the `row` blocks of a row; none if 0. high_bits: bytes of a block with the fifth bits. */
ALWAYS void pairs(const float *from, uint8_t *to, int64_t blocks, const float *importance, int64_t row, struct range range, int high_bits) {
    for (int64_t b = 0; b < blocks; b += 2) {
        const int count = blocks - b < 2 ? 1 : 2;
        struct found found;
        float x[SIDE * 32] = {0}, weights[SIDE * 32] = {0};
        memcpy(x, from + b * SUPER, (size_t)count * SUPER * sizeof *x);
        for (int k = 0; importance && k < count; k++) weigh(x + k * SUPER, importance + (b + k) % row * SUPER, weights + k * SUPER);
        for (int at = 0; at < 8 * count; at += LANES) search_pairs(x + 32 * at, importance ? weights + 32 * at : 0, range, &found, at);
        for (int k = 0; k < count; k++, to += 144 + high_bits) {
            uint8_t l[SUPER], *high = to + 16, *low = high + high_bits;
            settle_pairs(x + k * SUPER, &found, 8 * k, importance != 0, !importance || high_bits, range.top, to, l);
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < 32; i++) low[32 * j + i] = (uint8_t)((l[64 * j + i] & 15) | l[64 * j + 32 + i] << 4);
            for (int i = 0; i < high_bits; i++) {
                unsigned all = 0;
                for (int j = 0; j < 8; j++) all |= (unsigned)(l[32 * j + i] >> 4) << j;
                high[i] = (uint8_t)all;
            }
        }
    }
}

/* Each: blocks * 256 finite weights, smaller than 65520, from `x` to blocks * 144, 176 and 210 bytes.
   importance: of the columns, if known; it starts anew after `row` blocks. */

void quantize_q4_k(const float *x, uint8_t *to, int64_t blocks, const float *importance, int64_t row) {
    if (importance)
        pairs(x, to, blocks, importance, row, (struct range){15, -0.9f, 0.05f, 36}, 0);
    else
        pairs(x, to, blocks, 0, 1, (struct range){15, -1.f, 0.1f, 20}, 0);
}

void quantize_q5_k(const float *x, uint8_t *to, int64_t blocks, const float *importance, int64_t row) {
    if (importance)
        pairs(x, to, blocks, importance, row, (struct range){31, -0.9f, 0.05f, 36}, 32);
    else
        pairs(x, to, blocks, 0, 1, (struct range){31, -0.5f, 0.1f, 15}, 32);
}

void quantize_q6_k(const float *x, uint8_t *to, int64_t blocks, const float *importance, int64_t row) {
    for (int64_t b = 0; b < blocks; b++, x += SUPER, to += 210) {
        struct found found;
        const float *weights = importance ? importance + b % row * SUPER : 0;
        for (int at = 0; at < SIDE; at += LANES) {
            if (weights)
                search_scales(x + 16 * at, weights + 16 * at, &found, at);
            else
                search_scales(x + 16 * at, 0, &found, at);
        }
        float peak = 0, size = 0;
        for (int j = 0; j < 16; j++) {
            const float a = __builtin_fabsf(found.scale[j]);
            if (a > size) size = a, peak = found.scale[j];
        }
        if (size < NONE) {
            memset(to, 0, 210);
            continue;
        }
        const float per_scale = -128.f / peak;
        const uint16_t half = to_half(1 / per_scale);
        uint8_t l[SUPER], *low = to, *high = to + 128, *scales = to + 192;
        memcpy(to + 208, &half, 2);
        for (int j = 0; j < 16; j++) {
            const int rounded = nearest(per_scale * found.scale[j]);
            const int8_t scale = (int8_t)(rounded < 127 ? rounded : 127);
            scales[j] = (uint8_t)scale;
            const float d = from_half(half) * (float)scale;
            if (d != 0)
                round_up(x + 16 * j, 16, 0, d, 1, -32, 31, l + 16 * j);
            else if (found.step[j] != 0)
                round_up(x + 16 * j, 16, 0, found.step[j], 0, -32, 31, l + 16 * j);
            else
                memset(l + 16 * j, 0, 16);
        }
        for (int k = 0; k < 2; k++)
            for (int i = 0; i < 32; i++) {
                const uint8_t *q = l + 128 * k + i;
                low[64 * k + i] = (uint8_t)((q[0] & 15) | (q[64] & 15) << 4);
                low[64 * k + 32 + i] = (uint8_t)((q[32] & 15) | (q[96] & 15) << 4);
                high[32 * k + i] = (uint8_t)(q[0] >> 4 | q[32] >> 4 << 2 | q[64] >> 4 << 4 | q[96] >> 4 << 6);
            }
    }
}
