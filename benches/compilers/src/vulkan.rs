//! [`Compiler`]: a Vulkan device that only compiles.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::ops::RangeInclusive;

use anyhow::{Context, Result, ensure};
use ash::{Device, Entry, Instance, ext, khr, vk};
use serde::{Deserialize, Serialize};

use crate::manifest::Kernel;
use crate::pipeline::Pipeline;

pub struct Compiler {
    device: Device,
    executables: khr::pipeline_executable_properties::Device,
    limits: vk::PhysicalDeviceLimits,
    subgroup_sizes: RangeInclusive<u32>,
    takes_subgroup_size: bool,
    most_subgroups_per_simd: u32,
    // Goes after the device.
    _vulkan: Vulkan,
}

/// What the driver made of a kernel.
#[derive(Serialize, Deserialize)]
pub struct Compiled {
    pub subgroup_size: u32,
    pub subgroups_per_simd: u64,
    pub most_subgroups_per_simd: u32,
    /// By the driver's names.
    pub statistics: BTreeMap<String, u64>,
    pub assembly: String,
}

struct Vulkan {
    instance: Instance,
    _loader: Entry,
}

impl Vulkan {
    fn load() -> Result<Self> {
        // SAFETY: the Vulkan loader may be loaded at any time.
        let loader = unsafe { Entry::load() }.context("there is no Vulkan loader: install libvulkan1")?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
        let create = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: what `create` points to is alive; so it is in every call below.
        let instance = unsafe { loader.create_instance(&create, None) }
            .context("RADV doesn't start: mesa-vulkan-drivers 22.3 or later has to be installed")?;
        Ok(Self { instance, _loader: loader })
    }
}

impl Drop for Vulkan {
    fn drop(&mut self) {
        // SAFETY: the device, if there was one, is gone.
        unsafe { self.instance.destroy_instance(None) };
    }
}

impl Compiler {
    /// On the first GPU of the driver that the environment names.
    pub fn open(robust: bool) -> Result<Self> {
        let vulkan = Vulkan::load()?;
        let instance = &vulkan.instance;
        // SAFETY: the instance lives.
        let gpus = unsafe { instance.enumerate_physical_devices() }.context("RADV lists no GPUs")?;
        let gpu = *gpus.first().context("RADV lists no GPU")?;

        let mut core = vk::PhysicalDeviceShaderCorePropertiesAMD::default();
        let mut subgroups = vk::PhysicalDeviceSubgroupSizeControlProperties::default();
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut core).push_next(&mut subgroups);
        // SAFETY: `gpu` is the instance's.
        unsafe { instance.get_physical_device_properties2(gpu, &mut properties) };
        let limits = properties.properties.limits;
        ensure!(core.wavefronts_per_simd > 0, "this is no driver of AMD's: it doesn't say how many wavefronts a SIMD holds");
        let subgroup_sizes = subgroups.min_subgroup_size..=subgroups.max_subgroup_size;
        let takes_subgroup_size = subgroups.required_subgroup_size_stages.contains(vk::ShaderStageFlags::COMPUTE);

        // Whatever a kernel may use.
        let mut features11 = vk::PhysicalDeviceVulkan11Features::default();
        let mut features12 = vk::PhysicalDeviceVulkan12Features::default();
        let mut features13 = vk::PhysicalDeviceVulkan13Features::default();
        let mut features =
            vk::PhysicalDeviceFeatures2::default().push_next(&mut features11).push_next(&mut features12).push_next(&mut features13);
        // SAFETY: `gpu` is the instance's.
        unsafe { instance.get_physical_device_features2(gpu, &mut features) };
        features.features.robust_buffer_access = robust.into();
        let mut robustness = vk::PhysicalDeviceRobustness2FeaturesEXT::default().robust_buffer_access2(robust);
        let mut executables = vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
        let extensions = [khr::pipeline_executable_properties::NAME, ext::robustness2::NAME].map(|name| name.as_ptr());
        let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
        let create = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&extensions)
            .push_next(&mut features)
            .push_next(&mut robustness)
            .push_next(&mut executables);
        // SAFETY: `gpu` is the instance's.
        let device = unsafe { instance.create_device(gpu, &create, None) }.context("RADV doesn't open its device")?;
        let executables = khr::pipeline_executable_properties::Device::new(instance, &device);
        let most_subgroups_per_simd = core.wavefronts_per_simd;
        Ok(Self { device, executables, limits, subgroup_sizes, takes_subgroup_size, most_subgroups_per_simd, _vulkan: vulkan })
    }

    pub fn compile(&self, kernel: &Kernel) -> Result<Compiled> {
        let (last, most) = (kernel.bindings.iter().map(|binding| binding.set).max(), self.limits.max_bound_descriptor_sets);
        ensure!(last < Some(most), "it uses set {}, but the device has only {most} sets", last.unwrap_or_default());
        let (bytes, most) = (kernel.push_constant_bytes, self.limits.max_push_constants_size);
        ensure!(bytes <= most, "it has {bytes} bytes of push constants, but the device takes only {most}");
        let subgroup = kernel.subgroup.filter(|size| self.takes_subgroup_size && self.subgroup_sizes.contains(size));
        let pipeline = Pipeline::new(&self.device, kernel, subgroup).context("the driver refuses it")?;

        let info = vk::PipelineInfoKHR::default().pipeline(pipeline.handle());
        // SAFETY: the pipeline lives, here and below.
        let executables = unsafe { self.executables.get_pipeline_executable_properties(&info) }?;
        let executable = executables.first().context("the driver made nothing of it")?;
        let info = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline.handle());
        // SAFETY: statistics were asked for with the pipeline.
        let statistics = unsafe { self.executables.get_pipeline_executable_statistics(&info) }?;
        let statistics: BTreeMap<_, _> = statistics.iter().filter_map(number).collect();
        let assembly = self.assembly(&info)?;
        ensure!(assembly.contains("BB0:"), "the driver has no disassembler: it was built without LLVM");

        // On RDNA, which has subgroups of 32, RADV counts a subgroup of 64 as two, and as many again as a SIMD has room for.
        let counted = if *self.subgroup_sizes.start() == 32 { u64::from(executable.subgroup_size) / 32 } else { 1 };
        let count = statistics.get("Subgroups per SIMD").context("the driver doesn't say how many subgroups a SIMD holds")?;
        Ok(Compiled {
            subgroup_size: executable.subgroup_size,
            subgroups_per_simd: (count / counted.max(1)).min(self.most_subgroups_per_simd.into()),
            most_subgroups_per_simd: self.most_subgroups_per_simd,
            statistics,
            assembly,
        })
    }

    fn assembly(&self, info: &vk::PipelineExecutableInfoKHR) -> Result<String> {
        // SAFETY: they were asked for with the pipeline.
        let mut texts = unsafe { self.executables.get_pipeline_executable_internal_representations(info) }?;
        let mut bytes: Vec<Vec<u8>> = texts.iter().map(|text| vec![0; text.data_size]).collect();
        for (text, bytes) in texts.iter_mut().zip(&mut bytes) {
            text.p_data = bytes.as_mut_ptr().cast();
        }
        let mut count = texts.len() as u32;
        let get = self.executables.fp().get_pipeline_executable_internal_representations_khr;
        // SAFETY: each text has room for the size that the driver gave before.
        unsafe { get(self.device.handle(), info, &mut count, texts.as_mut_ptr()) }.result()?;
        let found = texts.iter().zip(bytes).find(|(text, _)| text.name_as_c_str() == Ok(c"Assembly"));
        let (_, bytes) = found.context("the driver gives no assembly")?;
        let text = CStr::from_bytes_until_nul(&bytes).context("the driver's assembly has no end")?;
        Ok(text.to_string_lossy().into_owned())
    }
}

impl Drop for Compiler {
    fn drop(&mut self) {
        // SAFETY: pipelines don't outlive `compile`.
        unsafe { self.device.destroy_device(None) };
    }
}

fn number(statistic: &vk::PipelineExecutableStatisticKHR) -> Option<(String, u64)> {
    // RADV has no others.
    if statistic.format != vk::PipelineExecutableStatisticFormatKHR::UINT64 {
        return None;
    }
    let name = statistic.name_as_c_str().ok()?.to_string_lossy().into_owned();
    // SAFETY: the format says that it is this field of the union.
    Some((name, unsafe { statistic.value.u64 }))
}
