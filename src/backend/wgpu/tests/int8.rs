//! Linear layers of many rows by int8 activations, against references that round them in the same way.

use super::attention;
use super::rig::{Model, Numbers, ROOM, assert_close, f64s, gpus, guarded, linear, quantised, tunings};
use crate::backend::wgpu::GpuPlace;
use crate::backend::wgpu::tuning::Tuning;
use crate::backend::{Batch, KvType, Numerics, Place};
use crate::kernels::matrix::Matrix;
use crate::kernels::quant::QuantFormat;
use crate::partition::{Dim, RankPartition};
use crate::plan::{ColumnParallel, RowParallel};

/// Columns of a block.
const BLOCK: usize = 32;

/// Rows of `cols` as int8 times a scale a block, which begins `lead` columns in front of the first.
fn rounded(x: &[f32], cols: usize, lead: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for row in x.chunks_exact(cols) {
        let (first, rest) = row.split_at(cols.min(BLOCK - lead));
        for block in std::iter::once(first).chain(rest.chunks(BLOCK)) {
            let largest = block.iter().fold(0f32, |most, v| most.max(v.abs()));
            let inverse = if largest < 1e-30 { 0.0 } else { 127.0 / largest };
            all.extend(block.iter().map(|v| (v * inverse).round_ties_even() * (largest / 127.0)));
        }
    }
    all
}

fn error(found: &[f32], expected: &[f64]) -> f64 {
    let square = |v: f64| v * v;
    let (error, size) = found.iter().zip(expected).fold((0.0, 0.0), |(n, s), (f, e)| (n + square(f64::from(*f) - e), s + square(*e)));
    error / size
}

/// Not further from the unrounded than rounding explains, nor so near that there was none.
fn assert_rounded(found: &[f32], exact: &[f64], what: &str) {
    let error = error(found, exact);
    assert!((1e-7..1e-4).contains(&error), "{what}: the normalised mean square error to unrounded activations is {error:e}");
}

fn random(numbers: &mut Numbers, rows: usize, cols: usize) -> Matrix {
    Matrix::from_f32(rows, cols, numbers.take(rows * cols))
}

fn fast(model: &Model, rows: usize, kv: KvType) -> Batch {
    Batch { numerics: Numerics::Fast, kv, ..model.rows(rows as u64 + 1, rows) }
}

/// What a batch gives, and by how many dispatches.
fn counted(place: &mut GpuPlace, batch: &Batch, x: &[f32]) -> (Vec<f32>, u64) {
    let before = place.counts().dispatches;
    let found = guarded(place, batch, x);
    (found, place.counts().dispatches - before)
}

/// From how many rows on a tuning takes int8.
fn least(tuning: Tuning) -> usize {
    tuning.linear.int8.unwrap().0
}

fn up(format: QuantFormat, hidden: usize, channels: usize) -> (Model, Matrix) {
    let weight = random(&mut Numbers::new((hidden * channels) as u64), channels, hidden);
    let mut model = Model::new(hidden, 2, 1, 1, channels).tensor("up", weight.clone()).plan(|mut r| {
        let x = r.input();
        let y = r.linear(x, "up", Dim::Channels, ColumnParallel);
        r.all_gather(y)
    });
    model.quantised = Some(format);
    (model, quantised(&weight, format))
}

#[test]
fn fast_batches_of_many_rows_take_int8_and_no_others() {
    for device in gpus() {
        for (tuning, format) in tunings(&device).into_iter().flat_map(|tuning| QuantFormat::ENCODABLE.map(|format| (tuning, format))) {
            for (hidden, channels) in [(67, 35), (128, 130)] {
                let (model, weight) = up(format, hidden, channels);
                let mut place = model.place(&device, tuning, ROOM);
                for rows in [1, 8, 9, 33, 70] {
                    let what = format!("{device} {tuning:?} {format:?} {rows} rows of {hidden} to {channels}");
                    let x = Numbers::new(rows as u64).take(rows * hidden);
                    let exact = linear(&f64s(&x), &weight);
                    let (found, dispatches) = counted(&mut place, &fast(&model, rows, KvType::F32), &x);
                    if rows < least(tuning) {
                        assert_eq!(dispatches, 1, "{what}");
                        assert_close(&found, &exact, 2e-5, &what);
                    } else {
                        assert_eq!(dispatches, 2, "{what}");
                        assert_close(&found, &linear(&f64s(&rounded(&x, hidden, 0)), &weight), 2e-3, &what);
                        assert_rounded(&found, &exact, &what);
                    }
                    let (found, dispatches) = counted(&mut place, &model.rows(rows as u64, rows), &x);
                    assert_eq!(dispatches, 1, "{what}, exact");
                    assert_close(&found, &exact, 2e-5, &format!("{what}, exact"));
                }
            }
        }
    }
}

#[test]
fn a_row_of_zeros_gives_zeros_and_one_that_is_no_number_spoils_itself_alone() {
    let (hidden, channels, rows) = (70, 20, 40);
    for device in gpus() {
        let (model, weight) = up(QuantFormat::Q8_0, hidden, channels);
        let mut place = model.place(&device, tunings(&device)[0], ROOM);
        let mut x = Numbers::new(5).take(rows * hidden);
        x[3 * hidden..4 * hidden].fill(0.0);
        x[5 * hidden..6 * hidden].fill(1e-38);
        let expected = linear(&f64s(&rounded(&x, hidden, 0)), &weight);
        (x[17 * hidden + 3], x[23 * hidden + 68]) = (f32::NAN, f32::INFINITY);
        let mut found = guarded(&mut place, &fast(&model, rows, KvType::F32), &x);
        assert!(found[3 * channels..4 * channels].iter().all(|y| *y == 0.0), "{device}: a row of zeros");
        assert!(found[5 * channels..6 * channels].iter().all(|y| *y == 0.0), "{device}: a row of what is next to zero");
        for row in [17, 23] {
            let of_row = row * channels..(row + 1) * channels;
            assert!(found[of_row.clone()].iter().all(|y| !y.is_finite()), "{device}: {:?}", &found[of_row]);
            found[of_row.clone()].iter_mut().zip(&expected[of_row]).for_each(|(found, expected)| *found = *expected as f32);
        }
        assert_close(&found, &expected, 2e-3, &device.to_string());
    }
}

#[test]
fn ranks_whose_columns_begin_inside_a_block_share_what_they_can() {
    let (hidden, channels, rows) = (37, 70, 20);
    // Dispatches: products, and one more for each input that ranks don't share.
    for (cut, dispatches) in [(vec![0, 70], 4), (vec![0, 17, 70], 7), (vec![0, 0, 33, 70], 8), (vec![0, 51, 70, 70], 7)] {
        for (device, format) in gpus().into_iter().flat_map(|device| QuantFormat::ENCODABLE.map(|format| (device.clone(), format))) {
            let what = format!("{device} {cut:?} {format:?}");
            let mut numbers = Numbers::new(7);
            let (up, down) = (random(&mut numbers, channels, hidden), random(&mut numbers, hidden, channels));
            let mut model = Model::new(hidden, 2, 1, 1, channels).tensor("up", up.clone()).tensor("down", down.clone()).plan(|mut r| {
                let x = r.input();
                let h = r.linear(x, "up", Dim::Channels, ColumnParallel);
                let y = r.linear(h, "down", Dim::Hidden, RowParallel);
                r.pass(y)
            });
            let whole = model.partition.ranks[0].clone();
            model.partition.ranks = cut.windows(2).map(|c| RankPartition { channels: c[0]..c[1], ..whole.clone() }).collect();
            model.quantised = Some(format);
            let (up, down) = (quantised(&up, format), quantised(&down, format));
            let x = numbers.take(rows * hidden);
            let h: Vec<f32> = linear(&f64s(&rounded(&x, hidden, 0)), &up).iter().map(|h| *h as f32).collect();
            let mut expected = vec![0.0; rows * hidden];
            for c in cut.windows(2).filter(|c| c[0] < c[1]) {
                let part: Vec<f32> = h.chunks_exact(channels).flat_map(|h| h[c[0]..c[1]].to_vec()).collect();
                let part = f64s(&rounded(&part, c[1] - c[0], c[0] % BLOCK));
                let sums = linear(&part, &down.slice(0..hidden, c[0]..c[1]));
                expected.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
            }
            let mut place = model.place(&device, tunings(&device)[0], ROOM);
            let (found, counted) = counted(&mut place, &fast(&model, rows, KvType::F32), &x);
            assert_close(&found, &expected, 1e-2, &what);
            assert_rounded(&found, &linear(&linear(&f64s(&x), &up), &down), &what);
            assert_eq!(counted, dispatches, "{what}");
        }
    }
}

#[test]
fn gate_and_up_take_int8_and_end_in_swiglu() {
    let (hidden, channels) = (45, 35);
    for device in gpus() {
        for (tuning, format) in tunings(&device).into_iter().zip(QuantFormat::ENCODABLE) {
            let mut numbers = Numbers::new(9);
            let (gate, up) = (random(&mut numbers, channels, hidden), random(&mut numbers, channels, hidden));
            let mut model = Model::new(hidden, 2, 1, 1, channels).tensor("gate", gate.clone()).tensor("up", up.clone()).plan(|mut r| {
                let x = r.input();
                let gate = r.linear(x, "gate", Dim::Channels, ColumnParallel);
                let up = r.linear(x, "up", Dim::Channels, ColumnParallel);
                let y = r.swiglu(gate, up);
                r.all_gather(y)
            });
            model.quantised = Some(format);
            let (gate, up) = (quantised(&gate, format), quantised(&up, format));
            let of =
                |x: &[f64]| -> Vec<f64> { linear(x, &gate).iter().zip(linear(x, &up)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect() };
            let mut place = model.place(&device, tuning, ROOM);
            let x = numbers.take(47 * hidden);
            let (found, dispatches) = counted(&mut place, &fast(&model, 47, KvType::F32), &x);
            let what = format!("{device} {tuning:?} {format:?}");
            assert_eq!(dispatches, 2, "{what}");
            assert_close(&found, &of(&f64s(&rounded(&x, hidden, 0))), 1e-2, &what);
            assert_rounded(&found, &of(&f64s(&x)), &what);
        }
    }
}

#[test]
fn queries_keys_and_values_take_int8_and_end_in_the_cache() {
    for device in gpus() {
        for (kv, format) in [KvType::F32, KvType::F16].into_iter().flat_map(|kv| QuantFormat::ENCODABLE.map(|format| (kv, format))) {
            let mut model = attention::model(6, 4, 2, &[0, 4]);
            model.quantised = Some(format);
            let mut reference = attention::model(6, 4, 2, &[0, 4]);
            reference.tensors.values_mut().for_each(|weight| *weight = quantised(weight, format));
            let mut place = model.place(&device, tunings(&device)[0], ROOM);
            let x = Numbers::new(13).take(41 * attention::HIDDEN);
            let found = guarded(&mut place, &fast(&model, 41, kv), &x);
            let what = format!("{device} {kv:?} {format:?}");
            assert_close(&found, &attention::attend(&reference, &rounded(&x, attention::HIDDEN, 0), kv), 1e-2, &what);
            assert_rounded(&found, &attention::attend(&reference, &x, kv), &what);
        }
    }
}
