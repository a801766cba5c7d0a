// fused_adam/_coefficients.py on the device, in the same order of operations, so that it gives the same bits.

enum Formula { CONSTANTS, ADAMW, EPS_HAT, UNCORRECTED, ADAMW_ROOT, AMSGRADW_HAT, MOMENTUM, ADAGRAD, RMSPROP, LION };

// 1 - (1 - c)**t without cancellation, from the most significant bit of t.
__device__ inline f64 bias_correction(f64 c, int64 t) {
    const f64 one = {1.0}, two = {2.0};
    f64 q = {0.0};
    int bit = 0;
    while (t >> bit > 1) ++bit;
    for (; bit >= 0; --bit) {
        q = q * (two - q);
        if (t >> bit & 1) q = q + c * (one - q);
    }
    return q;
}

// Step t's numbers from a formula's arguments a, into x, in the order of FORMULAS.
__device__ inline void evaluate(int64 formula, int64 t, const f64* a, f64* x) {
    const f64 one = {1.0};
    const f64 lr = a[0];
    switch (formula) {
        case ADAMW:
        case EPS_HAT:
        case UNCORRECTED:
        case ADAMW_ROOT:
        case AMSGRADW_HAT: {
            const f64 c1 = one - a[1], c2 = one - a[2], eps = a[3], decay = lr * a[4];
            const f64 q1 = bias_correction(c1, t), q2 = bias_correction(c2, t), root = sqrt(q2);
            const f64 step = lr * root / q1;
            x[0] = c1;
            x[1] = c2;
            if (formula == AMSGRADW_HAT) {
                x[2] = one / q2;
                x[3] = lr / q1;
                x[4] = eps;
                x[5] = a[5];
                x[6] = decay;
            } else {
                x[2] = formula == UNCORRECTED ? lr : step;
                x[3] = formula == EPS_HAT || formula == UNCORRECTED ? eps : eps * root;
                x[4] = formula == ADAMW_ROOT ? a[5] * q2 : decay;
                x[5] = decay;
            }
            break;
        }
        case MOMENTUM:
            x[0] = a[1];
            x[1] = t == 1 ? one : one - a[2];
            x[2] = lr;
            break;
        case ADAGRAD:
            x[0] = lr / (one + f64{static_cast<double>(t - 1)} * a[1]);
            x[1] = a[2];
            break;
        case RMSPROP:
            x[0] = one - a[1];
            x[1] = a[2];
            x[2] = lr;
            x[3] = a[3];
            break;
        case LION:
            x[0] = one - a[1];
            x[1] = one - a[2];
            x[2] = lr;
            x[3] = lr * a[3];
            break;
    }
}
