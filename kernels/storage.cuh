// How numbers are kept: fused_adam/_storage.py, _philox.py and _int8.py on the device, with the same bits. Integers, and
// the operators of step.cuh, which no compiler's option changes; nothing that would take a header.
//
// A word is 32 bits. Numbers of 16 and 8 bits come and go in the lower bits of one: loads and stores, of as many as make
// an access wide, are the caller's, and so is what `noise` of 16 random bits an element takes.

typedef unsigned Word;

enum Kind { NONE, FLOAT32, FLOAT16, BFLOAT16, SPLIT16, SPLIT8, INT8 };

__device__ __forceinline__ Word bits_of(f32 x) { return __float_as_uint(x.x); }
__device__ __forceinline__ f32 float_of(Word bits) { return {__uint_as_float(bits)}; }

constexpr Word MAGNITUDE = 0x7fffffff, INFINITY_BITS = 0x7f800000, NAN_BITS = 0x7fc00000;

// Without their sign by a shift: NVRTC would make a mask and a comparison one of floats, which flushes under -ftz=true.
__device__ __forceinline__ bool is_nan(Word w) { return w << 1 > INFINITY_BITS << 1; }
__device__ __forceinline__ bool is_finite(Word w) { return w << 1 < INFINITY_BITS << 1; }

__device__ __forceinline__ Word least(Word a, Word b) { return a < b ? a : b; }
__device__ __forceinline__ Word most(Word a, Word b) { return a > b ? a : b; }

// --- 16 bits ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ f32 decode_bfloat16(Word stored) { return float_of(stored << 16); }

__device__ __forceinline__ Word encode_bfloat16(f32 x) {
    const Word w = bits_of(x);
    return is_nan(w) ? NAN_BITS >> 16 : (w + 0x7fff + (w >> 16 & 1)) >> 16;
}

__device__ __forceinline__ Word encode_bfloat16(f32 x, Word noise) {
    const Word w = bits_of(x), a = w & MAGNITUDE;
    return is_nan(w) ? NAN_BITS >> 16 : (w + (a >= 0x7f7f0000 ? 0x8000 : noise)) >> 16;
}

// The product mends the exponent, and gives a subnormal number one.
__device__ __forceinline__ f32 decode_float16(Word stored) {
    const Word a = stored & 0x7fff, special = a >= 0x7c00 ? INFINITY_BITS : 0;
    const f32 unscale = {0x1p112f};
    return float_of(bits_of(float_of(a << 13) * unscale) | special | (stored & 0x8000) << 16);
}

// The sum rounds what is subnormal in float16, in units of its last bit.
__device__ __forceinline__ Word encode_float16(f32 x) {
    const Word w = bits_of(x), a = w & MAGNITUDE;
    const Word normal = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;
    const Word small = bits_of(float_of(a) + f32{0.5f}) - 0x3f000000;
    const Word h = least(a < 0x38800000 ? small : normal, 0x7c00) | (w >> 16 & 0x8000);
    return is_nan(w) ? 0x7e00 : h;
}

__device__ __forceinline__ Word encode_float16(f32 x, Word noise) {
    const Word w = bits_of(x), a = w & MAGNITUDE;
    const Word small = bits_of(float_of(a) + f32{0x1p-14f}) - 0x38800000;
    const Word fixed = a < 0x38800000 ? small : a - 0x38000000;
    const Word h = (fixed + (a >= 0x477fe000 ? 0x1000 : noise >> 3)) >> 13;
    return is_nan(w) ? 0x7e00 : least(h, 0x7c00) | (w >> 16 & 0x8000);
}

// --- a bfloat16 parameter, and what is beside it of float32 -----------------------------------------------------------

struct Split {
    Word p, low;
};

__device__ __forceinline__ f32 decode_split16(Split s) {
    return float_of((s.p << 16) + static_cast<Word>(static_cast<short>(s.low)));
}

__device__ __forceinline__ Split encode_split16(f32 x) {
    Word w = bits_of(x);
    w = is_nan(w) ? NAN_BITS : w;
    return {(w + 0x8000) >> 16, w & 0xffff};
}

__device__ __forceinline__ f32 decode_split8(Split s) {
    return float_of((s.p << 16) + static_cast<Word>(static_cast<signed char>(s.low)) * 256);
}

__device__ __forceinline__ Split encode_split8(f32 x) {
    Word w = bits_of(x);
    w = is_nan(w) ? NAN_BITS : w + 0x7f + (w >> 8 & 1);
    return {(w + 0x8000) >> 16, w >> 8 & 0xff};
}

__device__ __forceinline__ Split encode_split8(f32 x, Word noise) {
    Word w = bits_of(x);
    w = is_nan(w) ? NAN_BITS : w + ((w & MAGNITUDE) >= 0x7f7fff00 ? 0x80 : noise >> 8);
    return {(w + 0x8000) >> 16, w >> 8 & 0xff};
}

// --- random bits ------------------------------------------------------------------------------------------------------

// Philox-4x32-10: the counter becomes the draw.
__device__ __forceinline__ void philox(Word (&c)[4], Word k0, Word k1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long p0 = 0xd2511f53ull * c[0], p1 = 0xcd9e8d57ull * c[2];
        c[0] = static_cast<Word>(p1 >> 32) ^ c[1] ^ k0;
        c[1] = static_cast<Word>(p1);
        c[2] = static_cast<Word>(p0 >> 32) ^ c[3] ^ k1;
        c[3] = static_cast<Word>(p0);
        k0 += 0x9e3779b9;
        k1 += 0xbb67ae85;
    }
}

struct Draw {
    Word words[4];
    __device__ __forceinline__ Word noise(int j) const { return words[j / 2] >> (j % 2 * 16) & 0xffff; }
};

// For the 8 elements, from one whose canonical index is a multiple of 8 on, of which `first` is one. stream: 0 for p, 1 and so on for its states.
__device__ __forceinline__ Draw draw(unsigned long long seed, unsigned long long t, unsigned long long first, Word stream) {
    const unsigned long long number = first / 8;
    Draw d = {{
        static_cast<Word>(number),
        static_cast<Word>(number >> 32) | stream << 28,
        static_cast<Word>(t),
        static_cast<Word>(t >> 32),
    }};
    philox(d.words, static_cast<Word>(seed), static_cast<Word>(seed >> 32));
    return d;
}

// --- states in 8 bits -------------------------------------------------------------------------------------------------

// As they are kept, side by side in a word: S_rho lower, S_v upper.
struct Scales {
    f32 rho, v;
};
__device__ __forceinline__ Scales scales_of(Word kept) { return {float_of(kept << 16), float_of(kept & 0xffff0000)}; }
__device__ __forceinline__ Word word_of(Scales s) { return bits_of(s.rho) >> 16 | bits_of(s.v); }

constexpr Word INTEGER = 0x4b000000;  // 2**23, whose lower bits are those of an integer: faster than a conversion

// Byte j of a word as a float.
__device__ __forceinline__ f32 from_byte(Word w, int j) {
    return float_of(__byte_perm(w, INTEGER, 0x7650 + j)) - f32{0x1p23f};
}
__device__ __forceinline__ f32 from_signed_byte(Word w, int j) {
    return float_of(__byte_perm(w ^ 0x80808080, INTEGER, 0x7650 + j)) - f32{0x1p23f + 128};
}

// The integer below x, for x from 0 to 2**23, in the lower bits of INTEGER.
__device__ __forceinline__ Word floor_of(f32 x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("add.rz.f32 %0, %1, 0f4B000000;" : "=f"(y) : "f"(x.x));
    return __float_as_uint(y);
#else
    return INTEGER + static_cast<Word>(x.x);
#endif
}

// The root of 0, and of x from 2**-101 on: what the instruction for a root expands to, without the guard that takes all
// other numbers elsewhere. Of what is between, any number from 0 to 2**-50.
__device__ __forceinline__ f32 root(f32 x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("{ .reg .f32 y, s, h, e;"
        " max.f32 y, %1, 0f0D000000; rsqrt.approx.ftz.f32 y, y; mul.rn.ftz.f32 s, %1, y; mul.rn.ftz.f32 h, y, 0f3F000000;"
        " neg.f32 e, s; fma.rn.f32 e, e, s, %1; fma.rn.f32 %0, e, h, s; }"
        : "=f"(y)
        : "f"(x.x));
    return {y};
#else
    return sqrt(x);
#endif
}

// q_m, q_v: byte j of each. The factors are 1 / 255 and 1 / 127.
__device__ __forceinline__ void decode_int8(Scales scales, Word q_m, Word q_v, int j, f32& m, f32& v) {
    const f32 x = from_byte(q_v, j) * f32{0x1.010102p-8f}, y = from_signed_byte(q_m, j) * f32{0x1.020408p-7f};
    const f32 s = scales.v * (x * x);
    v = s * s;
    m = (scales.rho * (y * absolute(y))) * s;
}

// What is encoded in the place of m and v: rho and s, or 0 for what is not kept. s: the root of v.
__device__ __forceinline__ void ratio(f32& m, f32& v, f32 s) {
    const f32 rho = m / s, zero = {0.0f};
    const bool kept = bits_of(v) - 0x03800000 < 0x7f000000 - 0x03800000 && is_finite(bits_of(rho));
    m = kept ? rho : zero;
    v = kept ? s : zero;
}

// A number that remembers a root and what it is the root of, through all that is made of it. A rule takes the root of v,
// and so does what encodes v.
struct Traced {
    float x;
    bool traced = false;
    f32 of = {}, root = {};
};
#define FUSED_ADAM_TRACED(operator_)                                                                                   \
    __device__ __forceinline__ Traced operator operator_(Traced a, Traced b) {                                         \
        const float x = (f32{a.x} operator_ f32{b.x}).x;                                                               \
        return {x, a.traced || b.traced, b.traced ? b.of : a.of, b.traced ? b.root : a.root};                          \
    }
FUSED_ADAM_TRACED(+)
FUSED_ADAM_TRACED(-)
FUSED_ADAM_TRACED(*)
FUSED_ADAM_TRACED(/)
#undef FUSED_ADAM_TRACED
__device__ __forceinline__ Traced sqrt(Traced a) {
    const f32 root = sqrt(f32{a.x});
    return {root.x, true, {a.x}, root};
}
__device__ __forceinline__ f32 root_of(f32 x, Traced known) {
    return known.traced && bits_of(known.of) == bits_of(x) ? known.root : sqrt(x);
}
__device__ __forceinline__ f32 root_of(f32 x, f32) { return sqrt(x); }

// A scale for a block whose largest element is this.
__device__ __forceinline__ f32 rescaled(Word largest, f32 old) {
    const f32 a = float_of(largest);
    const Word bits = (least(largest, 0x7f600000) + 0x1fffff) & 0xffe00000;
    const bool stays = a > f32{0.75f} * old && !(a > old);
    return stays ? old : float_of(bits < 0x00800000 ? 0 : bits);
}

__device__ __forceinline__ f32 inverse(f32 scale) {
    return bits_of(scale) ? f32{1.0f} / scale : f32{0.0f};
}

// x and the upper 24 bits as a fraction, which is exact, so that there is one rounding in any case.
__device__ __forceinline__ f32 dithered(f32 x, Word hashed) {
    const float upper = static_cast<float>(hashed >> 8);
#if defined(__CUDA_ARCH__)
    float y;
    asm("fma.rn.f32 %0, %1, 0f33800000, %2;" : "=f"(y) : "f"(upper), "f"(x.x));
    return {y};
#else
    return x + f32{upper} * f32{0x1p-24f};
#endif
}

// What LANES threads of a warp that follow each other hold, each of N elements of a block, which begins with those of the
// first, what `ratio` gives: codes for it, as the lowest bytes of words, in q_m and q_v. Returns the block's scales from
// now on. All threads of the warp take part; absent elements are 0, and padding's codes are 0.
//
// index: the canonical index of the thread's first element, mod 2**32. t: the step that made m and v, mod 2**32.
template <int LANES, int N>
__device__ __forceinline__ Scales encode_int8(
    const f32 (&rho)[N], const f32 (&s)[N], Scales old, Word index, Word t, Word (&q_m)[N], Word (&q_v)[N]
) {
    static_assert(LANES * N == 64, "a block has 64 elements");
    Word most_rho = 0, most_s = 0;  // bits of numbers that are not negative have their order
#pragma unroll
    for (int k = 0; k < N; ++k) {
        most_rho = most(most_rho, bits_of(rho[k]) & MAGNITUDE);
        most_s = most(most_s, bits_of(s[k]));
    }
#pragma unroll
    for (int stride = LANES / 2; stride > 0; stride /= 2) {
        most_rho = most(most_rho, __shfl_xor_sync(0xffffffff, most_rho, stride));
        most_s = most(most_s, __shfl_xor_sync(0xffffffff, most_s, stride));
    }
    const Scales scales = {rescaled(most_rho, old.rho), rescaled(most_s, old.v)};
    const f32 by_rho = inverse(scales.rho), by_v = inverse(scales.v), d127 = {127.0f}, d255 = {255.0f};
    const Word of_m = index * 0x85ebca77 + t * 0x9e3779b9, of_v = index * 0x9e3779b1 + t * 0x9e3779b9;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        // A root of less than 2**-50 shows in no code.
        const Word code = least(floor_of(dithered(d255 * root(s[k] * by_v), of_v + k * 0x9e3779b1)), INTEGER + 255);
        q_v[k] = bits_of(s[k]) ? most(code, INTEGER + 1) : code;
        const f32 size = d127 * root(absolute(rho[k]) * by_rho);
        const Word upper = least(floor_of(dithered(size, of_m + k * 0x85ebca77)), INTEGER + 127);
        q_m[k] = bits_of(rho[k]) >> 31 ? 0 - upper : upper;
    }
    return scales;
}
