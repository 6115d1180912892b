//! [`Device`]: what a rank can live on, as it is named and listed.

use serde::Serialize;

use crate::error::{Error, Result};

#[cfg(feature = "gpu")]
use {
    crate::backend::wgpu::adapters::{Adapter, adapters},
    std::sync::Arc,
};

/// What computes behind a [`Device`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DeviceKind {
    /// The CPU, by this crate's own kernels.
    Cpu,
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares the CPU's memory.
    Integrated,
    /// A GPU passed through to a virtual machine.
    Virtual,
    /// A driver that computes shaders on the CPU: for tests, much slower than [`DeviceKind::Cpu`].
    Software,
    /// An adapter that doesn't say.
    Other,
}

impl DeviceKind {
    /// The name used in tables, such as `discrete`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Discrete => "discrete",
            Self::Integrated => "integrated",
            Self::Virtual => "virtual",
            Self::Software => "software",
            Self::Other => "other",
        }
    }
}

/// What an adapter can do, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DeviceLimits {
    /// The largest part of a buffer that a kernel can see, in bytes.
    pub largest_binding: u64,
    /// The largest buffer, in bytes.
    pub largest_buffer: u64,
    /// The smallest and the largest subgroup, where subgroup operations exist.
    pub subgroup_sizes: Option<(u32, u32)>,
    /// Arithmetic on f16.
    pub f16: bool,
    /// The host can map the buffers that kernels use.
    pub mappable_primary_buffers: bool,
    /// Kernels can be timed on the device.
    pub timestamps: bool,
}

/// How long one variant of a kernel takes: see [`Device::kernel_times`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelTime {
    /// What a workgroup computes, such as `64 outputs, 1 slices`: outputs, and parts that the columns are cut into.
    pub name: String,
    /// The least of several rounds.
    pub time: std::time::Duration,
    /// The short measurement takes it.
    pub chosen: bool,
}

#[derive(Clone)]
enum Kind {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu {
        index: usize,
        adapter: Arc<Adapter>,
    },
}

/// The CPU, or an adapter of the machine. Cheap to clone; nothing is opened until a model is loaded onto it.
#[derive(Clone)]
pub struct Device {
    kind: Kind,
    isolated: bool,
    binding_limit: Option<u64>,
    memory_limit: Option<u64>,
    /// How often each product is computed.
    busy_work: u32,
}

/// Everything this machine can compute on: the CPU first, then every adapter once, software adapters included.
///
/// Adapters are looked for once per process. Without feature `gpu` there is only the CPU.
#[must_use]
pub fn devices() -> Vec<Device> {
    std::iter::once(Device::cpu()).chain(gpus()).collect()
}

#[cfg(feature = "gpu")]
fn gpus() -> impl Iterator<Item = Device> {
    adapters().iter().enumerate().map(|(index, adapter)| {
        let kind = Kind::Gpu { index, adapter: Arc::clone(adapter) };
        Device { kind, isolated: false, binding_limit: None, memory_limit: None, busy_work: 1 }
    })
}

#[cfg(not(feature = "gpu"))]
fn gpus() -> impl Iterator<Item = Device> {
    std::iter::empty()
}

impl Device {
    /// The CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self { kind: Kind::Cpu, isolated: false, binding_limit: None, memory_limit: None, busy_work: 1 }
    }

    /// Devices by name: `cpu` and `gpu:N` (the N-th adapter of [`devices`]) between commas, repeated at will; or `auto`, which is
    /// every hardware GPU whose driver conforms to its API, else the CPU.
    ///
    /// # Errors
    /// [`Error::NoDevices`] for an empty list, [`Error::NoSuchDevice`] for a name that this machine doesn't have.
    pub fn parse_list(list: &str) -> Result<Vec<Self>> {
        let names: Vec<&str> = list.split(',').map(str::trim).collect();
        match names[..] {
            [""] => Err(Error::NoDevices),
            ["auto"] => Ok(automatic(devices())),
            // Looking for adapters wakes every driver, and some are loud about it.
            _ if names.iter().all(|name| *name == "cpu") => Ok(vec![Self::cpu(); names.len()]),
            _ => {
                let all = devices();
                names.into_iter().map(|name| find(&all, name)).collect()
            }
        }
    }

    /// The same device as a place of its own: ranks on it share nothing with ranks that name the device otherwise.
    ///
    /// They then meet through the host, as ranks on two devices do.
    #[must_use]
    pub fn isolated(mut self) -> Self {
        self.isolated = true;
        self
    }

    /// Pretends that kernels see no more than `bytes` of a buffer at once. For tests: large matrices are then cut as on
    /// adapters with small bindings. The CPU has no such limit and ignores it.
    #[must_use]
    pub fn with_binding_limit(mut self, bytes: u64) -> Self {
        self.binding_limit = Some(bytes);
        self
    }

    /// The same device as if it had no more than so many bytes of memory. The CPU takes no notice.
    #[must_use]
    pub fn with_memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = Some(bytes);
        self
    }

    /// The same device as if it computed so many times slower: a GPU computes every product of a matrix so often. For tests of shares and of the planner; the
    /// CPU takes no notice.
    #[must_use]
    pub fn with_busy_work(mut self, times: u32) -> Self {
        self.busy_work = times.max(1);
        self
    }

    /// See [`Self::with_busy_work`].
    #[cfg(feature = "gpu")]
    pub(crate) fn busy_work(&self) -> u32 {
        self.busy_work
    }

    /// Bytes of memory that a GPU has, or shares with the CPU, where its API tells (Vulkan does); `None` for the CPU, whose ranks compute
    /// from the mapped checkpoint. What other programs hold of it is not known.
    #[must_use]
    pub fn memory(&self) -> Option<u64> {
        match &self.kind {
            Kind::Cpu => None,
            #[cfg(feature = "gpu")]
            Kind::Gpu { adapter, .. } => [adapter.memory, self.memory_limit].into_iter().flatten().min(),
        }
    }

    /// Whether ranks on both devices live in one place.
    pub(crate) fn shares_place_with(&self, other: &Self) -> bool {
        !self.isolated
            && !other.isolated
            && self.label() == other.label()
            && self.binding_limit == other.binding_limit
            && self.memory_limit == other.memory_limit
            && self.busy_work == other.busy_work
    }

    /// How the device is named in a list: `cpu`, or `gpu:N` for the N-th adapter.
    #[must_use]
    pub fn label(&self) -> String {
        match &self.kind {
            Kind::Cpu => "cpu".to_owned(),
            #[cfg(feature = "gpu")]
            Kind::Gpu { index, .. } => format!("gpu:{index}"),
        }
    }

    /// What the driver calls it.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::Cpu => {
                let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
                format!("{} CPU, {threads} threads", std::env::consts::ARCH)
            }
            #[cfg(feature = "gpu")]
            Kind::Gpu { adapter, .. } => adapter.info.name.clone(),
        }
    }

    /// What computes behind it.
    #[must_use]
    pub fn kind(&self) -> DeviceKind {
        match &self.kind {
            Kind::Cpu => DeviceKind::Cpu,
            #[cfg(feature = "gpu")]
            Kind::Gpu { adapter, .. } => match adapter.info.device_type {
                wgpu::DeviceType::DiscreteGpu => DeviceKind::Discrete,
                wgpu::DeviceType::IntegratedGpu => DeviceKind::Integrated,
                wgpu::DeviceType::VirtualGpu => DeviceKind::Virtual,
                wgpu::DeviceType::Cpu => DeviceKind::Software,
                wgpu::DeviceType::Other => DeviceKind::Other,
            },
        }
    }

    /// Whether this is the CPU itself.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        self.kind() == DeviceKind::Cpu
    }

    /// Whether this is an adapter that computes on the CPU.
    #[must_use]
    pub fn is_software(&self) -> bool {
        self.kind() == DeviceKind::Software
    }

    /// Whether the driver says that it conforms to its API. Others work or don't; `auto` leaves them out.
    #[must_use]
    pub fn is_conformant(&self) -> bool {
        match &self.kind {
            Kind::Cpu => true,
            #[cfg(feature = "gpu")]
            Kind::Gpu { adapter, .. } => adapter.conformant,
        }
    }

    /// The interface to it: `cpu`, `vulkan`, `metal`, `dx12` or `gl`.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        match &self.kind {
            Kind::Cpu => "cpu",
            #[cfg(feature = "gpu")]
            Kind::Gpu { adapter, .. } => adapter.info.backend.to_str(),
        }
    }

    /// The driver's name; empty for the CPU.
    #[must_use]
    pub fn driver(&self) -> &str {
        match &self.kind {
            Kind::Cpu => "",
            #[cfg(feature = "gpu")]
            Kind::Gpu { adapter, .. } => &adapter.info.driver,
        }
    }

    /// The driver's version, in its own words; empty for the CPU.
    #[must_use]
    pub fn driver_info(&self) -> &str {
        match &self.kind {
            Kind::Cpu => "",
            #[cfg(feature = "gpu")]
            Kind::Gpu { adapter, .. } => &adapter.info.driver_info,
        }
    }

    /// What the adapter can do; `None` for the CPU.
    #[must_use]
    pub fn limits(&self) -> Option<DeviceLimits> {
        match &self.kind {
            Kind::Cpu => None,
            #[cfg(feature = "gpu")]
            Kind::Gpu { adapter, .. } => {
                let has = |feature| adapter.features.contains(feature);
                let (info, limits) = (&adapter.info, &adapter.limits);
                Some(DeviceLimits {
                    largest_binding: limits.max_storage_buffer_binding_size.min(self.binding_limit.unwrap_or(u64::MAX)),
                    largest_buffer: limits.max_buffer_size,
                    subgroup_sizes: has(wgpu::Features::SUBGROUP).then_some((info.subgroup_min_size, info.subgroup_max_size)),
                    f16: has(wgpu::Features::SHADER_F16),
                    mappable_primary_buffers: has(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS),
                    timestamps: has(wgpu::Features::TIMESTAMP_QUERY),
                })
            }
        }
    }

    /// How long each variant of the product of a matrix with one row takes on this GPU, and which of them the same short measurement takes that a
    /// model makes of its own weights. `weights`: how the matrix of `out` x `cols` is held, `f32`, `f16`, `bf16`, `q8_0`, `q4_0` or `iq4_nl`.
    ///
    /// # Errors
    /// On the CPU, which has one kernel for each format; for other names; where the matrix doesn't fit a binding; if the device fails.
    pub fn kernel_times(&self, weights: &str, out: usize, cols: usize) -> Result<Vec<KernelTime>> {
        #[cfg(feature = "gpu")]
        if let Some(adapter) = self.adapter() {
            return crate::backend::wgpu::kernel_times(self, adapter, weights, out, cols);
        }
        let _ = (weights, out, cols);
        let problem = "has one kernel for each format: there is nothing to choose".into();
        Err(Error::Device { stage: 0, ranks: Vec::new(), device: self.to_string(), problem })
    }

    /// What tells it from others in what is kept of measurements, its driver included.
    pub(crate) fn identity(&self) -> String {
        let Self { isolated, binding_limit, memory_limit, busy_work, .. } = self;
        let limits = format!("{isolated} {binding_limit:?} {memory_limit:?} {busy_work}");
        format!("{self} {} {} {limits}", self.driver(), self.driver_info())
    }

    /// The adapter to open; `None` for the CPU.
    #[cfg(feature = "gpu")]
    pub(crate) fn adapter(&self) -> Option<&Adapter> {
        match &self.kind {
            Kind::Cpu => None,
            Kind::Gpu { adapter, .. } => Some(adapter),
        }
    }
}

impl std::fmt::Display for Device {
    /// Its label and its name: `gpu:0 (llvmpipe)`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.label(), self.name())
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Device");
        debug.field("label", &self.label()).field("name", &self.name()).field("isolated", &self.isolated);
        debug.field("binding_limit", &self.binding_limit).field("memory_limit", &self.memory_limit).finish()
    }
}

fn automatic(all: Vec<Device>) -> Vec<Device> {
    let gpus: Vec<_> = all.into_iter().filter(|d| !d.is_cpu() && !d.is_software() && d.is_conformant()).collect();
    if gpus.is_empty() { vec![Device::cpu()] } else { gpus }
}

fn find(all: &[Device], name: &str) -> Result<Device> {
    all.iter().find(|d| d.label() == name).cloned().ok_or_else(|| {
        let there: Vec<String> = all.iter().map(Device::to_string).collect();
        let without = if cfg!(feature = "gpu") { "" } else { "; this build has no feature `gpu`" };
        Error::NoSuchDevice { name: name.to_owned(), right: format!("this machine has {}{without}", there.join(", ")) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_comes_first_and_adapters_are_numbered_in_order() {
        let labels: Vec<String> = devices().iter().map(Device::label).collect();
        let expected: Vec<String> = std::iter::once("cpu".to_owned()).chain((0..labels.len() - 1).map(|n| format!("gpu:{n}"))).collect();
        assert_eq!(labels, expected);
    }

    #[test]
    fn a_list_names_devices_in_order_and_as_often_as_it_likes() {
        let list = Device::parse_list(" cpu,cpu ").unwrap();
        assert_eq!(list.iter().map(Device::label).collect::<Vec<_>>(), ["cpu", "cpu"]);
    }

    #[test]
    fn an_empty_list_is_refused() {
        assert!(matches!(Device::parse_list(""), Err(Error::NoDevices)));
        assert!(matches!(Device::parse_list("  "), Err(Error::NoDevices)));
    }

    #[test]
    fn an_unknown_device_is_refused_with_what_exists() {
        for list in ["gpu:4096", "cpu,tpu", "cpu,", "gpu:", "gpu:-1", "auto,cpu"] {
            let message = Device::parse_list(list).unwrap_err().to_string();
            assert!(message.contains("this machine has cpu ("), "{list}: {message}");
            assert_eq!(message.contains("no feature `gpu`"), cfg!(not(feature = "gpu")), "{list}: {message}");
        }
    }

    #[test]
    fn auto_takes_no_software_and_falls_back_on_the_cpu() {
        let auto = Device::parse_list("auto").unwrap();
        assert!(!auto.is_empty());
        assert!(auto.iter().all(|d| !d.is_software() && d.is_conformant()));
        assert_eq!(automatic(vec![Device::cpu()]).len(), 1);
    }

    #[test]
    fn only_isolated_devices_keep_a_place_of_their_own() {
        let cpu = Device::cpu();
        assert!(cpu.shares_place_with(&Device::cpu()));
        assert!(!cpu.shares_place_with(&Device::cpu().isolated()));
        let isolated = cpu.isolated();
        assert!(!isolated.shares_place_with(&isolated.clone()));
    }

    #[test]
    fn devices_can_cross_threads() {
        fn crosses<T: Send + Sync>() {}
        crosses::<Device>();
    }
}
