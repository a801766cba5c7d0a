// Sums of float64 that are exact: in units of 2**-1074, as digits of 32 bits with room for carries above them.

typedef unsigned long long Digit;

constexpr int LIMBS = 68;
constexpr int SET = 72;     // digits, and the flags behind them; a multiple of a cache line
constexpr int COPIES = 64;  // sets, so that few blocks of threads add to the same one

constexpr Digit INFINITE = 1, NOT_A_NUMBER = 2, NOT_FINITE = 4;  // flags: sums that are, and elements that are not

__device__ __forceinline__ bool is_finite(f64 x) { return (__double_as_longlong(x.x) >> 52 & 0x7ff) != 0x7ff; }

// Add x, which is finite and not negative.
__device__ __forceinline__ void add(Digit* digits, f64 x) {
    const Digit bits = __double_as_longlong(x.x);
    Digit fraction = bits & 0xfffffffffffff;
    int place = bits >> 52;
    if (place > 0) {
        fraction |= Digit(1) << 52;
        --place;
    }
    const int digit = place / 32, shift = place % 32;
    const Digit low = (fraction & 0xffffffff) << shift, high = (fraction >> 32) << shift;
    digits[digit] += low & 0xffffffff;
    digits[digit + 1] += (low >> 32) + (high & 0xffffffff);
    digits[digit + 2] += high >> 32;
}

// The sum rounded once, to nearest even. Carries the digits, so that each has 32 bits.
__device__ __forceinline__ f64 rounded(Digit* digits) {
    Digit carry = 0;
    int top = 0;
    for (int k = 0; k < LIMBS; ++k) {
        carry += digits[k];
        digits[k] = carry & 0xffffffff;
        carry >>= 32;
        if (digits[k]) top = k;
    }
    const Digit first = digits[top], second = top > 0 ? digits[top - 1] : 0, third = top > 1 ? digits[top - 2] : 0;
    const Digit units = top == 0 ? first : first << 32 | second;
    if (top < 2 && units < Digit(1) << 53) return {__longlong_as_double(units)};  // bits of a float64 as they are

    const int zeros = __clz(static_cast<int>(first)), last = 32 * top + 31 - zeros;  // the number of the first bit
    Digit rest = third << zeros & 0xffffffff;  // what is cut off below the 64 bits that begin with it
    for (int k = 0; k < top - 2; ++k) rest |= digits[k];
    const Digit window = (first << 32 | second) << zeros | third << zeros >> 32;
    Digit fraction = window >> 11;
    const Digit below = window & 0x7ff;
    if (below > 0x400 || (below == 0x400 && (rest || fraction & 1))) ++fraction;
    // 1 << 52 of the fraction adds itself to the exponent, and so does a fraction that was rounded up to 1 << 53.
    const Digit bits = (Digit(last - 52) << 52) + fraction, infinity = Digit(0x7ff) << 52;
    return {__longlong_as_double(bits < infinity ? bits : infinity)};
}
