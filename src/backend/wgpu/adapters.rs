//! Which adapters this machine has: every backend asked once, each card listed once.

use std::sync::{Arc, OnceLock};

use wgpu::{AdapterInfo, Backend, DeviceType};

/// One adapter, as it was found.
pub(crate) struct Adapter {
    pub handle: wgpu::Adapter,
    pub info: AdapterInfo,
    pub limits: wgpu::Limits,
    pub features: wgpu::Features,
    /// The driver says that it conforms to its API.
    pub conformant: bool,
    /// Bytes of its own memory (or of what it shares with the CPU), where the API tells.
    pub memory: Option<u64>,
}

impl Adapter {
    /// It computes on the CPU.
    pub(crate) fn is_software(&self) -> bool {
        self.info.device_type == DeviceType::Cpu
    }
}

/// The adapters of this machine, in the order of `gpu:N`. Enumeration is slow, so it is done once per process.
pub(crate) fn adapters() -> &'static [Arc<Adapter>] {
    static FOUND: OnceLock<Vec<Arc<Adapter>>> = OnceLock::new();
    FOUND.get_or_init(enumerate)
}

fn enumerate() -> Vec<Arc<Adapter>> {
    // Without validation layers, which debug builds would get; WGPU_VALIDATION and its like still turn them on.
    let list = async |flags: wgpu::InstanceFlags| {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            flags: flags.with_env(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        instance.enumerate_adapters(wgpu::Backends::all()).await
    };
    // wgpu doesn't say which adapters conform; it leaves the others out unless asked.
    let lists = futures::future::join(list(wgpu::InstanceFlags::ALLOW_UNDERLYING_NONCOMPLIANT_ADAPTER), list(wgpu::InstanceFlags::empty()));
    let (all, conformant) = pollster::block_on(lists);
    let mut conformant: Vec<AdapterInfo> = conformant.iter().map(wgpu::Adapter::get_info).collect();
    let infos: Vec<AdapterInfo> = all.iter().map(wgpu::Adapter::get_info).collect();
    let conforms: Vec<bool> =
        infos.iter().map(|info| conformant.iter().position(|c| c == info).map(|i| conformant.swap_remove(i)).is_some()).collect();
    let mut all: Vec<Option<wgpu::Adapter>> = all.into_iter().map(Some).collect();
    distinct(&infos)
        .into_iter()
        .filter_map(|i| {
            let handle = all[i].take()?;
            let (limits, features, memory) = (handle.limits(), handle.features(), memory(&handle));
            Some(Arc::new(Adapter { handle, info: infos[i].clone(), limits, features, conformant: conforms[i], memory }))
        })
        .collect()
}

/// The largest heap of a Vulkan device's own memory. wgpu knows nothing of memory, nor do Metal and DX12 through it.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd", windows))]
fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    /// VK_MEMORY_HEAP_DEVICE_LOCAL_BIT
    const DEVICE_LOCAL: u32 = 1;
    // What a software adapter says has nothing to do with what it can take.
    if adapter.get_info().device_type == DeviceType::Cpu {
        return None;
    }
    // SAFETY: nothing is kept of the adapter, and nothing is done to it.
    let vulkan = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = vulkan.shared_instance().raw_instance();
    // SAFETY: the adapter is of this instance, and keeps it alive.
    let properties = unsafe { instance.get_physical_device_memory_properties(vulkan.raw_physical_device()) };
    let heaps = properties.memory_heaps.iter().take(properties.memory_heap_count as usize);
    heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd", windows)))]
fn memory(_: &wgpu::Adapter) -> Option<u64> {
    None
}

/// The smaller, the sooner a backend is taken for a card that several show.
fn preference(backend: Backend) -> usize {
    match backend {
        Backend::Vulkan => 0,
        Backend::Metal => 1,
        Backend::Dx12 => 2,
        Backend::Gl => 3,
        _ => 4,
    }
}

/// Indices of the adapters to list: every software one, and every card over its best backend. In the order found.
///
/// A card that two backends show counts once; two equal cards over one backend are two.
fn distinct(infos: &[AdapterInfo]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..infos.len()).collect();
    order.sort_by_key(|&i| preference(infos[i].backend));
    let mut kept: Vec<usize> = Vec::new();
    // (kept, backend): that adapter was recognised over this backend already, so that a second of its kind is another card.
    let mut recognised: Vec<(usize, Backend)> = Vec::new();
    for i in order {
        let info = &infos[i];
        let known = kept.iter().copied().find(|&k| {
            preference(infos[k].backend) < preference(info.backend)
                && !recognised.contains(&(k, info.backend))
                && same_card(&infos[k], info)
        });
        match known {
            Some(k) if info.device_type != DeviceType::Cpu => recognised.push((k, info.backend)),
            _ => kept.push(i),
        }
    }
    kept.sort_unstable();
    kept
}

/// Whether two backends show one card: by its place on the bus where both know it, else by its numbers or its name.
fn same_card(a: &AdapterInfo, b: &AdapterInfo) -> bool {
    if a.device_type == DeviceType::Cpu || b.device_type == DeviceType::Cpu {
        return false;
    }
    if !a.device_pci_bus_id.is_empty() && !b.device_pci_bus_id.is_empty() {
        return a.device_pci_bus_id.eq_ignore_ascii_case(&b.device_pci_bus_id);
    }
    if a.device != 0 && b.device != 0 {
        return (a.vendor, a.device) == (b.vendor, b.device);
    }
    // GL knows no device number, and adds the bus or the driver to the name.
    let (a, b) = (a.name.to_lowercase(), b.name.to_lowercase());
    !a.is_empty() && !b.is_empty() && (a.contains(&b) || b.contains(&a))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(backend: Backend, name: &str, device_type: DeviceType, device: u32, bus: &str) -> AdapterInfo {
        AdapterInfo {
            name: name.into(),
            vendor: if device == 0 { 0 } else { 0x10de },
            device,
            device_pci_bus_id: bus.into(),
            ..AdapterInfo::new(device_type, backend)
        }
    }

    use Backend::{Dx12, Gl, Vulkan};
    use DeviceType::{Cpu, DiscreteGpu, IntegratedGpu, Other};

    #[test]
    fn a_card_shown_by_three_backends_is_listed_once_over_the_best() {
        let infos = [
            info(Gl, "NVIDIA GeForce RTX 3080/PCIe/SSE2", Other, 0, ""),
            info(Dx12, "NVIDIA GeForce RTX 3080", DiscreteGpu, 0x2206, "0000:01:00.0"),
            info(Vulkan, "NVIDIA GeForce RTX 3080", DiscreteGpu, 0x2206, "0000:01:00.0"),
        ];
        assert_eq!(distinct(&infos), [2]);
    }

    #[test]
    fn two_equal_cards_on_one_backend_stay_two() {
        let card = |backend, bus| info(backend, "RTX 3080", DiscreteGpu, 0x2206, bus);
        assert_eq!(distinct(&[card(Vulkan, ""), card(Vulkan, "")]), [0, 1]);
        let both = [card(Vulkan, ""), card(Vulkan, ""), card(Dx12, ""), card(Dx12, "")];
        assert_eq!(distinct(&both), [0, 1]);
    }

    #[test]
    fn the_second_of_two_equal_cards_is_listed_where_only_one_backend_shows_it() {
        let card = |backend, bus| info(backend, "RTX 3080", DiscreteGpu, 0x2206, bus);
        assert_eq!(distinct(&[card(Vulkan, ""), card(Dx12, ""), card(Dx12, "")]), [0, 2]);
        // The bus tells which is which.
        let bus = [card(Vulkan, "0000:02:00.0"), card(Dx12, "0000:01:00.0"), card(Dx12, "0000:02:00.0")];
        assert_eq!(distinct(&bus), [0, 1]);
    }

    #[test]
    fn different_cards_are_not_taken_for_one() {
        let infos = [
            info(Vulkan, "RTX 3080", DiscreteGpu, 0x2206, "0000:01:00.0"),
            info(Dx12, "UHD Graphics 630", IntegratedGpu, 0x3e92, "0000:00:02.0"),
            info(Gl, "Mesa Intel(R) UHD Graphics 770", Other, 0, ""),
        ];
        assert_eq!(distinct(&infos), [0, 1, 2]);
    }

    #[test]
    fn every_software_driver_is_listed() {
        let infos = [
            info(Vulkan, "llvmpipe (LLVM 15)", Cpu, 0, ""),
            info(Vulkan, "llvmpipe (LLVM 15)", Cpu, 0, ""),
            info(Gl, "llvmpipe (LLVM 15)", Cpu, 0, ""),
        ];
        assert_eq!(distinct(&infos), [0, 1, 2]);
    }
}
