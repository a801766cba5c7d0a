// The step: every segment of every group in one launch, one block for each chunk of a segment.
//
// What is printed before this says how a number is stored (Number) and computed with (T), how many STATES and
// COEFFICIENTS the rule has, whether it ZEROES the gradient and COUNTS what did not move, how many GROUPS of
// coefficients the arguments hold (ON_DEVICE: whether prologue.cu leaves them in memory instead), and the kernel's
// NAME, and defines
//
//     void update(T& p, T g, T* states, const T* c)      one element and its group's coefficients
//
// Each element is read once and written once by one thread, which runs the rule's own assignments: neither the launch
// geometry nor the width of an access can change a bit.

typedef long long int64;

constexpr int THREADS = 256;
constexpr int ROWS = STATES > 0 ? STATES : 1;  // C++ has no empty arrays
#ifdef ON_DEVICE
constexpr int COEFFICIENT_BYTES = 192;  // of device memory, for those of a group
#endif

// Contiguous memory that takes one step with one group's coefficients: a parameter and its states, or a flat buffer.
struct Segment {
    int64 n;      // elements
    int64 first;  // the chunk, and so the block, that takes the first of them
    int64 group;
    Number* p;
    Number* states[ROWS];
};

// Passed by value. Alone, a segment and its gradient need no table in device memory.
struct Arguments {
    const Segment* segments;    // null: `segment` is the only one
    Number* const* gradients;   // of each segment
    const int* segment_of_chunk;
    int64 chunk;                      // elements a block takes, a multiple of 128
    Segment segment;
    Number* gradient;
#ifdef ON_DEVICE
    Control* control;
    const char* coefficients;  // of each group, COEFFICIENT_BYTES after those of the one before
#else
    T coefficients[GROUPS][COEFFICIENTS];
#endif
};

// The widest access that a thread can make, 16 bytes.
template <class N> struct Wide;
template <> struct Wide<float> { typedef float4 Type; };
template <> struct Wide<double> { typedef double2 Type; };

// Elements lo .. hi, UNROLL accesses of one Access type at a time. All loads of a batch stand before its first store,
// which could alias them as far as the compiler knows. Adds to `unmoved` what COUNTS says.
template <class Access, int UNROLL>
__device__ __forceinline__ void pass(const Segment& s, Number* gradient, const T* c, int64 lo, int64 hi, int& unmoved) {
    constexpr int N = sizeof(Access) / sizeof(Number);
    union Batch {
        Access access;
        Number x[N];
    };
#pragma unroll 1
    for (int64 start = lo + threadIdx.x * N; start < hi; start += THREADS * N * UNROLL) {
        Batch p[UNROLL], g[UNROLL], states[ROWS][UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int64 i = start + u * THREADS * N;
            if (i < hi) {
                p[u].access = load(reinterpret_cast<const Access*>(s.p + i));
                g[u].access = load_once(reinterpret_cast<const Access*>(gradient + i));
#pragma unroll
                for (int k = 0; k < STATES; ++k)
                    states[k][u].access = load_once(reinterpret_cast<const Access*>(s.states[k] + i));
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int64 i = start + u * THREADS * N;
            if (i < hi) {
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const T before = {p[u].x[j]};
                    T element = before, row[ROWS];
#pragma unroll
                    for (int k = 0; k < STATES; ++k) row[k] = {states[k][u].x[j]};
                    update(element, {g[u].x[j]}, row, c);
                    if (COUNTS) unmoved += !(element != before) && T{g[u].x[j]} != T{0};
                    p[u].x[j] = element.x;
#pragma unroll
                    for (int k = 0; k < STATES; ++k) states[k][u].x[j] = row[k].x;
                }
                store(reinterpret_cast<Access*>(s.p + i), p[u].access);
                if (ZEROES) store_once(reinterpret_cast<Access*>(gradient + i), Access{});
#pragma unroll
                for (int k = 0; k < STATES; ++k)
                    store_once(reinterpret_cast<Access*>(s.states[k] + i), states[k][u].access);
            }
        }
    }
}

#ifdef ON_DEVICE
// What a step that is skipped leaves of its gradients.
template <class Access>
__device__ __forceinline__ void wipe(Number* gradient, int64 lo, int64 hi) {
    constexpr int N = sizeof(Access) / sizeof(Number);
#pragma unroll 1
    for (int64 i = lo + threadIdx.x * N; i < hi; i += THREADS * N)
        store_once(reinterpret_cast<Access*>(gradient + i), Access{});
}
#endif

#ifdef ON_DEVICE
constexpr int BLOCKS = sizeof(Number) == 8 ? 3 : 4;  // float64 has no registers for the coefficients with 4
#else
constexpr int BLOCKS = 4;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ Arguments a) {
    const int k = a.segments ? a.segment_of_chunk[blockIdx.x] : 0;
    const Segment s = a.segments ? a.segments[k] : a.segment;
    Number* g = a.segments ? a.gradients[k] : a.gradient;

    const int64 lo = (blockIdx.x - s.first) * a.chunk;
    const int64 hi = lo + a.chunk < s.n ? lo + a.chunk : s.n;
    typedef Wide<Number>::Type Access;
    constexpr int N = sizeof(Access) / sizeof(Number);
    unsigned long long bits = reinterpret_cast<unsigned long long>(s.p) | reinterpret_cast<unsigned long long>(g);
#pragma unroll
    for (int state = 0; state < STATES; ++state) bits |= reinterpret_cast<unsigned long long>(s.states[state]);
    const int64 middle = bits % sizeof(Access) == 0 ? hi - hi % N : lo;  // chunks start on multiples of N
    constexpr int UNROLL = 8 / sizeof(Number);  // float64 would spill with 2
    int unmoved = 0;
#ifdef ON_DEVICE
    if (a.control->skips) {
        if (ZEROES) {
            wipe<Access>(g, lo, middle);
            wipe<Number>(g, middle, hi);
        }
        return;
    }
    const Number* mine = reinterpret_cast<const Number*>(a.coefficients + s.group * COEFFICIENT_BYTES);
    T c[COEFFICIENTS];
#pragma unroll
    for (int k = 0; k < COEFFICIENTS; ++k) c[k].x = __ldg(mine + k);
#else
    const T* c = a.coefficients[s.group];
#endif
    pass<Access, UNROLL>(s, g, c, lo, middle, unmoved);
    pass<Number, 2 * UNROLL>(s, g, c, middle, hi, unmoved);
#ifdef ON_DEVICE
    if (COUNTS) {
#pragma unroll
        for (int stride = 16; stride > 0; stride /= 2) unmoved += __shfl_xor_sync(0xffffffff, unmoved, stride);
        if (threadIdx.x % 32 == 0 && unmoved) atomicAdd(&a.control->unmoved, static_cast<unsigned long long>(unmoved));
    }
#endif
}
