// The sum of the squares of all gradients, as fused_adam/_norm.py defines it: it depends on no launch geometry.
//
// A warp adds the squares of a block of 128 elements in float64, 4 to a lane, and its first lane adds their sum into
// digits of 32 bits in shared memory. What a block of threads has found goes to one of COPIES sets in device memory,
// which prologue.cu adds up and sets to 0 again.
//
// What is printed before this says how a number is stored (Number) and computed with (T), and the kernel's NAME.

constexpr int THREADS = 256, WARPS = THREADS / 32, BLOCK = 128;

struct Segment {
    int64 n;      // elements
    int64 first;  // the chunk, and so the block of threads, that takes the first of them
};

// Passed by value. Alone, a segment and its gradient need no table in device memory.
struct Arguments {
    const Segment* segments;         // null: `segment` is the only one
    const Number* const* gradients;  // of each segment
    const int* segment_of_chunk;
    int64 chunk;  // elements a block of threads takes, a multiple of 128
    Segment segment;
    const Number* gradient;
    Scalar scale;
    Digit* sums;  // COPIES sets of SET, 0 at first
};

template <class N> struct Four;
template <> struct Four<float> { typedef float4 Type; static constexpr int COUNT = 1; };
template <> struct Four<double> { typedef double2 Type; static constexpr int COUNT = 2; };

// Elements i .. i + 3, and 0 where there are none.
__device__ __forceinline__ void read_four(const Number* g, int64 i, int64 n, bool aligned, Number (&x)[4]) {
    typedef Four<Number>::Type Access;
    if (aligned && i + 4 <= n) {
        union {
            Access access[Four<Number>::COUNT];
            Number number[4];
        } batch;
#pragma unroll
        for (int k = 0; k < Four<Number>::COUNT; ++k) batch.access[k] = load(reinterpret_cast<const Access*>(g + i) + k);
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = batch.number[k];
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = i + k < n ? load(g + i + k) : Number(0);
    }
}

__device__ __forceinline__ f64 square(f64 x) { return x * x; }

extern "C" __global__ void __launch_bounds__(THREADS, 4) NAME(const __grid_constant__ Arguments a) {
    __shared__ Digit digits[WARPS][LIMBS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int k = lane; k < LIMBS; k += 32) digits[warp][k] = 0;
    __syncwarp();

    const int k = a.segments ? a.segment_of_chunk[blockIdx.x] : 0;
    const Segment s = a.segments ? a.segments[k] : a.segment;
    const Number* g = a.segments ? a.gradients[k] : a.gradient;
    const T unscaling = unscaling_of<T>(a.scale);
    const bool aligned = reinterpret_cast<unsigned long long>(g) % 16 == 0;
    const int64 lo = (blockIdx.x - s.first) * a.chunk;
    const int64 hi = lo + a.chunk < s.n ? lo + a.chunk : s.n;
    Digit flags = 0;
#pragma unroll 1
    for (int64 start = lo + warp * BLOCK; start < hi; start += WARPS * BLOCK) {
        Number x[4];
        read_four(g, start + 4 * lane, s.n, aligned, x);
        f64 y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = widen(unscaling * T{x[j]});
        f64 sum = ((square(y[0]) + square(y[1])) + square(y[2])) + square(y[3]);
        // Both of a pair of lanes add the same two numbers, so all hold what lane 0 does.
#pragma unroll
        for (int stride = 16; stride > 0; stride /= 2) sum = sum + f64{__shfl_xor_sync(0xffffffff, sum.x, stride)};
        if (is_finite(sum)) {
            if (lane == 0) add(digits[warp], sum);
        } else {
            flags |= sum != sum ? NOT_A_NUMBER : INFINITE;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (!is_finite(y[j])) flags |= NOT_FINITE;
        }
    }

    __syncthreads();
    Digit* mine = a.sums + blockIdx.x % COPIES * SET;
    if (threadIdx.x < LIMBS) {
        Digit sum = 0;
        for (int w = 0; w < WARPS; ++w) sum += digits[w][threadIdx.x];
        if (sum) atomicAdd(mine + threadIdx.x, sum);
    }
    if (flags) atomicOr(mine + LIMBS, flags);
}
