// CUDA's words for g++: what stands before a kernel's text, which is then the text that NVRTC compiles.
//
// Threads of a block run one after the other, which is enough for kernels that do not call __syncthreads.

#include <cmath>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
struct Index {
    unsigned x;
};
static thread_local Index threadIdx, blockIdx;

// Blocks first .. end of a grid.
#define HOST_LAUNCH(KERNEL)                                                                                            \
    extern "C" void launch(unsigned first, unsigned end, unsigned threads, const Arguments* arguments) {               \
        for (blockIdx.x = first; blockIdx.x < end; ++blockIdx.x)                                                       \
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) KERNEL(*arguments);                            \
    }

template <class X>
inline X __ldg(const X* a) {
    return *a;
}
