//! [`Tuned`]: what was chosen for an adapter, kept for the next time.

use super::adapters::Adapter;
use super::tuning::Linear;
use crate::kept::Kept;

/// Goes up with every change of the kernels or of what is tried.
const GENERATION: u32 = 3;

/// The choices for one adapter, its driver and this version of torchless, by the format and size of a layer.
pub(super) struct Tuned {
    kept: Kept<Linear>,
    /// Bytes of a workgroup's memory on the adapter.
    workgroup: u32,
}

impl Tuned {
    pub(super) fn of(adapter: &Adapter) -> Self {
        let wgpu::AdapterInfo { name, vendor, device, driver, driver_info, backend, subgroup_min_size, subgroup_max_size, .. } =
            &adapter.info;
        let version = env!("CARGO_PKG_VERSION");
        let of = format!(
            "torchless {version}, kernels {GENERATION}, {name} ({vendor:x}:{device:x}) over {backend}, {driver} {driver_info}, \
             subgroups of {subgroup_min_size} to {subgroup_max_size}"
        );
        Self { kept: Kept::open("tuned", of), workgroup: adapter.limits.max_compute_workgroup_storage_size }
    }

    pub(super) fn get(&self, layer: &str) -> Option<Linear> {
        self.kept.get(layer).copied().filter(|linear| linear.is_sane(self.workgroup))
    }

    pub(super) fn keep(&mut self, layer: String, linear: Linear) {
        self.kept.keep(layer, linear);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::wgpu::tuning::{Few, Tile, Tuning};

    #[test]
    fn numbers_that_no_kernel_can_have_or_that_need_too_much_memory_are_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let linear = Tuning::HARDWARE.linear;
        let at = |workgroup| Tuned { kept: Kept::in_directory(Some(directory.path()), "tuned", "a card".into()), workgroup };
        let odd = |tiles, slices| Linear { one: Few { tiles, rows: 1, slices }, ..linear };
        let large = Linear { int8: Some((9, Tile { side: 16, down: 9, across: 4 })), ..linear };
        for odd in [odd(0, 999), odd(16, 16), odd(1, 3), large] {
            at(32 << 10).keep("a layer".into(), odd);
            assert_eq!(at(32 << 10).get("a layer"), None, "{odd:?}");
        }
        at(32 << 10).keep("a layer".into(), linear);
        assert_eq!(at(32 << 10).get("a layer"), Some(linear));
        assert_eq!(at(16 << 10).get("a layer"), None);
    }
}
