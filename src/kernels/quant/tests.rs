//! Every instruction set against the definitions, one weight at a time.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use memmap2::MmapMut;

use super::exact::packed_rows_on;
use super::fast::packed_rows_int8_on;
use super::format::{BLOCK, Scaling};
use super::{Int8Rows, Isa, Packed, QuantFormat, TILE};
use crate::kernels::matrix::{DType, Matrix};
use crate::kernels::samples::{self, one_by_one};

/// Bell-shaped, as weights are.
fn values(n: usize, seed: u32) -> Vec<f32> {
    samples::values(3 * n, seed).chunks_exact(3).map(|v| v[0] + v[1] + v[2]).collect()
}

fn quantise(isa: Isa, whole: &Matrix, rows: Range<usize>, cols: Range<usize>, format: QuantFormat) -> Packed {
    Packed::quantise_on(isa, whole, rows, cols, format, &|_| {}).unwrap()
}

/// A matrix that can become `format`, of so many columns and what its blocks lack.
fn matrix(format: QuantFormat, rows: usize, cols: usize, seed: u32) -> Matrix {
    if QuantFormat::ENCODABLE.contains(&format) {
        return Matrix::from_f32(rows, cols, values(rows * cols, seed));
    }
    samples::blocks(format, rows, cols.next_multiple_of(format.block()), seed)
}

fn row(w: &Packed, r: usize) -> Vec<f32> {
    let mut out = vec![0.0; w.cols()];
    w.row_to_f32(r, &mut out);
    out
}

/// What a row of one block becomes.
fn stored(isa: Isa, format: QuantFormat, x: &[f32]) -> Vec<f32> {
    let w = quantise(isa, &Matrix::from_f32(1, x.len(), x.to_vec()), 0..1, 0..x.len(), format);
    row(&w, 0)
}

/// The rows of an odd matrix, a whole one and slices that start in the midst of a block and end in one.
const SHAPES: [(usize, usize, Range<usize>, Range<usize>); 8] = [
    (1, 1, 0..1, 0..1),
    (16, 32, 0..16, 0..32),
    (17, 600, 0..17, 0..600),
    (50, 97, 3..50, 0..97),
    (40, 300, 5..38, 7..260),
    (20, 600, 0..20, 31..33),
    (3, 128, 0..3, 64..128),
    (49, 512, 1..49, 95..512),
];

#[test]
fn the_exact_form_has_the_bits_of_the_documented_order_for_any_rows_and_batch() {
    for (rows, cols, r, c) in SHAPES {
        for (format, isa) in QuantFormat::ALL.into_iter().flat_map(|f| Isa::available().into_iter().map(move |isa| (f, isa))) {
            let whole = matrix(format, rows, cols, 1);
            let w = quantise(isa, &whole, r.clone(), c.clone(), format);
            let (lead, weights) = (w.lead(), (0..w.rows()).map(|r| units(&w, r)).collect::<Vec<_>>());
            for n in (1..=20).chain([40, 300]) {
                let x: Vec<Vec<f32>> = (0..n).map(|i| values(w.cols(), 7 + i as u32)).collect();
                let xs: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
                // All rows, and a task's.
                for range in [0..w.rows(), w.rows() / TILE / 2 * TILE..w.rows()] {
                    let mut seen = vec![0; w.rows() * n];
                    packed_rows_on(
                        isa,
                        &w,
                        range.clone(),
                        &xs,
                        one_by_one(|r, i, got| {
                            // Some of them: the twin is slow.
                            if n < 6 || (r + i) % 5 == 0 {
                                let want = exact_twin(isa, &weights[r], xs[i], lead);
                                assert_eq!(
                                    got.to_bits(),
                                    want.to_bits(),
                                    "{isa:?} {format:?} {range:?} of {c:?}, row {r}, input {i} of {n}"
                                );
                            }
                            seen[r * n + i] += 1;
                        }),
                    );
                    let wanted = (0..w.rows() * n).map(|at| i32::from(range.contains(&(at / n))));
                    assert!(seen.into_iter().eq(wanted), "{isa:?} {format:?}: every output once");
                }
            }
        }
    }
}

#[test]
fn the_int8_form_has_the_bits_of_the_documented_order_for_any_rows_and_batch() {
    for (rows, cols, r, c) in SHAPES {
        for (format, isa) in QuantFormat::ALL.into_iter().flat_map(|f| Isa::available().into_iter().map(move |isa| (f, isa))) {
            let whole = matrix(format, rows, cols, 1);
            let w = quantise(isa, &whole, r.clone(), c.clone(), format);
            let (lead, weights) = (w.lead(), (0..w.rows()).map(|r| units(&w, r)).collect::<Vec<_>>());
            for n in (1..=20).chain([40, 300]) {
                let x: Vec<Vec<f32>> = (0..n).map(|i| values(w.cols(), 7 + i as u32)).collect();
                let xs: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
                let int8 = Int8Rows::quantise(&xs, lead);
                for range in [0..w.rows(), w.rows() / TILE / 2 * TILE..w.rows()] {
                    let mut seen = vec![0; w.rows() * n];
                    packed_rows_int8_on(
                        isa,
                        &w,
                        range.clone(),
                        &int8,
                        one_by_one(|r, i, got| {
                            if n < 6 || (r + i) % 5 == 0 {
                                let want = int8_twin(isa, &weights[r], xs[i], lead);
                                assert_eq!(
                                    got.to_bits(),
                                    want.to_bits(),
                                    "{isa:?} {format:?} {range:?} of {c:?}, row {r}, input {i} of {n}"
                                );
                            }
                            seen[r * n + i] += 1;
                        }),
                    );
                    let wanted = (0..w.rows() * n).map(|at| i32::from(range.contains(&(at / n))));
                    assert!(seen.into_iter().eq(wanted), "{isa:?} {format:?}: every output once");
                }
            }
        }
    }
}

#[test]
fn every_instruction_set_stores_what_the_definitions_say_from_every_dtype() {
    let (rows, cols) = (19, 150);
    let floats = values(rows * cols, 5);
    for (whole, floats) in matrices(rows, cols, &floats) {
        for (format, isa) in QuantFormat::ENCODABLE.into_iter().flat_map(|f| Isa::available().into_iter().map(move |isa| (f, isa))) {
            let w = quantise(isa, &whole, 0..rows, 0..cols, format);
            for r in 0..rows {
                let filled = [&floats[r * cols..][..cols], &[0.0; BLOCK]].concat();
                let want: Vec<f32> = filled.chunks_exact(BLOCK).flat_map(|x| defined(format, x)).take(cols).collect();
                assert_eq!(row(&w, r), want, "{isa:?} {whole:?} row {r} as {format:?}");
            }
        }
    }
}

#[test]
fn a_slice_stores_the_weights_of_the_whole_matrix() {
    let (rows, cols) = (37, 500);
    for format in QuantFormat::ALL {
        let whole = matrix(format, rows, cols, 9);
        let all = quantise(Isa::best(), &whole, 0..rows, 0..cols, format);
        for (r, c) in
            [(0..37, 0..500), (5..20, 1..500), (16..37, 33..34), (1..2, 250..499), (0..16, 480..500), (7..7, 3..9), (0..3, 40..40)]
        {
            let slice = quantise(Isa::best(), &whole, r.clone(), c.clone(), format);
            assert_eq!((slice.rows(), slice.cols(), slice.lead()), (r.len(), c.len(), c.start % BLOCK));
            assert_eq!(slice.bytes(), Packed::bytes_for(format, r.len(), c.len(), c.start));
            for i in 0..r.len() {
                if let Some(found) = whole.dtype().quantised() {
                    let mut stored = vec![0.0; c.len()];
                    whole.slice(r.clone(), c.clone()).row_to_f32(i, &mut stored);
                    let same = row(&slice, i).iter().zip(&stored).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{found:?} row {i} of {r:?} x {c:?}: {:?}, stored {stored:?}", row(&slice, i));
                }
                assert_eq!(row(&slice, i), row(&all, r.start + i)[c.clone()], "{format:?} row {i} of {r:?} x {c:?}");
            }
        }
    }
}

#[test]
fn errors_stay_within_what_each_format_promises() {
    let n = 1 << 16;
    let x = values(n, 11);
    let power: f32 = x.iter().map(|x| x * x).sum();
    let errors = QuantFormat::ENCODABLE.map(|format| {
        let got = stored(Isa::best(), format, &x);
        for (x, got) in x.chunks(BLOCK).zip(got.chunks(BLOCK)) {
            let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            // Half a step, and what the rounding of the scale to f16 adds to the largest; q4_0 has no level for -max.
            let most = match format {
                QuantFormat::Q8_0 => amax * (0.5 / 127.0 + 0.0005),
                QuantFormat::Q4_0 => amax * (1.0 / 8.0 + 0.0005),
                QuantFormat::Iq4Nl => amax * 0.16,
                _ => unreachable!("nothing encodes it"),
            };
            assert!(x.iter().zip(got).all(|(x, got)| (x - got).abs() <= most), "{format:?}: {x:?} became {got:?}");
        }
        (x.iter().zip(&got).map(|(x, got)| (x - got) * (x - got)).sum::<f32>() / power).sqrt()
    });
    let [q8_0, q4_0, iq4_nl] = errors;
    assert!(q8_0 < 0.007 && q4_0 < 0.1 && iq4_nl < 0.08, "{errors:?}");
}

#[test]
fn hostile_values_stay_in_their_blocks_and_huge_ones_saturate() {
    let ramp: Vec<f32> = (0..BLOCK).map(|i| i as f32 - 15.5).collect();
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for (format, isa) in QuantFormat::ENCODABLE.into_iter().flat_map(|f| Isa::available().into_iter().map(move |isa| (f, isa))) {
        let of = |x: &[f32]| stored(isa, format, x);
        let ordinary = of(&ramp);
        for bad in [nan, inf, -inf, -nan] {
            let mut x = [&ramp[..], &ramp, &ramp].concat();
            x[BLOCK + 3] = bad;
            let got = of(&x);
            assert_eq!([&got[..BLOCK], &got[2 * BLOCK..]], [&ordinary[..]; 2], "{isa:?} {format:?}: the neighbours of {bad}");
            assert!(got[BLOCK..2 * BLOCK].iter().all(|v| v.is_nan()), "{isa:?} {format:?}: a block with {bad}");
        }
        for zero in [0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e-12, 1e-8] {
            assert!(of(&[zero; 40]).iter().all(|v| *v == 0.0), "{isa:?} {format:?}: {zero} is below every scale");
        }
        // The smallest scales are subnormal in f16: still no error beyond a step.
        for tiny in [1e-4, 1e-5, 3e-6] {
            let got = of(&[tiny, -tiny, tiny / 2.0, 0.0]);
            assert!(got.iter().all(|v| v.abs() <= 2.5 * tiny), "{isa:?} {format:?}: {tiny} became {got:?}");
        }
        for huge in [1e9, f32::MAX] {
            let got = of(&[huge, -huge, huge / 2.0, 1.0]);
            assert!(got.iter().all(|v| v.is_finite()), "{isa:?} {format:?}: {huge} became {got:?}");
            assert!(got[0] >= 65504.0 * 7.0 && got[1] <= -65504.0 * 7.0, "{isa:?} {format:?}: {huge} became {got:?}");
        }
    }
}

#[test]
fn a_hostile_activation_spoils_its_own_row_alone() {
    for (format, isa) in QuantFormat::ALL.into_iter().flat_map(|f| Isa::available().into_iter().map(move |isa| (f, isa))) {
        let whole = matrix(format, 5, 100, 2);
        let w = quantise(isa, &whole, 0..5, 0..100, format);
        let (good, mut bad) = (values(100, 3), values(100, 3));
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            bad[50] = poison;
            let x = Int8Rows::quantise(&[&good, &bad, &good], 0);
            packed_rows_int8_on(
                isa,
                &w,
                0..5,
                &x,
                one_by_one(|r, i, got| assert_eq!(got.is_nan(), i == 1, "{isa:?} {format:?} row {r}, input {i}")),
            );
            packed_rows_on(
                isa,
                &w,
                0..5,
                &[&good, &bad, &good],
                one_by_one(|r, i, got| {
                    assert_eq!(got.is_finite(), i != 1, "{isa:?} {format:?} row {r}, input {i}");
                }),
            );
        }
        // Denormal and huge activations become finite numbers.
        for scale in [1e-45, 1e-38, 1e30] {
            let x: Vec<f32> = good.iter().map(|v| v * scale).collect();
            packed_rows_int8_on(isa, &w, 0..5, &Int8Rows::quantise(&[&x], 0), one_by_one(|_, _, got| assert!(got.is_finite())));
        }
    }
}

#[test]
fn a_mapped_weight_is_what_was_written_and_one_that_does_not_fit_is_refused() {
    let whole = Matrix::from_f32(21, 90, values(21 * 90, 4));
    let w = quantise(Isa::best(), &whole, 0..21, 40..90, QuantFormat::Iq4Nl);
    let mut file = MmapMut::map_anon(64 + w.bytes()).unwrap();
    file[64..].copy_from_slice(w.data());
    let file = Arc::new(file.make_read_only().unwrap());
    let mapped = |offset, rows, cols, start| Packed::mapped(file.clone(), offset, QuantFormat::Iq4Nl, rows, cols, start);
    let read = mapped(64, 21, 50, 8).unwrap();
    for r in 0..21 {
        assert_eq!(row(&read, r), row(&w, r));
    }
    for (bad, why) in [
        (mapped(64, 33, 50, 8), "ends at byte"),
        (mapped(128, 21, 50, 8), "ends at byte"),
        (mapped(32, 21, 50, 8), "not a multiple of 64"),
        (mapped(64, usize::MAX, 2, 0), "too large"),
        (mapped(64, 1 << 40, 1 << 40, 0), "too large"),
        (mapped(usize::MAX - 63, 1, 1, 0), "too large"),
    ] {
        let error = bad.err().unwrap();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn all_bytes_of_the_source_are_reported_done() {
    let whole = Matrix::from_f32(50, 70, values(50 * 70, 4));
    let bytes = AtomicUsize::new(0);
    let report = |n| _ = bytes.fetch_add(n, Ordering::Relaxed);
    Packed::quantise(&whole, 1..50, 5..70, QuantFormat::Q4_0, &report).unwrap();
    assert_eq!(bytes.into_inner(), 49 * 65 * 4);
}

#[test]
fn names_are_found_again() {
    for format in QuantFormat::ALL {
        assert_eq!(QuantFormat::from_name(format.name()), Some(format));
    }
    assert_eq!(QuantFormat::from_name("q9_0"), None);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_nearest_level_is_found_by_cells_as_by_halving() {
    use super::encode::{BORDERS, CELL};
    use super::vectors::Vectors;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn by_cells(v: f32) -> i32 {
        use crate::kernels::lanes::Lanes;
        type V = std::arch::x86_64::__m512;
        unsafe { V::to_ints(V::splat(v).nearest_of_iq4_nl())[0] }
    }
    if !Isa::available().contains(&Isa::Avx512) {
        println!("SKIPPED the_nearest_level_is_found_by_cells_as_by_halving: this CPU has no AVX-512");
        return;
    }
    let edges = (0..=32).map(|cell| CELL * cell as f32 - 128.0).chain(BORDERS[1..].iter().copied());
    let near = edges.flat_map(|v| [v.next_down(), v, v.next_up()]).chain([-1e30, -1e-30, 1e-30, 1e30]);
    for v in near.chain((-1500..1500).map(|v| v as f32 / 11.0)) {
        // SAFETY: the CPU has it, and any has the other.
        let (found, want) = unsafe { (by_cells(v), <[f32; 16]>::nearest_of_iq4_nl([v; 16])[0]) };
        assert_eq!(found, want, "{v}");
        assert_eq!(want as usize, BORDERS[1..].iter().filter(|border| **border <= v).count(), "{v}");
    }
}

/// The same values as every dtype stores them, and those values.
fn matrices(rows: usize, cols: usize, values: &[f32]) -> [(Matrix, Vec<f32>); 3] {
    let f16s: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
    let bf16s: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
    let mapped = |dtype, bytes: &[u8]| {
        let mut map = MmapMut::map_anon(bytes.len()).unwrap();
        map.copy_from_slice(bytes);
        Matrix::mapped(Arc::new(map.make_read_only().unwrap()), 0, dtype, rows, cols).unwrap()
    };
    [
        (Matrix::from_f32(rows, cols, values.to_vec()), values.to_vec()),
        (mapped(DType::F16, bytemuck::cast_slice(&f16s)), f16s.iter().map(|v| v.to_f32()).collect()),
        (mapped(DType::Bf16, bytemuck::cast_slice(&bf16s)), bf16s.iter().map(|v| v.to_f32()).collect()),
    ]
}

/// A block as the format's definition has it.
fn defined(format: QuantFormat, x: &[f32]) -> Vec<f32> {
    let max = x.iter().copied().fold(0.0f32, |m, v| if v.abs() > m.abs() { v } else { m });
    let half = |d: f32| f16::from_f32(d).to_f32();
    match format {
        QuantFormat::Q8_0 => {
            let d = max.abs() / 127.0;
            x.iter().map(|x| (x * (1.0 / d)).round_ties_even() * half(d)).collect()
        }
        QuantFormat::Q4_0 => {
            let d = max / -8.0;
            x.iter().map(|x| ((x * (1.0 / d) + 8.5).trunc().min(15.0) - 8.0) * half(d)).collect()
        }
        QuantFormat::Iq4Nl => {
            let levels = format.codebook().unwrap();
            // Of two magnitudes as large, the positive one.
            let max = if x.contains(&max.abs()) { max.abs() } else { max };
            // Of two as near, the upper one.
            let far = |level: i8, v: f32| (f32::from(level) - v).abs();
            let nearest = |v: f32| f32::from(*levels.iter().rev().min_by(|a, b| far(**a, v).total_cmp(&far(**b, v))).unwrap());
            // The best scale of those that the candidates lead to, by the weighted error that it leaves.
            let mean = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / BLOCK as f64;
            let scales = super::encode::TARGETS.map(|target| {
                let chosen = || x.iter().map(|x| (f64::from(*x), f64::from(nearest(x * (1.0 / max) * target))));
                let products: f64 = chosen().map(|(x, q)| (x * x + mean) * q * x).sum();
                let squares: f64 = chosen().map(|(x, q)| (x * x + mean) * q * q).sum();
                (products * products / squares, products / squares)
            });
            let d = scales.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).unwrap().1;
            let d = half(d as f32);
            x.iter().map(|x| nearest(x * (1.0 / d)) * d).collect()
        }
        _ => unreachable!("nothing encodes it"),
    }
}

/// A block of a row: what its values are worth in units of the scale, those of either half, the scale, and what is added.
struct Unit {
    levels: [i8; BLOCK],
    halves: [f32; 2],
    d: f32,
    added: Option<f32>,
}

fn units(w: &Packed, r: usize) -> Vec<Unit> {
    let format = w.format();
    let unit = |b: usize| {
        let stored = w.stored(r, b);
        let worth = stored.worth(format);
        let levels = stored.quants.map(|q| format.level(q));
        let (halves, d) = if format.scaling() == Scaling::Halves {
            (stored.bytes.map(|byte| f32::from(byte) - 128.0), stored.d.to_f32())
        } else {
            ([1.0; 2], worth.scales[0])
        };
        Unit { levels, halves, d, added: worth.added }
    };
    (0..w.shape.blocks()).map(unit).collect()
}

fn fma(isa: Isa, a: f32, b: f32, sum: f32) -> f32 {
    if isa == Isa::Portable { sum + a * b } else { a.mul_add(b, sum) }
}

/// The order that the head of `exact` promises.
fn exact_twin(isa: Isa, w: &[Unit], x: &[f32], lead: usize) -> f32 {
    let x = [&vec![0.0; lead][..], x, &[0.0; BLOCK]].concat();
    let mut total = 0.0;
    for (unit, x) in w.iter().zip(x.chunks_exact(BLOCK)) {
        let (mut s, mut plain) = ([0.0f32; 4], [0.0f32; 4]);
        for k in 0..BLOCK {
            let q = f32::from(unit.levels[k]) * unit.halves[2 * k / BLOCK];
            s[k % 4] = fma(isa, q, x[k], s[k % 4]);
            plain[k % 4] += x[k];
        }
        total = fma(isa, (s[0] + s[1]) + (s[2] + s[3]), unit.d, total);
        if let Some(added) = unit.added {
            total = fma(isa, added, (plain[0] + plain[1]) + (plain[2] + plain[3]), total);
        }
    }
    total
}

/// The order that the head of `fast` promises.
fn int8_twin(isa: Isa, w: &[Unit], x: &[f32], lead: usize) -> f32 {
    let x = [&vec![0.0; lead][..], x, &[0.0; BLOCK]].concat();
    let mut total = 0.0;
    for (unit, x) in w.iter().zip(x.chunks_exact(BLOCK)) {
        let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let inverse = if amax == 0.0 { 0.0 } else { 127.0 / amax };
        let x: Vec<i32> = x.iter().map(|x| (x * inverse).round_ties_even() as i32).collect();
        let dot =
            |range: Range<usize>| unit.levels[range.clone()].iter().zip(&x[range]).map(|(q, x)| i32::from(*q) * x).sum::<i32>() as f32;
        let dot = if unit.halves == [1.0; 2] {
            dot(0..BLOCK)
        } else {
            fma(isa, dot(BLOCK / 2..BLOCK), unit.halves[1], dot(0..BLOCK / 2) * unit.halves[0])
        };
        total = fma(isa, dot, unit.d * (amax / 127.0), total);
        if let Some(added) = unit.added {
            total = fma(isa, added, amax / 127.0 * x.iter().sum::<i32>() as f32, total);
        }
    }
    total
}
