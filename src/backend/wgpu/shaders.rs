//! The kernels: which WGSL files make a module, what they bind, and the pipelines of one device.
//!
//! Module-scope order is free in WGSL, so concatenation is the linker: a module is the prelude, the kernel, and the fragments
//! that it calls (`weight4`, `group_sum`, `kv_pair`).

use std::collections::HashMap;

use super::adapters::Adapter;
use crate::backend::KvType;
use crate::kernels::matrix::DType;

/// A kernel: a WGSL file, named like its twin on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    RmsNorm,
    Linear,
    LinearTile,
    Rope,
    StoreKv,
    Attend,
    SwiGlu,
    Add,
    TakeRows,
}

/// How a kernel uses one of its storage buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

use Access::{Read, Write};

/// How a workgroup reduces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Reduce {
    /// Through workgroup memory; every adapter can.
    Workgroup,
    /// By subgroup operations, which need [`wgpu::Features::SUBGROUP`].
    Subgroup,
}

impl Kernel {
    #[cfg(test)]
    pub(super) const ALL: [Self; 9] =
        [Self::RmsNorm, Self::Linear, Self::LinearTile, Self::Rope, Self::StoreKv, Self::Attend, Self::SwiGlu, Self::Add, Self::TakeRows];

    fn source(self) -> &'static str {
        match self {
            Self::RmsNorm => include_str!("../../../shaders/rms_norm.wgsl"),
            Self::Linear => include_str!("../../../shaders/linear.wgsl"),
            Self::LinearTile => include_str!("../../../shaders/linear_tile.wgsl"),
            Self::Rope => include_str!("../../../shaders/rope.wgsl"),
            Self::StoreKv => include_str!("../../../shaders/store_kv.wgsl"),
            Self::Attend => include_str!("../../../shaders/attend.wgsl"),
            Self::SwiGlu => include_str!("../../../shaders/swiglu.wgsl"),
            Self::Add => include_str!("../../../shaders/add.wgsl"),
            Self::TakeRows => include_str!("../../../shaders/take_rows.wgsl"),
        }
    }

    /// Whether it calls `weight4`, so that it needs a weight at binding 2.
    pub(super) fn has_weight(self) -> bool {
        matches!(self, Self::RmsNorm | Self::Linear | Self::LinearTile)
    }

    /// Whether it calls `group_sum` or `group_max`.
    pub(super) fn reduces(self) -> bool {
        matches!(self, Self::RmsNorm | Self::Linear | Self::Attend)
    }

    /// Whether it touches the pages of keys and values.
    pub(super) fn has_kv(self) -> bool {
        matches!(self, Self::StoreKv | Self::Attend)
    }

    /// Its storage buffers, from binding 2; 0 and 1 are the uniforms of the prelude.
    pub(super) fn bindings(self) -> &'static [Access] {
        match self {
            Self::RmsNorm | Self::Linear | Self::LinearTile => &[Read, Read, Write],
            Self::Rope => &[Write, Read],
            Self::StoreKv => &[Read, Read, Write, Write, Read, Read],
            Self::Attend => &[Read, Write, Read, Read, Read, Read],
            Self::SwiGlu => &[Read, Read, Write],
            Self::Add => &[Write, Read],
            Self::TakeRows => &[Read, Write, Read],
        }
    }
}

/// The shape of an op, as `shaders/prelude.wgsl` declares it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Shape {
    pub rows_of: u32,
    pub width: u32,
    pub width4: u32,
    pub stride: u32,
    pub out: u32,
    pub first_out: u32,
    pub accumulate: u32,
    pub heads: u32,
    pub half_head: u32,
    pub kv_heads: u32,
    pub first_head: u32,
    pub first_kv_head: u32,
    pub group: u32,
    pub window: u32,
    pub eps: f32,
    pub scale: f32,
}

/// What picks one of a kernel's pipelines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    pub kernel: Kernel,
    /// Of the weight, for kernels that have one.
    pub weight: Option<DType>,
    /// For kernels that touch the cache.
    pub kv: Option<KvType>,
}

/// The WGSL of a module.
pub(super) fn source(kernel: Kernel, weight: Option<DType>, reduce: Reduce) -> String {
    let mut parts = vec![include_str!("../../../shaders/prelude.wgsl"), kernel.source()];
    match weight.filter(|_| kernel.has_weight()) {
        Some(DType::F32) => parts.push(include_str!("../../../shaders/weights/f32.wgsl")),
        Some(DType::F16) => parts.push(include_str!("../../../shaders/weights/f16.wgsl")),
        Some(DType::Bf16) => parts.push(include_str!("../../../shaders/weights/bf16.wgsl")),
        None => {}
    }
    if kernel.reduces() {
        parts.push(match reduce {
            Reduce::Workgroup => include_str!("../../../shaders/reduce/workgroup.wgsl"),
            Reduce::Subgroup => include_str!("../../../shaders/reduce/subgroup.wgsl"),
        });
    }
    if kernel.has_kv() {
        parts.push(include_str!("../../../shaders/kv.wgsl"));
    }
    parts.join("\n")
}

/// Invocations in a workgroup of the kernels that compute an element or a pair each.
pub(super) const ELEMENTS: u32 = 64;

/// What is chosen for an adapter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tuning {
    pub reduce: Reduce,
    /// Invocations that share a reduction; a power of two, at least 4.
    pub lanes: u32,
    /// From this many rows on a linear layer is computed in tiles.
    pub tiled: usize,
}

impl Tuning {
    pub(super) fn of(adapter: &Adapter) -> Self {
        // Software adapters run a workgroup on one core: a lane beyond its vector's width only adds barriers. Measured on three
        // of them, 8 lanes took a quarter to half of the time of 64, and tiles paid from about 30 rows on.
        if adapter.is_software() {
            return Self { reduce: Reduce::Workgroup, lanes: 8, tiled: 32 };
        }
        let subgroups = adapter.features.contains(wgpu::Features::SUBGROUP);
        Self { reduce: if subgroups { Reduce::Subgroup } else { Reduce::Workgroup }, lanes: 64, tiled: 8 }
    }
}

/// The values of the module's `override`s.
pub(super) fn constants(variant: Variant, tuning: Tuning, head_dim: usize) -> Vec<(&'static str, f64)> {
    let shared = matches!(variant.kernel, Kernel::RmsNorm | Kernel::Linear);
    // Attention has a lane for each position of a block.
    let mut all = vec![("WG", f64::from(if shared { tuning.lanes } else { ELEMENTS }))];
    if let Some(kv) = variant.kv {
        all.push(("KV_F16", f64::from(u8::from(kv == KvType::F16))));
    }
    if variant.kernel == Kernel::Attend {
        all.push(("HALF_HEAD", (head_dim / 2) as f64));
    }
    all
}

/// The pipelines of one device, each compiled once.
pub(super) struct Pipelines<'a> {
    device: &'a wgpu::Device,
    tuning: Tuning,
    head_dim: usize,
    layouts: HashMap<Kernel, wgpu::BindGroupLayout>,
    made: HashMap<Variant, wgpu::ComputePipeline>,
}

impl<'a> Pipelines<'a> {
    pub(super) fn new(device: &'a wgpu::Device, tuning: Tuning, head_dim: usize) -> Self {
        Self { device, tuning, head_dim, layouts: HashMap::new(), made: HashMap::new() }
    }

    /// The bind group layout of a kernel, which all its variants share. Both forms of a linear layer bind the same.
    pub(super) fn layout(&mut self, kernel: Kernel) -> &wgpu::BindGroupLayout {
        let kernel = if kernel == Kernel::LinearTile { Kernel::Linear } else { kernel };
        self.layouts.entry(kernel).or_insert_with(|| {
            let entry = |binding: usize, ty| wgpu::BindGroupLayoutEntry {
                binding: binding as u32,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
                count: None,
            };
            let uniforms = (0..2).map(|i| entry(i, wgpu::BufferBindingType::Uniform));
            let storage = kernel.bindings().iter().enumerate().map(|(i, access)| {
                let read_only = *access == Access::Read;
                entry(i + 2, wgpu::BufferBindingType::Storage { read_only })
            });
            let entries: Vec<_> = uniforms.chain(storage).collect();
            self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries })
        })
    }

    pub(super) fn get(&mut self, variant: Variant) -> wgpu::ComputePipeline {
        if let Some(pipeline) = self.made.get(&variant) {
            return pipeline.clone();
        }
        let label = format!("{variant:?}");
        let source = source(variant.kernel, variant.weight, self.tuning.reduce);
        let module = self
            .device
            .create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(&label), source: wgpu::ShaderSource::Wgsl(source.into()) });
        let constants = constants(variant, self.tuning, self.head_dim);
        let device = self.device;
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(self.layout(variant.kernel))],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                // Every kernel writes its workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        self.made.insert(variant, pipeline.clone());
        pipeline
    }
}
