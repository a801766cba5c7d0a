// The step over numbers of 16 and 8 bits: as step.cu, of which this is the other shell.
//
// What is printed before this says how p, g, the states and a master are kept (P, G, STATE, MASTER), whether they are
// rounded STOCHASTICally, and the rest as for step.cu; it defines `update` likewise.
//
// A thread takes N elements that follow each other: 8, which is what one draw of random bits serves, where it can load
// them at once, else 2. Then 8 threads of a warp, or all of it, take the 64 that share the scales of 8-bit states.
// Segments begin on a multiple of 128 of the canonical index and chunks on a multiple of 128 elements: so no block lies
// in two chunks, and no draw in two blocks.

typedef long long int64;

constexpr int THREADS = 256, BLOCK8 = 64;
#ifdef ON_DEVICE
constexpr int COEFFICIENT_BYTES = 192;  // of device memory, for those of a group
#define COEFFICIENT __ldg
#else
#define COEFFICIENT *
#endif

__device__ constexpr int bytes(Kind kind) {
    return kind == FLOAT32 || kind == NONE ? 4 : kind == SPLIT8 || kind == INT8 ? 1 : 2;
}

// As in step.cu; n counts elements. index: the canonical one of the first element. master, scales: null if there is none.
struct Segment {
    int64 n, first, group, index;
    char *p, *master, *scales;
    char* states[STATES];
};

struct Arguments {
    const Segment* segments;
    char* const* gradients;
    const int* segment_of_chunk;
    int64 chunk;
    Segment segment;
    char* gradient;
    int64 seed;
#ifdef ON_DEVICE
    Control* control;
    const char* coefficients;
#else
    int64 t;
    Number coefficients[GROUPS][COEFFICIENTS];
#endif
};

// N numbers of a few bytes, side by side in words.
template <int BYTES, int N>
struct Packed {
    Word words[(N * BYTES + 3) / 4];

    __device__ __forceinline__ Word operator[](int j) const {
        if constexpr (BYTES == 4)
            return words[j];
        else
            return words[j * BYTES / 4] >> (j * BYTES % 4 * 8) & ((1u << 8 * BYTES) - 1);
    }
    // Of x the lowest bytes; in the order of j: the first of a word makes it.
    __device__ __forceinline__ void put(int j, Word x) {
        Word& word = words[j * BYTES / 4];
        const int at = j * BYTES % 4;
        word = at == 0 ? x : __byte_perm(word, x, BYTES == 2 ? 0x5410 : at == 1 ? 0x3240 : at == 2 ? 0x3410 : 0x4210);
    }
};

// --- accesses of global memory: of 8 numbers at once, or of one ---------------------------------------------------------

#if defined(__CUDA_ARCH__)
#define FUSED_ADAM_WORDS(suffix, hint)                                                                                 \
    __device__ __forceinline__ void load##suffix(const char* a, Word (&w)[2]) {                                        \
        asm volatile("ld.global" hint ".v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(a) : "memory");         \
    }                                                                                                                  \
    __device__ __forceinline__ void load##suffix(const char* a, Word (&w)[4]) {                                        \
        asm volatile("ld.global" hint ".v4.u32 {%0, %1, %2, %3}, [%4];"                                                \
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(a) : "memory");                            \
    }                                                                                                                  \
    __device__ __forceinline__ void load##suffix(const char* a, Word (&w)[8]) {                                        \
        load##suffix(a, reinterpret_cast<Word(&)[4]>(w[0]));                                                           \
        load##suffix(a + 16, reinterpret_cast<Word(&)[4]>(w[4]));                                                      \
    }                                                                                                                  \
    __device__ __forceinline__ void store##suffix(char* a, const Word (&w)[2]) {                                       \
        asm volatile("st.global" hint ".v2.u32 [%0], {%1, %2};" ::"l"(a), "r"(w[0]), "r"(w[1]) : "memory");            \
    }                                                                                                                  \
    __device__ __forceinline__ void store##suffix(char* a, const Word (&w)[4]) {                                       \
        asm volatile("st.global" hint ".v4.u32 [%0], {%1, %2, %3, %4};"                                                \
                     ::"l"(a), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");                                 \
    }                                                                                                                  \
    __device__ __forceinline__ void store##suffix(char* a, const Word (&w)[8]) {                                       \
        store##suffix(a, reinterpret_cast<const Word(&)[4]>(w[0]));                                                    \
        store##suffix(a + 16, reinterpret_cast<const Word(&)[4]>(w[4]));                                               \
    }
#else
#define FUSED_ADAM_WORDS(suffix, hint)                                                                                 \
    template <int N>                                                                                                   \
    inline void load##suffix(const char* a, Word (&w)[N]) {                                                            \
        for (int k = 0; k < N; ++k) w[k] = reinterpret_cast<const Word*>(a)[k];                                        \
    }                                                                                                                  \
    template <int N>                                                                                                   \
    inline void store##suffix(char* a, const Word (&w)[N]) {                                                           \
        for (int k = 0; k < N; ++k) reinterpret_cast<Word*>(a)[k] = w[k];                                              \
    }
#endif

FUSED_ADAM_WORDS(, "")
FUSED_ADAM_WORDS(_once, ".cs")

#undef FUSED_ADAM_WORDS

#if defined(__CUDA_ARCH__)
template <int BYTES>
__device__ __forceinline__ Word load_one(const char* a) {
    Word w;
    if constexpr (BYTES == 4)
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(w) : "l"(a) : "memory");
    else if constexpr (BYTES == 2)
        asm volatile("{ .reg .u16 x; ld.global.u16 x, [%1]; cvt.u32.u16 %0, x; }" : "=r"(w) : "l"(a) : "memory");
    else
        asm volatile("ld.global.u8 %0, [%1];" : "=r"(w) : "l"(a) : "memory");
    return w;
}
template <int BYTES>
__device__ __forceinline__ void store_one(char* a, Word w) {
    if constexpr (BYTES == 4)
        asm volatile("st.global.u32 [%0], %1;" ::"l"(a), "r"(w) : "memory");
    else if constexpr (BYTES == 2)
        asm volatile("{ .reg .u16 x; cvt.u16.u32 x, %1; st.global.u16 [%0], x; }" ::"l"(a), "r"(w) : "memory");
    else
        asm volatile("st.global.u8 [%0], %1;" ::"l"(a), "r"(w) : "memory");
}
#else
template <int BYTES>
inline Word load_one(const char* a) {
    if (BYTES == 4) return *reinterpret_cast<const Word*>(a);
    return BYTES == 2 ? *reinterpret_cast<const unsigned short*>(a) : *reinterpret_cast<const unsigned char*>(a);
}
template <int BYTES>
inline void store_one(char* a, Word w) {
    if (BYTES == 4) *reinterpret_cast<Word*>(a) = w;
    else if (BYTES == 2) *reinterpret_cast<unsigned short*>(a) = w;
    else *a = w;
}
#endif

// left: how many of the N numbers from element i on there are; of 8 all or none. ONCE: see step.cuh.
template <bool ONCE, int BYTES, int N>
__device__ __forceinline__ void take(Packed<BYTES, N>& x, const char* array, int64 i, int left) {
    array += i * BYTES;
    if constexpr (N == 8) {
        if (left > 0) {
            if constexpr (ONCE) load_once(array, x.words);
            else load(array, x.words);
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) x.put(j, j < left ? load_one<BYTES>(array + j * BYTES) : 0);
    }
}

template <bool ONCE, int BYTES, int N>
__device__ __forceinline__ void give(const Packed<BYTES, N>& x, char* array, int64 i, int left) {
    array += i * BYTES;
    if constexpr (N == 8) {
        if (left > 0) {
            if constexpr (ONCE) store_once(array, x.words);
            else store(array, x.words);
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (j < left) store_one<BYTES>(array + j * BYTES, x[j]);
    }
}

// --- one number -------------------------------------------------------------------------------------------------------

template <Kind KIND>
__device__ __forceinline__ f32 decode(Word stored) {
    if constexpr (KIND == BFLOAT16) return decode_bfloat16(stored);
    else if constexpr (KIND == FLOAT16) return decode_float16(stored);
    else return float_of(stored);
}

// noise: of which there may be none.
template <Kind KIND, class... Noise>
__device__ __forceinline__ Word encode(f32 x, Noise... noise) {
    if constexpr (KIND == BFLOAT16) return encode_bfloat16(x, noise...);
    else if constexpr (KIND == FLOAT16) return encode_float16(x, noise...);
    else return bits_of(x);
}

__device__ __forceinline__ f32 decode_parameter(Word p, Word master) {
    if constexpr (MASTER == FLOAT32) return float_of(master);
    else if constexpr (MASTER == SPLIT16) return decode_split16({p, master});
    else if constexpr (MASTER == SPLIT8) return decode_split8({p, master});
    else return decode<P>(p);
}

template <class... Noise>
__device__ __forceinline__ Split encode_parameter(f32 x, Noise... noise) {
    if constexpr (MASTER == FLOAT32) return {encode<P>(x), bits_of(x)};
    else if constexpr (MASTER == SPLIT16) return encode_split16(x);
    else if constexpr (MASTER == SPLIT8) return encode_split8(x, noise...);
    else return {encode<P>(x, noise...), 0};
}

// What is rounded to fewer bits than it was computed with, and not by a dither of its own.
constexpr bool ROUNDS_P = STOCHASTIC && P != FLOAT32 && (MASTER == NONE || MASTER == SPLIT8);
constexpr bool ROUNDS_STATES = STOCHASTIC && (STATE == FLOAT16 || STATE == BFLOAT16);

// --- the step ---------------------------------------------------------------------------------------------------------

// 16 random bits for each of N elements.
template <int N>
struct Noise {
    Word words[N / 2];
    __device__ __forceinline__ Word operator[](int j) const { return words[j / 2] >> (j % 2 * 16) & 0xffff; }
};

template <int N>
__device__ __forceinline__ Noise<N> noise_of(const Arguments& a, int64 t, int64 index, Word stream) {
    const Draw d = draw(a.seed, t, index, stream);
    if constexpr (N == 8) {
        return {{d.words[0], d.words[1], d.words[2], d.words[3]}};
    } else {
        const Word lower = index & 2 ? d.words[1] : d.words[0], upper = index & 2 ? d.words[3] : d.words[2];
        return {{index & 4 ? upper : lower}};
    }
}

// Elements lo .. hi, of which there are whole blocks of 64 where N is 8. All loads of a thread stand before its first
// store. Warps stay whole, for their threads tell each other the largest numbers of blocks.
template <int N>
__device__ __forceinline__ void pass(
    const Arguments& a, const Segment& s, char* gradient, const T* c, int64 t, int64 lo, int64 hi
) {
#pragma unroll 1
    for (int64 start = lo; start < hi; start += THREADS * N) {
        const int64 i = start + threadIdx.x * N, index = s.index + i;
        const int left = static_cast<int>(hi - i);
        Packed<bytes(P), N> p = {}, new_p = {};
        Packed<bytes(MASTER), N> master = {}, new_master = {};
        Packed<bytes(G), N> g = {};
        Packed<bytes(STATE), N> states[STATES] = {};
        Word scales = 0;
        if (MASTER != FLOAT32) take<false>(p, s.p, i, left);
        if (MASTER != NONE) take<true>(master, s.master, i, left);
        take<true>(g, gradient, i, left);
#pragma unroll
        for (int k = 0; k < STATES; ++k) take<true>(states[k], s.states[k], i, left);
        if (STATE == INT8 && left > 0) scales = load_one<4>(s.scales + i / BLOCK8 * 4);

        Noise<N> noise = {};
        if constexpr (ROUNDS_P) noise = noise_of<N>(a, t, index, 0);
        f32 rows[STATES][N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
            T x = {decode_parameter(p[j], master[j]).x}, row[STATES];
            if constexpr (STATE == INT8) {
                const Word q_m = states[0].words[j / 4], q_v = states[STATES - 1].words[j / 4];
                decode_int8(scales_of(scales), q_m, q_v, j % 4, rows[0][j], rows[STATES - 1][j]);
            } else {
#pragma unroll
                for (int k = 0; k < STATES; ++k) rows[k][j] = decode<STATE>(states[k][j]);
            }
#pragma unroll
            for (int k = 0; k < STATES; ++k) row[k] = {rows[k][j].x};
            update(x, {decode<G>(g[j]).x}, row, c);
#pragma unroll
            for (int k = 0; k < STATES; ++k) rows[k][j] = {row[k].x};
            if constexpr (STATE == INT8) {
                f32 &m = rows[0][j], &v = rows[STATES - 1][j];
                ratio(m, v, root_of(v, x));
            }
            Split kept;
            if constexpr (ROUNDS_P) kept = encode_parameter(f32{x.x}, noise[j]);
            else kept = encode_parameter(f32{x.x});
            new_p.put(j, kept.p);
            new_master.put(j, kept.low);
        }
        give<false>(new_p, s.p, i, left);
        if (MASTER != NONE) give<true>(new_master, s.master, i, left);

        if constexpr (STATE == INT8) {
            f32(&rho)[N] = rows[0], (&root)[N] = rows[STATES - 1];  // 0 of absent elements, as all of these is
            Word q_m[N], q_v[N];
            scales = word_of(encode_int8<BLOCK8 / N>(rho, root, scales_of(scales), index, t, q_m, q_v));
#pragma unroll
            for (int j = 0; j < N; ++j) states[0].put(j, q_m[j]), states[STATES - 1].put(j, q_v[j]);
            __syncwarp();  // all have read the scales
            if (left > 0 && i % BLOCK8 == 0) store_one<4>(s.scales + i / BLOCK8 * 4, scales);
        } else {
#pragma unroll
            for (int k = 0; k < STATES; ++k) {
                if constexpr (ROUNDS_STATES) noise = noise_of<N>(a, t, index, k + 1);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    if constexpr (ROUNDS_STATES) states[k].put(j, encode<STATE>(rows[k][j], noise[j]));
                    else states[k].put(j, encode<STATE>(rows[k][j]));
                }
            }
        }
#pragma unroll
        for (int k = 0; k < STATES; ++k) give<true>(states[k], s.states[k], i, left);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, ROUNDS_P || ROUNDS_STATES ? 3 : 4)
NAME(const __grid_constant__ Arguments a) {
    const int k = a.segments ? a.segment_of_chunk[blockIdx.x] : 0;
    const Segment s = a.segments ? a.segments[k] : a.segment;
    char* g = a.segments ? a.gradients[k] : a.gradient;

    const int64 lo = (blockIdx.x - s.first) * a.chunk;
    const int64 hi = lo + a.chunk < s.n ? lo + a.chunk : s.n;
    unsigned long long bits = reinterpret_cast<unsigned long long>(s.p) | reinterpret_cast<unsigned long long>(g);
    bits |= reinterpret_cast<unsigned long long>(s.master);
#pragma unroll
    for (int state = 0; state < STATES; ++state) bits |= reinterpret_cast<unsigned long long>(s.states[state]);
    const int64 middle = bits % 16 == 0 ? hi - hi % BLOCK8 : lo;  // chunks start on multiples of a block
#ifdef ON_DEVICE
    if (a.control->skips) return;
    const Number* mine = reinterpret_cast<const Number*>(a.coefficients + s.group * COEFFICIENT_BYTES);
    const int64 t = a.control->t;
#else
    const Number* mine = a.coefficients[s.group];
    const int64 t = a.t;
#endif
    T c[COEFFICIENTS];
#pragma unroll
    for (int k = 0; k < COEFFICIENTS; ++k) c[k] = {COEFFICIENT(mine + k)};
    pass<8>(a, s, g, c, t, lo, middle);
    pass<2>(a, s, g, c, t, middle, hi);
}
