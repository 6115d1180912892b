//! The CPU's kernels: the definition of right, which the shaders of the same names are tested against.
//!
//! Each works on one row; [`crate::backend::cpu`] spreads rows, heads and outputs over threads.

pub(crate) mod attend;
pub(crate) mod fast;
pub(crate) mod lanes;
pub(crate) mod linear;
pub(crate) mod matrix;
pub(crate) mod parallel;
pub(crate) mod pool;

/// `y = x / sqrt(mean(x^2) + eps) * weight`: RMSNorm (Zhang and Sennrich, 2019). All `[hidden]`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    // f64, so that the order of additions can't show in an f32.
    let mean = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / x.len() as f64;
    let scale = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * scale * w;
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

/// `y = silu(gate) * up`, where silu(v) = v / (1 + exp(-v)). All `[channels]`.
pub(crate) fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = g / (1.0 + (-g).exp()) * u;
    }
}

/// `x += y`
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
