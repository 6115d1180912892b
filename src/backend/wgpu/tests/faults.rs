//! Limits and losses are errors that say what happened.

use super::rig::{Model, Numbers, ROOM, gpus, gpus_named, matrix, run, try_run};
use crate::backend::wgpu::GpuPlace;
use crate::backend::wgpu::gpu::{Gpu, Owner};
use crate::backend::{Flow, Place, Room};
use crate::device::Device;
use crate::error::Error;
use crate::kernels::matrix::DType;
use crate::partition::Dim;
use crate::plan::{ColumnParallel, SegmentId};

/// A linear layer of `hidden` to `channels`.
fn model(hidden: usize, channels: usize) -> Model {
    let weight = matrix(DType::F32, channels, hidden, &Numbers::new(1).take(hidden * channels));
    Model::new(hidden, 2, 1, 1, channels).tensor("up", weight).plan(|mut r| {
        let x = r.input();
        let y = r.linear(x, "up", Dim::Channels, ColumnParallel);
        r.all_gather(y)
    })
}

#[test]
fn a_destroyed_device_is_lost_and_others_carry_on() {
    for device in gpus() {
        let model = model(8, 8);
        let (mut lost, mut other) = (model.on(&device, ROOM).unwrap(), model.on(&device, ROOM).unwrap());
        let (batch, x) = (model.rows(1, 1), [1.0; 8]);
        let expected = run(&mut lost, &batch, &x);
        lost.destroy();
        let error = try_run(&mut lost, &batch, &x).unwrap_err();
        let Error::DeviceLost { stage: 0, ranks, device: name, reason } = &error else { panic!("{device}: {error:?}") };
        assert_eq!((&ranks[..], name), (&[0][..], &device.to_string()));
        assert!(!reason.is_empty(), "{device}");
        assert!(matches!(try_run(&mut lost, &batch, &x), Err(Error::DeviceLost { .. })), "{device}: lost devices stay lost");
        assert_eq!(run(&mut other, &batch, &x), expected, "{device}");
        assert_eq!(run(&mut model.on(&device, ROOM).unwrap(), &batch, &x), expected, "{device}: opened again");
    }
}

#[test]
fn a_device_lost_in_flight_is_an_error_and_no_wait_without_end() {
    for device in gpus() {
        let model = model(64, 64);
        let mut place = model.on(&device, ROOM).unwrap();
        place.launch(0, SegmentId(0), &model.rows(1, 70), &Flow::Host(vec![1.0; 70 * 64])).unwrap();
        place.destroy();
        let outcome = (0..100).find_map(|_| match place.poll(0, std::time::Duration::from_millis(50)) {
            Ok(std::task::Poll::Pending) => None,
            Ok(std::task::Poll::Ready(())) => Some(place.collect(0).map(|output| output.len())),
            Err(e) => Some(Err(e)),
        });
        assert!(matches!(outcome, Some(Err(Error::DeviceLost { .. }))), "{device}: {outcome:?}");
    }
}

fn open(device: &Device) -> Gpu {
    let owner = Owner { stage: 1, ranks: vec![2], device: device.to_string() };
    Gpu::open(device.adapter().unwrap(), 1 << 20, owner).unwrap()
}

#[test]
fn memory_that_is_not_there_is_an_error_with_its_bytes_and_the_device_lives_on() {
    // It promises buffers of 1 GiB and never has one.
    for device in gpus_named("SwiftShader") {
        let gpu = open(&device);
        let error = gpu.buffer("the head", 1 << 30, wgpu::BufferUsages::STORAGE).unwrap_err();
        assert!(
            matches!(&error, Error::OutOfMemory { stage: 1, wanted, what, .. } if (*wanted, &what[..]) == (1 << 30, "the head")),
            "{error}"
        );
        gpu.buffer("something small", 1 << 10, wgpu::BufferUsages::STORAGE).unwrap();
    }
}

#[test]
fn what_wgpu_refuses_is_an_error_and_no_panic() {
    for device in gpus() {
        let adapter = device.adapter().unwrap();
        let gpu = open(&device);
        let error = gpu.buffer("too much", adapter.limits.max_buffer_size + 4, wgpu::BufferUsages::STORAGE).unwrap_err();
        assert!(matches!(&error, Error::Device { problem, .. } if problem.contains("too much")), "{error}");
        // Outside of any scope.
        gpu.queue.submit([gpu.device.create_command_encoder(&Default::default()).finish()]);
        gpu.check().unwrap();
        gpu.queue.write_buffer(&gpu.buffer("small", 16, wgpu::BufferUsages::COPY_DST).unwrap(), 0, &[0; 32]);
        assert!(matches!(gpu.check(), Err(Error::Device { .. })), "{device}");
    }
}

#[test]
fn a_row_larger_than_a_binding_is_refused() {
    for device in gpus() {
        let model = model(8, 40_000);
        let error = model.on(&device.clone().with_binding_limit(64 << 10), ROOM).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("not even one row of activations fits a binding of 65536 bytes"), "{device}: {error}");
    }
}

#[test]
fn room_shrinks_to_what_bindings_hold() {
    for device in gpus() {
        let want = Room { rows: 4096, wanted: 4096, pages: 1 << 40 };
        let device = device.with_binding_limit(64 << 10);
        let model = model(8, 100);
        let room = model.assign(|a| GpuPlace::room(&device, &a, want)).unwrap();
        // 100 channels of 4 bytes, in whole blocks of 32; a page of one head of 2 is 512 bytes.
        assert_eq!(room, Room { rows: 128, wanted: 4096, pages: 128 }, "{device}");
        assert!(model.on(&device, room).is_ok(), "{device}");
        let error = model.on(&device, Room { rows: 129, ..room }).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("rows: 128"), "{device}: {error}");
    }
}

#[test]
fn heads_too_large_for_a_workgroup_are_refused() {
    for device in gpus() {
        let model = Model::new(8, 1 << 20, 1, 1, 1);
        let error = model.assign(|a| GpuPlace::room(&device, &a, ROOM)).unwrap_err().to_string();
        assert!(error.contains("heads of 1048576 elements cannot be computed"), "{device}: {error}");
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused() {
    for device in gpus() {
        let model = model(8, 8);
        let mut place = model.on(&device, ROOM).unwrap();
        let x = vec![0.0; 71 * 8];
        assert!(matches!(try_run(&mut place, &model.rows(1, 71), &x), Err(Error::Device { .. })), "{device}");
        assert!(matches!(try_run(&mut place, &model.rows(2, 3), &x), Err(Error::Device { .. })), "{device}: input of 71 rows");
    }
}

#[test]
fn a_launch_whose_output_nobody_took_is_replaced_by_the_next() {
    for device in gpus() {
        let model = model(8, 8);
        let mut place = model.on(&device, ROOM).unwrap();
        let expected = run(&mut place, &model.rows(1, 2), &[0.5; 16]);
        place.launch(0, SegmentId(0), &model.rows(2, 2), &Flow::Host(vec![9.0; 16])).unwrap();
        assert_eq!(run(&mut place, &model.rows(3, 2), &[0.5; 16]), expected, "{device}");
        let error = place.collect(0).unwrap_err().to_string();
        assert!(error.contains("an output was asked for before there was one"), "{device}: {error}");
    }
}

#[test]
fn a_place_counts_what_it_does() {
    for device in gpus() {
        let model = model(9, 7);
        let mut place = model.on(&device, ROOM).unwrap();
        run(&mut place, &model.rows(1, 3), &[0.0; 27]);
        let counts = place.counts();
        assert_eq!((counts.submissions, counts.ops, counts.dispatches), (1, 1, 1), "{device}");
        assert_eq!((counts.bytes_written, counts.bytes_read), (4 * 27, 4 * 21), "{device}");
        assert_eq!(counts.weight_bytes, 4 * 63, "{device}: without padding");
        assert_eq!(place.ranks(), [0]);
    }
}

#[test]
fn a_timed_batch_is_timed_by_the_devices_own_clock() {
    for device in gpus() {
        let model = model(64, 64);
        let mut place = model.on(&device, ROOM).unwrap();
        let expected = run(&mut place, &model.rows(1, 70), &[0.5; 70 * 64]);
        assert_eq!(place.counts().device_nanoseconds, 0, "{device}");
        let batch = crate::backend::Batch { timed: true, ..model.rows(2, 70) };
        let start = std::time::Instant::now();
        assert_eq!(run(&mut place, &batch, &[0.5; 70 * 64]), expected, "{device}");
        let (found, host) = (place.counts().device_nanoseconds, start.elapsed().as_nanos() as u64);
        assert_eq!(found > 0, device.limits().unwrap().timestamps, "{device}");
        assert!(found <= host, "{device}: {found} ns of {host}");
        assert_eq!(place.counts().bytes_read, 2 * 4 * 70 * 64, "{device}: timestamps are no data");
    }
}
