// Generated from fused_adam/_rules.py by `make kernels`: edit the rules there.
//
// One device function per update rule, over the number type T of step.cuh, whose operators and intrinsics round as IEEE
// asks for whatever the compiler's options are. The preludes change g and stand before a rule.

// Prelude: the gradient of a loss that was multiplied by a scale; `unscaling` is 1 / scale.
template <class T>
__device__ __forceinline__ void unscale(T& g, T unscaling) {
    g = unscaling * g;
}

// Prelude: a gradient whose global norm was too large; after `unscale`.
template <class T>
__device__ __forceinline__ void clip(T& g, T clipping) {
    g = clipping * g;
}

// Prelude: ascend instead of descend (`ascent` is -1).
template <class T>
__device__ __forceinline__ void maximize(T& g, T ascent) {
    g = ascent * g;
}

// Prelude: the gradient of an L2 penalty; after `maximize`, as in PyTorch.
template <class T>
__device__ __forceinline__ void l2(T p, T& g, T wd) {
    g = g + wd * p;
}

// Gradient descent (Cauchy 1847; Robbins & Monro 1951).
template <class T>
__device__ __forceinline__ void sgd(T& p, T g, T lr) {
    p = p - lr * g;
}

// Heavy ball (Polyak 1964). `rate` is 1 - dampening, and 1 at the first step, as in PyTorch.
template <class T>
__device__ __forceinline__ void momentum(T& p, T g, T& m, T mu, T rate, T lr) {
    m = mu * m + rate * g;
    p = p - lr * m;
}

// Nesterov 1983 in the form of Sutskever et al. 2013, as in PyTorch: the step looks ahead along m.
template <class T>
__device__ __forceinline__ void nesterov(T& p, T g, T& m, T mu, T lr) {
    m = mu * m + g;
    p = p - lr * (g + mu * m);
}

// Duchi, Hazan & Singer 2011. `lr` already holds the learning rate decay.
template <class T>
__device__ __forceinline__ void adagrad(T& p, T g, T& v, T lr, T eps) {
    v = v + g * g;
    p = p - lr * (g / (sqrt(v) + eps));
}

// Tieleman & Hinton 2012, lecture 6.5; eps outside the root, as in PyTorch.
template <class T>
__device__ __forceinline__ void rmsprop(T& p, T g, T& v, T c, T lr, T eps) {
    v = (v - c * v) + (c * g) * g;
    p = p - lr * (g / (sqrt(v) + eps));
}

// RMSProp with a heavy ball over the scaled gradient, as in PyTorch.
template <class T>
__device__ __forceinline__ void rmsprop_momentum(T& p, T g, T& v, T& m, T c, T mu, T lr, T eps) {
    v = (v - c * v) + (c * g) * g;
    m = mu * m + g / (sqrt(v) + eps);
    p = p - lr * m;
}

// Graves 2013, eq. 38 to 45: the variance, not the second moment, scales the step.
template <class T>
__device__ __forceinline__ void rmsprop_centered(T& p, T g, T& v, T& a, T c, T lr, T eps, T zero) {
    v = (v - c * v) + (c * g) * g;
    a = (a - c * a) + c * g;
    p = p - lr * (g / (sqrt(maximum(v - a * a, zero)) + eps));
}

// Graves 2013, eq. 38 to 45, with its momentum.
template <class T>
__device__ __forceinline__ void rmsprop_centered_momentum(T& p, T g, T& v, T& a, T& m, T c, T mu, T lr, T eps, T zero) {
    v = (v - c * v) + (c * g) * g;
    a = (a - c * a) + c * g;
    m = mu * m + g / (sqrt(maximum(v - a * a, zero)) + eps);
    p = p - lr * m;
}

// Kingma & Ba 2015, algorithm 1; the bias correction is folded into `step` and `eps`.
template <class T>
__device__ __forceinline__ void adam(T& p, T g, T& m, T& v, T c1, T c2, T step, T eps) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    p = p - step * (m / (sqrt(v) + eps));
}

// Loshchilov & Hutter 2019, algorithm 2; bias correction folded into `step` and `eps`.
template <class T>
__device__ __forceinline__ void adamw(T& p, T g, T& m, T& v, T c1, T c2, T step, T eps, T decay) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    p = p - (decay * p + step * (m / (sqrt(v) + eps)));
}

// Reddi, Kale & Kumar 2018; the maximum is over the raw v, as in PyTorch.
template <class T>
__device__ __forceinline__ void amsgrad(T& p, T g, T& m, T& v, T& max_v, T c1, T c2, T step, T eps) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    max_v = maximum(max_v, v);
    p = p - step * (m / (sqrt(max_v) + eps));
}

// AMSGrad with the decoupled decay of Loshchilov & Hutter 2019.
template <class T>
__device__ __forceinline__ void amsgradw(T& p, T g, T& m, T& v, T& max_v, T c1, T c2, T step, T eps, T decay) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    max_v = maximum(max_v, v);
    T u = m / (sqrt(max_v) + eps);
    p = p - (decay * p + step * u);
}

// Adam with a second eps, `root`, inside the root, as in optax: the step can be differentiated at v = 0.
template <class T>
__device__ __forceinline__ void adam_root(T& p, T g, T& m, T& v, T c1, T c2, T step, T eps, T root) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    p = p - step * (m / (sqrt(v + root) + eps));
}

// `adam_root` with the decoupled decay of Loshchilov & Hutter 2019.
template <class T>
__device__ __forceinline__ void adamw_root(T& p, T g, T& m, T& v, T c1, T c2, T step, T eps, T root, T decay) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    T u = m / (sqrt(v + root) + eps);
    p = p - (decay * p + step * u);
}

// Adam whose decoupled decay takes the p that the step has left, as bitsandbytes has it in CUDA.
template <class T>
__device__ __forceinline__ void adamw_after(T& p, T g, T& m, T& v, T c1, T c2, T step, T eps, T decay) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    T u = step * (m / (sqrt(v) + eps));
    p = p - (u + decay * (p - u));
}

// AMSGrad over the corrected v (`correction` is 1 / (1 - beta2**t)), with eps_root, as in optax.
template <class T>
__device__ __forceinline__ void amsgrad_hat(T& p, T g, T& m, T& v, T& max_v, T c1, T c2, T correction, T step, T eps, T root) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    max_v = maximum(max_v, correction * v);
    T u = m / (sqrt(max_v + root) + eps);
    p = p - step * u;
}

// `amsgrad_hat` with the decoupled decay of Loshchilov & Hutter 2019.
template <class T>
__device__ __forceinline__ void amsgradw_hat(T& p, T g, T& m, T& v, T& max_v, T c1, T c2, T correction, T step, T eps, T root, T decay) {
    m = (m - c1 * m) + c1 * g;
    v = (v - c2 * v) + (c2 * g) * g;
    max_v = maximum(max_v, correction * v);
    T u = m / (sqrt(max_v + root) + eps);
    p = p - (decay * p + step * u);
}

// Chen et al. 2023, algorithm 2.
template <class T>
__device__ __forceinline__ void lion(T& p, T g, T& m, T c1, T c2, T lr) {
    p = p - lr * sign((m - c1 * m) + c1 * g);
    m = (m - c2 * m) + c2 * g;
}

// Chen et al. 2023, algorithm 2, with its decoupled decay.
template <class T>
__device__ __forceinline__ void lionw(T& p, T g, T& m, T c1, T c2, T lr, T decay) {
    p = p - (decay * p + lr * sign((m - c1 * m) + c1 * g));
    m = (m - c2 * m) + c2 * g;
}
