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
#[cfg(test)]
pub(crate) mod samples;
pub(crate) mod wire;

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
        let scale = scale_of_norm(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * w;
        }
    });
}

/// [`rms_norm`] in place, of a head: all `[head_dim]`.
pub(crate) fn head_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    widely(|| {
        let scale = scale_of_norm(x, eps);
        for (x, w) in x.iter_mut().zip(weight) {
            *x = *x * scale * w;
        }
    });
}

/// `1 / sqrt(mean(x^2) + eps)`
#[inline(always)]
fn scale_of_norm(x: &[f32], eps: f32) -> f32 {
    // f64, so that the order of additions can't show in an f32; 16 sums, so that none waits for the last.
    let (chunks, rest) = x.as_chunks::<16>();
    let mut sums = [0.0f64; 16];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, &v)| *sum += f64::from(v) * f64::from(v));
    }
    let sum = sums.iter().sum::<f64>() + rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
    (1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32
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
    widely(|| {
        for (g, u) in gate.iter_mut().zip(up) {
            // Of e^v and e^-v the one that can't overflow.
            let e = exp(-g.abs());
            let numerator = if *g < 0.0 { e } else { 1.0 };
            *g = *g * numerator / (1.0 + e) * u;
        }
    });
}

/// e^x for x <= 0, within 2 units of the last place, as the compiler can vectorise it: 2^n e^r with |r| <= ln(2) / 2, the polynomial of
/// Cephes' expf (Moshier 1989). What f32 holds only as a subnormal becomes 0; NaN stays NaN.
#[inline(always)]
#[expect(clippy::excessive_precision)] // as published
fn exp(x: f32) -> f32 {
    let n = (x * std::f32::consts::LOG2_E).max(-126.0).round_ties_even();
    let r = x - n * 0.693_359_375 + n * 2.121_944_4e-4;
    let p = 1.987_569_15e-4;
    let p = p * r + 1.398_199_95e-3;
    let p = p * r + 8.333_451_9e-3;
    let p = p * r + 4.166_579_59e-2;
    let p = p * r + 1.666_666_55e-1;
    let p = p * r + 5.000_000_12e-1;
    let e = p * r * r + r + 1.0;
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { e * power }
}

/// `x += y`
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_right_to_the_last_places_and_ends_at_zero() {
        for i in 0..200_000 {
            let x = -(i as f32) * 5e-4;
            let (found, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found - want).abs() <= 2.5e-7 * want + 1e-37, "e^{x} is {want}, not {found}");
        }
        assert_eq!((exp(0.0), exp(-0.0), exp(-1000.0), exp(f32::NEG_INFINITY)), (1.0, 1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn swiglu_is_right_for_any_gate_and_length() {
        for n in [0, 1, 7, 16, 33, 500] {
            let value = |i: usize| (i as f32 - n as f32 / 2.0) * 0.37;
            let (mut gate, up): (Vec<f32>, Vec<f32>) = ((0..n).map(value).collect(), (0..n).map(|i| value(i) + 1.0).collect());
            swiglu(&mut gate, &up);
            for (i, y) in gate.iter().enumerate() {
                let (g, u) = (f64::from(value(i)), f64::from(up[i]));
                let want = g / (1.0 + (-g).exp()) * u;
                assert!((f64::from(*y) - want).abs() <= 1e-6 * want.abs() + 1e-30, "{i} of {n}: {y} is not {want}");
            }
        }
        let mut gate = [1e30, -1e30, f32::INFINITY, f32::NAN];
        swiglu(&mut gate, &[1.0; 4]);
        assert!(gate[0] == 1e30 && gate[1] == 0.0 && gate[2] == f32::INFINITY && gate[3].is_nan(), "{gate:?}");
    }
}
