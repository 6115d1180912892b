//! Stages on one adapter share its device, and what one passes to the next stays there.

use std::task::Poll;
use std::time::Duration;

use super::rig::{Model, Numbers, ROOM, gpus, matrix, pool, run, try_run};
use crate::backend::wgpu::GpuPlace;
use crate::backend::{Batch, Flow, Opened, Place};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::matrix::DType;
use crate::partition::Dim;
use crate::plan::{ColumnParallel, SegmentId};

/// Rows of 9 are padded to 32.
const HIDDEN: usize = 9;

/// A norm, added to what came in.
fn first() -> Model {
    let norm = matrix(DType::F32, 1, HIDDEN, &Numbers::new(1).take(HIDDEN));
    Model::new(HIDDEN, 2, 1, 1, 7).tensor("norm", norm).plan(|mut r| {
        let x = r.input();
        let y = r.rms_norm(x, "norm");
        r.add(x, y);
        r.pass(x)
    })
}

/// A linear layer.
fn second() -> Model {
    let up = matrix(DType::F32, 7, HIDDEN, &Numbers::new(2).take(7 * HIDDEN));
    Model::new(HIDDEN, 2, 1, 1, 7).tensor("up", up).plan(|mut r| {
        let x = r.input();
        let y = r.linear(x, "up", Dim::Channels, ColumnParallel);
        r.all_gather(y)
    })
}

/// Both on `device`, the first as if the second were on the same.
fn stages(device: &Device) -> [GpuPlace; 2] {
    let mut opened = Opened::default();
    [(0, first()), (1, second())].map(|(stage, model)| {
        model.assign(|mut assignment| {
            (assignment.stage, assignment.stays) = (stage, stage == 0);
            GpuPlace::new(device, assignment, ROOM, &pool(), &mut opened).unwrap()
        })
    })
}

/// What the first stage passes on, for `rows` rows of these numbers. Waits no longer than `within` at a time.
fn passed(place: &mut dyn Place, batch: &Batch, input: &[f32], within: Duration) -> Result<Flow> {
    place.launch(0, SegmentId(0), batch, &Flow::Host(input.to_vec()))?;
    finish(place, within)?;
    place.pass(0)
}

fn finish(place: &mut dyn Place, within: Duration) -> Result<()> {
    while place.poll(0, within)? == Poll::Pending {}
    Ok(())
}

fn received(place: &mut dyn Place, batch: &Batch, input: &Flow, within: Duration) -> Result<Vec<f32>> {
    place.launch(0, SegmentId(0), batch, input)?;
    finish(place, within)?;
    place.collect(0)
}

/// The same through the host.
fn expected(device: &Device, batches: &[(Batch, Vec<f32>)]) -> Vec<Vec<f32>> {
    let (mut first, mut second) = (first().on(device, ROOM).unwrap(), second().on(device, ROOM).unwrap());
    let through = |(batch, x): &(Batch, Vec<f32>)| {
        let rows = run(&mut first, batch, x);
        run(&mut second, batch, &rows)
    };
    batches.iter().map(through).collect()
}

/// Batches of different sizes.
fn batches(n: u64) -> Vec<(Batch, Vec<f32>)> {
    let batch = |i: u64| {
        let rows = 1 + (i * 7 % 40) as usize;
        (first().rows(i + 1, rows), Numbers::new(i + 1).take(rows * HIDDEN))
    };
    (0..n).map(batch).collect()
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn what_stays_on_the_device_gives_the_same_bits_and_crosses_nothing() {
    for device in gpus() {
        let [mut first, mut second] = stages(&device);
        let batches = batches(6);
        let expected = expected(&device, &batches);
        // Three on their way at once, so that each needs a buffer of its own; then three more in the same buffers.
        for (batches, expected) in batches.chunks(3).zip(expected.chunks(3)) {
            let flows: Vec<Flow> = batches.iter().map(|(batch, x)| passed(&mut first, batch, x, SECOND).unwrap()).collect();
            assert!(flows.iter().all(|flow| matches!(flow, Flow::Device(_))), "{device}");
            for (((batch, _), flow), expected) in batches.iter().zip(&flows).zip(expected) {
                assert_eq!(received(&mut second, batch, flow, SECOND).unwrap(), *expected, "{device}");
            }
        }
        assert_eq!((first.counts().bytes_read, second.counts().bytes_written), (0, 0), "{device}");
        let error = first.collect(0).unwrap_err().to_string();
        assert!(error.contains("before there was one"), "{error}");
    }
}

#[test]
fn two_threads_on_one_device_do_not_disturb_each_other() {
    for device in gpus() {
        let [mut first, mut second] = stages(&device);
        let batches = batches(200);
        let expected = expected(&device, &batches);
        // Waits that often end just before the work does.
        let within = Duration::from_micros(30);
        let (sender, flows) = std::sync::mpsc::sync_channel(4);
        std::thread::scope(|scope| {
            let sent = &batches;
            scope.spawn(move || {
                for (batch, x) in sent {
                    sender.send(passed(&mut first, batch, x, within).unwrap()).unwrap();
                }
            });
            for ((batch, _), expected) in batches.iter().zip(&expected) {
                let flow = flows.recv().unwrap();
                assert_eq!(received(&mut second, batch, &flow, within).unwrap(), *expected, "{device}: batch {}", batch.number);
            }
        });
    }
}

#[test]
fn rows_of_another_device_are_refused() {
    for device in gpus() {
        let ([mut first, _], [_, mut second]) = (stages(&device), stages(&device));
        let (batch, x) = batches(1).remove(0);
        let flow = passed(&mut first, &batch, &x, SECOND).unwrap();
        let on_cpu: &mut dyn Place = &mut super::stages::second().on_cpu();
        for (place, problem) in [(&mut second as &mut dyn Place, "lie on another device"), (on_cpu, "lie on a GPU")] {
            let error = place.launch(0, SegmentId(0), &batch, &flow).unwrap_err();
            assert!(matches!(&error, Error::Device { problem: found, .. } if found.contains(problem)), "{device}: {error}");
        }
        let larger = super::stages::first().rows(2, batch.rows.len() + 1);
        let [mut first, mut second] = stages(&device);
        let flow = passed(&mut first, &batch, &x, SECOND).unwrap();
        let error = second.launch(0, SegmentId(0), &larger, &flow).unwrap_err().to_string();
        assert!(error.contains("128 bytes were passed to it for 2 rows of 9, which take 256"), "{device}: {error}");
    }
}

#[test]
fn a_lost_device_is_lost_to_all_its_places_and_to_no_other() {
    for device in gpus() {
        let [mut first, mut second] = stages(&device);
        let [mut other, _] = stages(&device.clone().isolated());
        first.destroy();
        let (batch, x) = batches(1).remove(0);
        let errors = [&mut first, &mut second].map(|place| try_run(place, &batch, &x).unwrap_err());
        assert!(matches!(errors, [Error::DeviceLost { stage: 0, .. }, Error::DeviceLost { stage: 1, .. }]), "{device}: {errors:?}");
        passed(&mut other, &batch, &x, SECOND).unwrap();
    }
}

#[test]
fn isolated_places_have_devices_of_their_own() {
    for device in gpus() {
        let mut opened = Opened::default();
        let mut open = |device: &Device| second().assign(|a| GpuPlace::new(device, a, ROOM, &pool(), &mut opened)).unwrap();
        let isolated = device.clone().isolated();
        let (mut lost, smaller) = (open(&device), device.clone().with_binding_limit(1 << 20));
        let others = [open(&isolated), open(&isolated), open(&smaller)];
        lost.destroy();
        let (batch, x) = batches(1).remove(0);
        assert!(try_run(&mut lost, &batch, &x).is_err(), "{device}");
        for mut other in others {
            run(&mut other, &batch, &x);
        }
    }
}
