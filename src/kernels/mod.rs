//! The CPU's kernels: the definition of right, which the shaders of the same names are tested against.
//!
//! Each works on one row; [`crate::backend::cpu`] spreads rows, heads and outputs over threads.

pub(crate) mod attend;
pub(crate) mod fast;
pub(crate) mod lanes;
pub(crate) mod linear;
pub(crate) mod matrix;
pub(crate) mod memory;
pub(crate) mod parallel;
pub(crate) mod pool;
pub(crate) mod product;
pub(crate) mod quant;

use linear::Isa;

/// How a launch computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Numerics {
    /// A row's bits depend on nothing but its sequence.
    Exact,
    /// As fast as the weights' format allows, within its bound.
    Fast,
}

/// `y = x / sqrt(mean(x^2) + eps) * weight`: RMSNorm (Zhang and Sennrich, 2019). All `[hidden]`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    widely(|| {
        // f64, so that the order of additions can't show in an f32; 16 sums, so that none waits for the last.
        let (chunks, rest) = x.as_chunks::<16>();
        let mut sums = [0.0f64; 16];
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, &v)| *sum += f64::from(v) * f64::from(v));
        }
        let sum = sums.iter().sum::<f64>() + rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
        let scale = (1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32;
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * w;
        }
    });
}

/// Runs plain loops compiled for the best instruction set that the CPU has. They round as everywhere: nothing is fused.
#[inline(always)]
fn widely<T>(f: impl FnOnce() -> T) -> T {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn avx512<T>(f: impl FnOnce() -> T) -> T {
        f()
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2<T>(f: impl FnOnce() -> T) -> T {
        f()
    }
    match Isa::best() {
        // SAFETY: `Isa::best` is one that the CPU has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(f) },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(f) },
        _ => f(),
    }
}

/// Rotates element i of every head with element i + head_dim / 2 (Su et al., 2021, paired as Hugging Face does).
///
/// `x` is `[heads, head_dim]`; `angles` holds head_dim / 2 cosines, then as many sines.
pub(crate) fn rope(x: &mut [f32], angles: &[f32]) {
    let (cos, sin) = angles.split_at(angles.len() / 2);
    for head in x.chunks_exact_mut(angles.len()) {
        let (low, high) = head.split_at_mut(cos.len());
        for i in 0..cos.len() {
            let (a, b) = (low[i], high[i]);
            low[i] = a * cos[i] - b * sin[i];
            high[i] = b * cos[i] + a * sin[i];
        }
    }
}

/// `gate = silu(gate) * up`, where silu(v) = v / (1 + exp(-v)). Both `[channels]`.
pub(crate) fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + (-*g).exp()) * u;
    }
}

/// `x += y`
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
