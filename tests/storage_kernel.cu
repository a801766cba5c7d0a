// What the tests launch: each function of storage.cuh over arrays, in one block of 256 threads.

typedef long long int64;

enum What {
    DECODE_BFLOAT16, ENCODE_BFLOAT16, ENCODE_BFLOAT16_STOCHASTIC,
    DECODE_FLOAT16, ENCODE_FLOAT16, ENCODE_FLOAT16_STOCHASTIC,
    DECODE_SPLIT16, ENCODE_SPLIT16,
    DECODE_SPLIT8, ENCODE_SPLIT8, ENCODE_SPLIT8_STOCHASTIC,
    FILL_NOISE, DECODE_INT8, ENCODE_INT8, ENCODE_INT8_BY_8, ENCODE_INT8_BY_16
};

struct Arguments {
    int64 what, n, seed, t, first, stream;
    float *x, *y;  // y: v, where x is m
    unsigned short *p, *low, *noise;
    unsigned char *low8, *q_m, *q_v;
    Word* scales;
};

// Blocks of 64, each of LANES threads. Warps stay whole up to the end.
template <int LANES>
__device__ __forceinline__ void blocks(const Arguments& a) {
    constexpr int N = 64 / LANES;
    for (int64 warp = threadIdx.x / 32 * 32 * N; warp < a.n; warp += 256 * N) {
        const int64 i = warp + threadIdx.x % 32 * N;
        f32 m[N], v[N];
        Word q_m[N], q_v[N];
        for (int k = 0; k < N; ++k) {
            m[k] = {i + k < a.n ? a.x[i + k] : 0.0f};
            v[k] = {i + k < a.n ? a.y[i + k] : 0.0f};
            ratio(m[k], v[k], sqrt(v[k]));
        }
        Word* kept = i / 64 * 64 < a.n ? a.scales + i / 64 : nullptr;
        const Scales s = encode_int8<LANES>(m, v, scales_of(kept ? *kept : 0), a.first + i, a.t, q_m, q_v);
        if (kept && i % 64 == 0) *kept = word_of(s);
        for (int k = 0; k < N && i + k < a.n; ++k) {
            a.q_m[i + k] = q_m[k];
            a.q_v[i + k] = q_v[k];
        }
    }
}

extern "C" __global__ void convert(const __grid_constant__ Arguments a) {
    if (a.what == ENCODE_INT8) return blocks<4>(a);
    if (a.what == ENCODE_INT8_BY_8) return blocks<8>(a);
    if (a.what == ENCODE_INT8_BY_16) return blocks<16>(a);
    for (int64 i = threadIdx.x; i < a.n; i += 256) {
        const f32 x = {a.x[i]};
        f32 m, v;
        Split s;
        switch (a.what) {
            case DECODE_BFLOAT16: a.x[i] = decode_bfloat16(a.p[i]).x; break;
            case ENCODE_BFLOAT16: a.p[i] = encode_bfloat16(x); break;
            case ENCODE_BFLOAT16_STOCHASTIC: a.p[i] = encode_bfloat16(x, a.noise[i]); break;
            case DECODE_FLOAT16: a.x[i] = decode_float16(a.p[i]).x; break;
            case ENCODE_FLOAT16: a.p[i] = encode_float16(x); break;
            case ENCODE_FLOAT16_STOCHASTIC: a.p[i] = encode_float16(x, a.noise[i]); break;
            case DECODE_SPLIT16: a.x[i] = decode_split16({a.p[i], a.low[i]}).x; break;
            case ENCODE_SPLIT16: s = encode_split16(x), a.p[i] = s.p, a.low[i] = s.low; break;
            case DECODE_SPLIT8: a.x[i] = decode_split8({a.p[i], a.low8[i]}).x; break;
            case ENCODE_SPLIT8: s = encode_split8(x), a.p[i] = s.p, a.low8[i] = s.low; break;
            case ENCODE_SPLIT8_STOCHASTIC:
                s = encode_split8(x, a.noise[i]), a.p[i] = s.p, a.low8[i] = s.low;
                break;
            case FILL_NOISE: a.noise[i] = draw(a.seed, a.t, a.first + i / 8 * 8, a.stream).noise(i % 8); break;
            case DECODE_INT8:
                decode_int8(scales_of(a.scales[i / 64]), a.q_m[i], a.q_v[i], 0, m, v), a.x[i] = m.x, a.y[i] = v.x;
        }
    }
}
