//! [`Pipeline`]: a compute pipeline with everything that it needs.

use std::ffi::CString;

use anyhow::{Context, Result};
use ash::{Device, vk};

use crate::manifest::{Kernel, Kind};

pub struct Pipeline<'a> {
    device: &'a Device,
    // Null until they are made.
    module: vk::ShaderModule,
    sets: Vec<vk::DescriptorSetLayout>,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
}

impl<'a> Pipeline<'a> {
    /// With its statistics and its assembly.
    pub fn new(device: &'a Device, kernel: &Kernel, subgroup: Option<u32>) -> Result<Self> {
        let mut this = Self {
            device,
            module: vk::ShaderModule::null(),
            sets: Vec::new(),
            layout: vk::PipelineLayout::null(),
            pipeline: vk::Pipeline::null(),
        };
        this.make_layout(kernel)?;
        this.make_pipeline(kernel, subgroup)?;
        Ok(this)
    }

    pub fn handle(&self) -> vk::Pipeline {
        self.pipeline
    }

    fn make_layout(&mut self, kernel: &Kernel) -> Result<()> {
        let sets = kernel.bindings.iter().map(|binding| binding.set + 1).max().unwrap_or(0);
        for set in 0..sets {
            let bindings: Vec<_> = kernel
                .bindings
                .iter()
                .filter(|binding| binding.set == set)
                .map(|binding| {
                    let kind = match binding.kind {
                        Kind::Uniform => vk::DescriptorType::UNIFORM_BUFFER,
                        Kind::Storage => vk::DescriptorType::STORAGE_BUFFER,
                    };
                    let layout = vk::DescriptorSetLayoutBinding::default().binding(binding.binding).descriptor_type(kind);
                    layout.descriptor_count(1).stage_flags(vk::ShaderStageFlags::COMPUTE)
                })
                .collect();
            let create = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            // SAFETY: what `create` points to is alive; so it is below.
            self.sets.push(unsafe { self.device.create_descriptor_set_layout(&create, None) }?);
        }
        let range = vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(kernel.push_constant_bytes);
        let ranges = if range.size > 0 { std::slice::from_ref(&range) } else { &[] };
        let create = vk::PipelineLayoutCreateInfo::default().set_layouts(&self.sets).push_constant_ranges(ranges);
        // SAFETY: the sets' layouts live.
        self.layout = unsafe { self.device.create_pipeline_layout(&create, None) }?;
        Ok(())
    }

    fn make_pipeline(&mut self, kernel: &Kernel, subgroup: Option<u32>) -> Result<()> {
        let create = vk::ShaderModuleCreateInfo::default().code(&kernel.spirv);
        // SAFETY: nobody has validated the SPIR-V. This process is for that, and its parent sees how it ends; so it is below.
        self.module = unsafe { self.device.create_shader_module(&create, None) }?;
        let entry = CString::new(&*kernel.entry).context("its entry point has a NUL in its name")?;
        let values: Vec<u8> = kernel.spec.iter().flat_map(|(_, value)| value.to_ne_bytes()).collect();
        let entries: Vec<_> = kernel
            .spec
            .iter()
            .zip(0..)
            .map(|((id, _), i)| vk::SpecializationMapEntry { constant_id: *id, offset: 4 * i, size: 4 })
            .collect();
        let specialization = vk::SpecializationInfo::default().map_entries(&entries).data(&values);
        let mut required = vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo::default();
        let mut stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(self.module)
            .name(&entry)
            .specialization_info(&specialization);
        if let Some(size) = subgroup {
            required.required_subgroup_size = size;
            stage = stage.push_next(&mut required);
        }
        let capture = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
        let create = vk::ComputePipelineCreateInfo::default().flags(capture).stage(stage).layout(self.layout);
        // SAFETY: module and layout live.
        let made = unsafe { self.device.create_compute_pipelines(vk::PipelineCache::null(), &[create], None) };
        // Of one pipeline there is one result, null where it failed.
        self.pipeline = made.map_err(|(_, error)| error)?.into_iter().next().unwrap_or_default();
        Ok(())
    }
}

impl Drop for Pipeline<'_> {
    fn drop(&mut self) {
        // SAFETY: all are the device's or null, and nothing else knows them.
        unsafe {
            self.device.destroy_pipeline(self.pipeline, None);
            self.device.destroy_pipeline_layout(self.layout, None);
            self.sets.iter().for_each(|set| self.device.destroy_descriptor_set_layout(*set, None));
            self.device.destroy_shader_module(self.module, None);
        }
    }
}
