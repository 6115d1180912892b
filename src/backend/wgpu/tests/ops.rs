//! Each op but attention, on odd sizes.

use super::rig::{Model, Numbers, ROOM, assert_close, f64s, gpus, gpus_named, guarded, linear, matrix, quantised, tunings};
use crate::backend::{Place, Room};
use crate::device::Device;
use crate::kernels::matrix::{DType, Matrix};
use crate::kernels::quant::QuantFormat;
use crate::kernels::samples;
use crate::partition::{Dim, RankPartition};
use crate::plan::{ColumnParallel, RowParallel};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// The identity, so that an op can be given any values through a linear layer.
fn identity(n: usize) -> Matrix {
    let mut values = vec![0.0; n * n];
    values.iter_mut().step_by(n + 1).for_each(|v| *v = 1.0);
    matrix(DType::F32, n, n, &values)
}

#[test]
fn rms_norm_divides_by_the_root_of_the_mean_square() {
    for device in gpus() {
        for (tuning, dtype) in tunings(&device).into_iter().zip(DTYPES).chain([(tunings(&device)[0], DType::Bf16)]) {
            for hidden in [5, 64, 131] {
                let mut numbers = Numbers::new(hidden as u64);
                let weight = matrix(dtype, 1, hidden, &numbers.take(hidden));
                let model = Model::new(hidden, 2, 1, 1, 1).tensor("norm", weight.clone()).plan(|mut r| {
                    let x = r.input();
                    let y = r.rms_norm(x, "norm");
                    r.pass(y)
                });
                let mut place = model.place(&device, tuning, ROOM);
                let mut w = vec![0.0; hidden];
                weight.row_to_f32(0, &mut w);
                for rows in [1, 3, 70] {
                    let x = numbers.take(rows * hidden);
                    let expected: Vec<f64> = f64s(&x)
                        .chunks_exact(hidden)
                        .flat_map(|x| {
                            let mean = x.iter().map(|x| x * x).sum::<f64>() / hidden as f64;
                            let scale = 1.0 / (mean + 1e-5f32 as f64).sqrt();
                            x.iter().zip(&w).map(|(x, w)| x * scale * f64::from(*w)).collect::<Vec<_>>()
                        })
                        .collect();
                    let found = guarded(&mut place, &model.rows(rows as u64, rows), &x);
                    assert_close(&found, &expected, 1e-5, &format!("{device} {tuning:?} {dtype:?} {rows} x {hidden}"));
                }
            }
        }
    }
}

/// A linear layer from `hidden` to `channels` on a device, with any number of rows.
fn check_linear(device: &Device, dtype: DType, format: Option<QuantFormat>, hidden: usize, channels: usize) {
    for tuning in tunings(device) {
        let mut numbers = Numbers::new((hidden * channels) as u64);
        let mut weight = matrix(dtype, channels, hidden, &numbers.take(channels * hidden));
        let mut model = Model::new(hidden, 2, 1, 1, channels).tensor("up", weight.clone()).plan(|mut r| {
            let x = r.input();
            let y = r.linear(x, "up", Dim::Channels, ColumnParallel);
            r.all_gather(y)
        });
        model.quantised = format;
        if let Some(format) = format {
            weight = quantised(&weight, format);
        }
        let mut place = model.place(device, tuning, ROOM);
        for rows in [1, 3, 8, 70] {
            let x = numbers.take(rows * hidden);
            let found = guarded(&mut place, &model.rows(rows as u64, rows), &x);
            let what = format!("{device} {tuning:?} {dtype:?} {format:?} {rows} rows of {hidden} to {channels}");
            assert_close(&found, &linear(&f64s(&x), &weight), 2e-5, &what);
        }
    }
}

#[test]
fn linear_multiplies_by_weights_of_every_dtype_for_one_row_and_many() {
    for device in gpus() {
        for dtype in DTYPES {
            check_linear(&device, dtype, None, 67, 35);
        }
        check_linear(&device, DType::F32, None, 4, 130);
    }
}

#[test]
fn linear_multiplies_by_quantised_weights_for_one_row_and_many() {
    for device in gpus() {
        for format in QuantFormat::ENCODABLE {
            check_linear(&device, DType::Bf16, Some(format), 67, 35);
        }
    }
}

#[test]
fn linear_multiplies_by_weights_that_are_stored_quantised() {
    for device in gpus() {
        let tunings = tunings(&device);
        for (format, &tuning) in QuantFormat::ALL.into_iter().zip(tunings.iter().cycle()) {
            let (hidden, channels) = (2 * format.block(), 35);
            let weight = samples::blocks(format, channels, hidden, 5);
            let model = Model::new(hidden, 2, 1, 1, channels).tensor("up", weight.clone()).plan(|mut r| {
                let x = r.input();
                let y = r.linear(x, "up", Dim::Channels, ColumnParallel);
                r.all_gather(y)
            });
            let mut place = model.place(&device, tuning, ROOM);
            for rows in [1, 3, 70] {
                let x = Numbers::new(3).take(rows * hidden);
                let found = guarded(&mut place, &model.rows(rows as u64, rows), &x);
                assert_close(&found, &linear(&f64s(&x), &weight), 2e-5, &format!("{device} {tuning:?} {format:?} {rows} rows"));
            }
        }
    }
}

#[test]
fn ranks_sum_what_they_have_of_stored_blocks_wherever_they_are_cut() {
    let (hidden, channels) = (64, 512);
    let cuts: [&[usize]; 3] = [&[0, 70, 300, 512], &[0, 288, 512], &[0, 0, 32, 511, 512]];
    for device in gpus() {
        let formats = [QuantFormat::Q4_1, QuantFormat::Q5_0, QuantFormat::Q4K, QuantFormat::Q5K, QuantFormat::Q6K];
        // The last is not quantised, beside one that is.
        for (format, cut) in formats.map(Some).into_iter().chain([None]).zip(cuts.into_iter().cycle()) {
            let mut numbers = Numbers::new(7);
            let up = samples::blocks(QuantFormat::Q8_0, channels, hidden, 3);
            let dense = matrix(DType::F16, hidden, channels, &numbers.take(hidden * channels));
            let down = format.map_or(dense, |format| samples::blocks(format, hidden, channels, 4));
            let mut model = Model::new(hidden, 2, 1, 1, channels).tensor("up", up.clone()).tensor("down", down.clone()).plan(|mut r| {
                let x = r.input();
                let h = r.linear(x, "up", Dim::Channels, ColumnParallel);
                let y = r.linear(h, "down", Dim::Hidden, RowParallel);
                r.pass(y)
            });
            let whole = model.partition.ranks[0].clone();
            model.partition.ranks = cut.windows(2).map(|c| RankPartition { channels: c[0]..c[1], ..whole.clone() }).collect();
            let mut place = model.on(&device, ROOM).unwrap();
            for rows in [1, 20] {
                let x = numbers.take(rows * hidden);
                let expected = linear(&linear(&f64s(&x), &up), &down);
                let found = guarded(&mut place, &model.rows(rows as u64, rows), &x);
                assert_close(&found, &expected, 1e-4, &format!("{device} {format:?} cut at {cut:?}, {rows} rows"));
            }
        }
    }
}

#[test]
fn a_matrix_larger_than_a_binding_is_computed_in_blocks() {
    for device in gpus() {
        // 64 KiB are 64 rows of 201 f32s, in whole tiles and blocks.
        check_linear(&device.clone().with_binding_limit(64 << 10), DType::F32, None, 201, 170);
        check_linear(&device.with_binding_limit(64 << 10), DType::F16, None, 201, 170);
    }
}

#[test]
fn more_workgroups_than_a_dimension_holds_are_folded() {
    for device in gpus() {
        // Four outputs a workgroup: 70,000 of them.
        let (hidden, channels) = (3, 280_000);
        let mut numbers = Numbers::new(12);
        let weight = matrix(DType::F16, channels, hidden, &numbers.take(channels * hidden));
        let model = Model::new(hidden, 2, 1, 1, channels).tensor("up", weight.clone()).plan(|mut r| {
            let x = r.input();
            let y = r.linear(x, "up", Dim::Channels, ColumnParallel);
            r.all_gather(y)
        });
        let mut place = model.on(&device, Room { rows: 1, wanted: 1, pages: 1 }).unwrap();
        let x = numbers.take(hidden);
        assert_close(&guarded(&mut place, &model.rows(1, 1), &x), &linear(&f64s(&x), &weight), 1e-5, &device.to_string());
    }
}

#[test]
fn ranks_of_a_place_sum_their_partial_results_on_the_device() {
    let (hidden, channels) = (37, 70);
    // Borders between ranks: uneven shares, inside of blocks of 32 columns, some of nothing, first or last.
    let cuts: [&[usize]; 4] = [&[0, 70], &[0, 17, 70], &[0, 0, 33, 70], &[0, 51, 70, 70]];
    for device in gpus() {
        for (cut, format) in cuts.into_iter().flat_map(|cut| [None, Some(QuantFormat::Q8_0), Some(QuantFormat::Q4_0)].map(|f| (cut, f))) {
            let mut numbers = Numbers::new(7);
            let mut random = |dtype, rows: usize, cols: usize| {
                let values = numbers.take(rows * cols);
                // What is quantised is given back to the system, which doesn't keep what is in no file.
                if format.is_some() { Matrix::from_f32(rows, cols, values) } else { matrix(dtype, rows, cols, &values) }
            };
            let (mut up, mut down) = (random(DType::Bf16, channels, hidden), random(DType::F16, hidden, channels));
            let mut model = Model::new(hidden, 2, 1, 1, channels).tensor("up", up.clone()).tensor("down", down.clone()).plan(|mut r| {
                let x = r.input();
                let h = r.linear(x, "up", Dim::Channels, ColumnParallel);
                let y = r.linear(h, "down", Dim::Hidden, RowParallel);
                r.pass(y)
            });
            let whole = model.partition.ranks[0].clone();
            model.partition.ranks = cut.windows(2).map(|c| RankPartition { channels: c[0]..c[1], ..whole.clone() }).collect();
            model.quantised = format;
            if let Some(format) = format {
                (up, down) = (quantised(&up, format), quantised(&down, format));
            }
            let mut place = model.on(&device, ROOM).unwrap();
            for rows in [1, 20] {
                let x = numbers.take(rows * hidden);
                let found = guarded(&mut place, &model.rows(rows as u64, rows), &x);
                assert_close(&found, &linear(&linear(&f64s(&x), &up), &down), 1e-4, &format!("{device} {cut:?} {format:?} {rows}"));
            }
            if format.is_none() {
                let expected: Vec<u64> = cut.windows(2).map(|c| ((c[1] - c[0]) * hidden * 4) as u64).collect();
                assert_eq!(place.weight_bytes(), expected, "{device} {cut:?}");
            }
        }
    }
}

#[test]
fn sharded_results_are_read_rank_behind_rank() {
    for device in gpus() {
        let (hidden, channels) = (6, 7);
        let mut numbers = Numbers::new(3);
        let weight = matrix(DType::F32, channels, hidden, &numbers.take(channels * hidden));
        let mut model = Model::new(hidden, 2, 1, 1, channels).tensor("up", weight.clone()).plan(|mut r| {
            let x = r.input();
            let y = r.linear(x, "up", Dim::Channels, ColumnParallel);
            r.all_gather(y)
        });
        let whole = model.partition.ranks[0].clone();
        let cuts = [0..3, 3..3, 3..7];
        model.partition.ranks = cuts.iter().map(|c| RankPartition { channels: c.clone(), ..whole.clone() }).collect();
        let mut place = model.on(&device, ROOM).unwrap();
        let x = numbers.take(2 * hidden);
        let expected: Vec<f64> = cuts.iter().flat_map(|c| linear(&f64s(&x), &weight.slice(c.clone(), 0..hidden))).collect();
        assert_close(&guarded(&mut place, &model.rows(1, 2), &x), &expected, 1e-5, &device.to_string());
    }
}

#[test]
fn swiglu_holds_for_inputs_of_any_size() {
    for device in gpus() {
        let width = 13;
        let model = Model::new(width, 2, 1, 1, width).tensor("gate", identity(width)).tensor("up", identity(width)).plan(|mut r| {
            let x = r.input();
            let gate = r.linear(x, "gate", Dim::Channels, ColumnParallel);
            let up = r.linear(x, "up", Dim::Channels, ColumnParallel);
            let y = r.swiglu(gate, up);
            r.all_gather(y)
        });
        let mut place = model.on(&device, ROOM).unwrap();
        let mut x = Numbers::new(11).take(5 * width);
        // Where exp would overflow if it were taken of the wrong sign.
        x[..8].copy_from_slice(&[0.0, 1000.0, -1000.0, 90.0, -90.0, -20.0, 1e-6, -1e-6]);
        let expected: Vec<f64> = f64s(&x).iter().map(|g| g / (1.0 + (-g).exp()) * g).collect();
        assert_close(&guarded(&mut place, &model.rows(1, 5), &x), &expected, 1e-5, &device.to_string());
    }
}

#[test]
fn add_sums_and_take_rows_picks_the_wanted() {
    for device in gpus() {
        let width = 9;
        let model = Model::new(width, 2, 1, 1, width).tensor("double", identity(width)).plan(|mut r| {
            let x = r.input();
            let y = r.linear(x, "double", Dim::Hidden, RowParallel);
            r.add(x, y);
            let wanted = r.take_rows(x);
            r.pass(wanted)
        });
        let mut place = model.on(&device, ROOM).unwrap();
        let x = Numbers::new(2).take(40 * width);
        let mut batch = model.rows(1, 40);
        batch.wanted = vec![0, 17, 39];
        let expected: Vec<f64> = batch.wanted.iter().flat_map(|&r| f64s(&x[r as usize * width..][..width])).map(|x| 2.0 * x).collect();
        assert_close(&guarded(&mut place, &batch, &x), &expected, 1e-6, &device.to_string());

        // None wanted: the rest runs, nothing is read.
        let before = place.counts().dispatches;
        let batch = crate::backend::Batch { wanted: vec![], number: 2, ..batch };
        assert_eq!(guarded(&mut place, &batch, &x), [0.0; 0], "{device}");
        assert_eq!(place.counts().dispatches - before, 2, "{device}");
    }
}

/// For runs of these tests in processes of their own, one for each width.
#[test]
fn software_subgroups_are_as_wide_as_the_environment_asks() {
    let bits = std::env::var("LP_NATIVE_VECTOR_WIDTH").ok();
    // Left to itself lavapipe takes what the CPU has.
    let lanes = bits.map_or(vec![4, 8, 16], |bits| vec![bits.parse::<u32>().unwrap() / 32]);
    for device in gpus_named("llvmpipe") {
        if let Some(sizes) = device.limits().unwrap().subgroup_sizes {
            assert!(lanes.iter().any(|&lanes| sizes == (lanes, lanes)), "{device}: {sizes:?} is none of {lanes:?}");
        }
    }
}

#[test]
fn a_weight_that_is_no_number_spoils_its_own_output_alone() {
    for device in gpus() {
        for tuning in tunings(&device) {
            let (hidden, channels, spoilt) = (40, 50, 17);
            let mut numbers = Numbers::new(21);
            let mut values = numbers.take(channels * hidden);
            let sound = matrix(DType::F32, channels, hidden, &values);
            (values[spoilt * hidden + 3], values[spoilt * hidden + 33]) = (f32::NAN, f32::INFINITY);
            let model = Model::new(hidden, 2, 1, 1, channels).tensor("up", matrix(DType::F32, channels, hidden, &values)).plan(|mut r| {
                let x = r.input();
                let y = r.linear(x, "up", Dim::Channels, ColumnParallel);
                r.all_gather(y)
            });
            let mut place = model.place(&device, tuning, ROOM);
            for rows in [1, 3, 40] {
                let x = numbers.take(rows * hidden);
                let mut found = guarded(&mut place, &model.rows(rows as u64, rows), &x);
                let expected = linear(&f64s(&x), &sound);
                found.iter_mut().zip(&expected).skip(spoilt).step_by(channels).for_each(|(found, expected)| *found = *expected as f32);
                assert_close(&found, &expected, 2e-5, &format!("{device} {tuning:?} {rows} rows"));
            }
        }
    }
}
