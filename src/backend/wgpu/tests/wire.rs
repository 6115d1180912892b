//! Sums that travel in 2 bytes an element, and batches that are on their way in one place at once.

use std::task::Poll;
use std::time::Duration;

use super::rig::{Model, Numbers, ROOM, gpus, matrix, pool};
use crate::backend::wgpu::GpuPlace;
use crate::backend::{Batch, Flow, Opened, Place, Wire};
use crate::device::Device;
use crate::kernels::matrix::DType;
use crate::partition::Dim;
use crate::plan::{RowParallel, SegmentId};

/// Rows of 45 are padded to 64.
const HIDDEN: usize = 45;

/// Two segments: a product that is summed, and the sum added to what came in.
fn model() -> Model {
    let weight = matrix(DType::F32, HIDDEN, HIDDEN, &Numbers::new(3).take(HIDDEN * HIDDEN));
    Model::new(HIDDEN, 2, 1, 1, 1).tensor("down", weight).plan(|mut r| {
        let x = r.input();
        let y = r.linear(x, "down", Dim::Hidden, RowParallel);
        r.all_reduce(y);
        r.add(x, y);
        r.pass(x)
    })
}

fn place(device: &Device, wire: Wire, lanes: usize) -> GpuPlace {
    model().assign(|mut assignment| {
        (assignment.wire, assignment.lanes) = (wire, lanes);
        GpuPlace::new(device, assignment, ROOM, &pool(), &mut Opened::default()).unwrap()
    })
}

fn launch(place: &mut GpuPlace, lane: usize, segment: usize, batch: &Batch, input: &[f32]) {
    place.launch(lane, SegmentId(segment), batch, &Flow::Host(input.to_vec())).unwrap();
}

fn land(place: &mut GpuPlace, lane: usize) -> Vec<f32> {
    while place.poll(lane, Duration::from_secs(1)).unwrap() == Poll::Pending {}
    place.collect(lane).unwrap()
}

#[test]
fn what_is_summed_is_rounded_on_its_way_out_and_comes_back_as_it_is() {
    for device in gpus() {
        for (wire, unit) in [(Wire::F16, 2f32.powi(-11)), (Wire::Bf16, 2f32.powi(-9))] {
            let (mut plain, mut narrow) = (place(&device, Wire::F32, 1), place(&device, wire, 1));
            for rows in [1, 33] {
                let batch = Batch { wire, ..model().rows(rows as u64, rows) };
                let exact = Batch { wire: Wire::F32, ..batch.clone() };
                let mut x = Numbers::new(rows as u64).take(rows * HIDDEN);
                // Products far outside of f16's range, on either side.
                (x[0], x[rows * HIDDEN - 1]) = (1e7, -1e-9);
                launch(&mut plain, 0, 0, &exact, &x);
                launch(&mut narrow, 0, 0, &batch, &x);
                let (want, mut got) = (land(&mut plain, 0), land(&mut narrow, 0));
                assert_eq!(got.len(), want.len());
                for (got, want) in got.iter().zip(&want) {
                    let within = if wire == Wire::F16 { want.clamp(-65504.0, 65504.0) } else { *want };
                    // Devices may take either neighbour.
                    let most = 2.0 * unit * within.abs() + if wire == Wire::F16 { 2f32.powi(-24) } else { 0.0 };
                    assert!((got - within).abs() <= most, "{device} {wire:?}: {want} arrived as {got}");
                }
                assert!(got.iter().zip(&want).any(|(got, want)| got != want), "{device} {wire:?}: nothing was rounded");
                // On its way back nothing changes, since the host has rounded it.
                wire.round(&mut got);
                launch(&mut plain, 0, 1, &exact, &got);
                launch(&mut narrow, 0, 1, &batch, &got);
                assert!(land(&mut plain, 0) == land(&mut narrow, 0), "{device} {wire:?}: a sum came back as another");
                // And a batch that travels in f32 is untouched.
                launch(&mut narrow, 0, 0, &Batch { number: 1000 + batch.number, ..exact }, &x);
                assert!(land(&mut narrow, 0) == want, "{device} {wire:?}: f32 was rounded");
            }
            let [plain, narrow] = [plain, narrow].map(|place| (place.counts().bytes_read, place.counts().bytes_written));
            let values = 34 * HIDDEN as u64;
            // Of the second segment's output and the first one's input there are 4 bytes an element.
            assert_eq!(plain, (8 * values, 8 * values));
            assert_eq!(narrow, ((2 + 4 + 4) * values, (4 + 2 + 4) * values), "{device} {wire:?}");
        }
    }
}

#[test]
fn lanes_keep_their_rows_from_segment_to_segment() {
    for device in gpus() {
        for wire in [Wire::F32, Wire::F16] {
            let (mut one, mut two) = (place(&device, wire, 1), place(&device, wire, 2));
            let batches = [(1, 40), (2, 9), (3, 70)].map(|(number, rows)| Batch { wire, ..model().rows(number, rows) });
            let inputs = batches.each_ref().map(|batch| Numbers::new(batch.number).take(batch.rows.len() * HIDDEN));
            let alone: Vec<_> = batches
                .iter()
                .zip(&inputs)
                .map(|(batch, input)| {
                    launch(&mut one, 0, 0, batch, input);
                    let sum = land(&mut one, 0);
                    launch(&mut one, 0, 1, batch, &sum);
                    (sum, land(&mut one, 0))
                })
                .collect();
            // The third follows the first in its lane, while the second is still on its way.
            launch(&mut two, 0, 0, &batches[0], &inputs[0]);
            launch(&mut two, 1, 0, &batches[1], &inputs[1]);
            let sum = land(&mut two, 0);
            launch(&mut two, 0, 1, &batches[0], &sum);
            assert!((sum, land(&mut two, 0)) == alone[0], "{device} {wire:?}: the first");
            launch(&mut two, 0, 0, &batches[2], &inputs[2]);
            let sum = land(&mut two, 1);
            launch(&mut two, 1, 1, &batches[1], &sum);
            let other = land(&mut two, 0);
            launch(&mut two, 0, 1, &batches[2], &other);
            assert!((sum, land(&mut two, 1)) == alone[1], "{device} {wire:?}: the second");
            assert!((other, land(&mut two, 0)) == alone[2], "{device} {wire:?}: the third");
        }
    }
}
