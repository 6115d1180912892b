//! The kernels: which WGSL files make a module, what they bind, and the pipelines of one device.
//!
//! Module-scope order is free in WGSL, so concatenation is the linker: a module is the prelude, the kernel, and the fragments
//! that it calls (`block4`, `int8x16`, `finish`, `group_sum`, `kv_pair`, `narrow4`).

mod unroll;

use std::collections::HashMap;
use std::num::NonZero;

use super::tuning::{Few, Reduce, Tile, Tuning};
use super::weights::Format;
use crate::backend::{KvType, Wire};
use crate::kernels::matrix::DType;
use crate::kernels::quant::QuantFormat;
use unroll::unroll;

/// A kernel: a WGSL file, named like its twin on the CPU, with what it is linked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    RmsNorm,
    Linear(Format, Finish, Few),
    LinearTile(Format, Finish, Tile),
    LinearInt8(Format, Finish, Tile),
    Quantise,
    Heads(KvType),
    Attend(KvType),
    AttendMerge,
    Add,
    TakeRows,
    Narrow(Wire),
    Widen(Wire),
}

/// What becomes of the outputs of a linear layer: a file of `shaders/finish/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Finish {
    Store,
    SwiGlu,
    Qkv(KvType),
}

/// How a kernel uses one of its storage buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Access {
    Read,
    Write,
}

use Access::{Read, Write};

impl Kernel {
    fn source(self) -> &'static str {
        match self {
            Self::RmsNorm => include_str!("../../../shaders/rms_norm.wgsl"),
            Self::Linear(..) => include_str!("../../../shaders/linear.wgsl"),
            Self::LinearTile(..) => include_str!("../../../shaders/linear_tile.wgsl"),
            Self::LinearInt8(..) => include_str!("../../../shaders/linear_int8.wgsl"),
            Self::Quantise => include_str!("../../../shaders/quantise.wgsl"),
            Self::Heads(_) => include_str!("../../../shaders/heads.wgsl"),
            Self::Attend(_) => include_str!("../../../shaders/attend.wgsl"),
            Self::AttendMerge => include_str!("../../../shaders/attend_merge.wgsl"),
            Self::Add => include_str!("../../../shaders/add.wgsl"),
            Self::TakeRows => include_str!("../../../shaders/take_rows.wgsl"),
            Self::Narrow(_) => include_str!("../../../shaders/narrow.wgsl"),
            Self::Widen(_) => include_str!("../../../shaders/widen.wgsl"),
        }
    }

    /// Of a linear layer: how its weight is held, and what becomes of its outputs.
    fn linear(self) -> Option<(Format, Finish)> {
        match self {
            Self::Linear(format, finish, _) | Self::LinearTile(format, finish, _) | Self::LinearInt8(format, finish, _) => {
                Some((format, finish))
            }
            _ => None,
        }
    }

    /// Whether it calls `group_sum` or `group_max`.
    pub(super) fn reduces(self) -> bool {
        matches!(self, Self::RmsNorm | Self::Heads(_) | Self::Attend(_))
    }

    /// The type of the pages that it touches.
    fn kv(self) -> Option<KvType> {
        match self {
            Self::Heads(kv) | Self::Attend(kv) => Some(kv),
            _ => match self.linear() {
                Some((_, Finish::Qkv(kv))) => Some(kv),
                _ => None,
            },
        }
    }

    /// Its storage buffers, from binding 2; 0 and 1 are the uniforms of the prelude.
    pub(super) fn bindings(self) -> &'static [Access] {
        match self {
            Self::RmsNorm => &[Read, Write, Write, Read],
            Self::Linear(_, finish, _) | Self::LinearTile(_, finish, _) | Self::LinearInt8(_, finish, _) => match finish {
                Finish::Store | Finish::SwiGlu => &[Read, Read, Write],
                Finish::Qkv(_) => &[Read, Read, Write, Write, Write, Read, Read, Read],
            },
            // As those of a linear layer whose end it takes over.
            Self::Heads(_) => &[Read, Read, Write, Write, Write, Read, Read, Read],
            Self::Attend(_) => &[Read, Write, Read, Read, Read, Read, Write],
            Self::Quantise | Self::AttendMerge | Self::Narrow(_) | Self::Widen(_) => &[Read, Write],
            Self::Add => &[Write, Read],
            Self::TakeRows => &[Read, Write, Read],
        }
    }
}

/// A file of `shaders/weights/`.
macro_rules! weights {
    ($name:literal) => {
        include_str!(concat!("../../../shaders/weights/", $name, ".wgsl"))
    };
}

impl Format {
    fn sources(self, tuning: Tuning) -> Vec<&'static str> {
        const PLAIN: &str = weights!("plain");
        const DENSE: &str = weights!("dense");
        const NIBBLES: &str = weights!("nibbles");
        match self {
            Self::Stored(DType::F32) => vec![PLAIN, DENSE, weights!("f32")],
            Self::Stored(DType::F16) => vec![PLAIN, DENSE, weights!("f16")],
            Self::Stored(DType::Bf16) => vec![PLAIN, DENSE, weights!("bf16")],
            Self::Stored(DType::Quantised(format)) | Self::Packed(format) => match format {
                QuantFormat::Q8_0 => vec![PLAIN, weights!("q8_0")],
                QuantFormat::Q4_0 => vec![PLAIN, NIBBLES, weights!("q4_0")],
                QuantFormat::Iq4Nl if tuning.computed_levels => vec![PLAIN, NIBBLES, weights!("iq4_nl_computed")],
                QuantFormat::Iq4Nl => vec![PLAIN, NIBBLES, weights!("iq4_nl")],
                QuantFormat::Q4_1 => vec![weights!("q4_1")],
                QuantFormat::Q5_0 => vec![PLAIN, weights!("q5_0")],
                QuantFormat::Q5_1 => vec![weights!("q5_1")],
                QuantFormat::Q4K => vec![weights!("q4_k")],
                QuantFormat::Q5K => vec![weights!("q5_k")],
                QuantFormat::Q6K => vec![weights!("q6_k")],
            },
        }
    }

    /// What gives the weights as int8, where they are such times a scale; `None` where there is no such kernel.
    pub(super) fn int8_source(self) -> Option<&'static str> {
        match self {
            Self::Packed(QuantFormat::Q8_0) => Some(weights!("int8/q8_0")),
            Self::Packed(QuantFormat::Q4_0) => Some(weights!("int8/q4_0")),
            Self::Packed(QuantFormat::Iq4Nl) => Some(weights!("int8/iq4_nl")),
            Self::Packed(_) | Self::Stored(_) => None,
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
    pub blocks: u32,
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
    pub lead: u32,
    pub eps: f32,
    pub scale: f32,
    pub phase: u32,
    pub unused: u32,
}

/// The WGSL of a module.
pub(super) fn source(kernel: Kernel, tuning: Tuning) -> String {
    let mut parts = vec![include_str!("../../../shaders/prelude.wgsl"), kernel.source()];
    if let Some((format, finish)) = kernel.linear() {
        parts.push(include_str!("../../../shaders/weights/blocks.wgsl"));
        parts.extend(format.sources(tuning));
        if matches!(kernel, Kernel::LinearInt8(..)) {
            parts.extend(format.int8_source());
        }
        parts.push(match finish {
            Finish::Store => include_str!("../../../shaders/finish/store.wgsl"),
            Finish::SwiGlu => include_str!("../../../shaders/finish/swiglu.wgsl"),
            Finish::Qkv(_) => include_str!("../../../shaders/finish/qkv.wgsl"),
        });
    }
    if matches!(kernel, Kernel::Heads(_)) {
        parts.push(include_str!("../../../shaders/finish/qkv.wgsl"));
    }
    if kernel.reduces() {
        parts.push(match tuning.reduce {
            Reduce::Workgroup => include_str!("../../../shaders/reduce/workgroup.wgsl"),
            Reduce::Subgroup => include_str!("../../../shaders/reduce/subgroup.wgsl"),
        });
    }
    if kernel.kv().is_some() {
        parts.push(include_str!("../../../shaders/kv.wgsl"));
    }
    if let Kernel::Narrow(wire) | Kernel::Widen(wire) = kernel {
        parts.push(match wire {
            Wire::F32 => "",
            Wire::F16 => include_str!("../../../shaders/wire/f16.wgsl"),
            Wire::Bf16 => include_str!("../../../shaders/wire/bf16.wgsl"),
        });
    }
    let constants = match kernel {
        Kernel::Linear(.., Few { tiles, rows, slices }) => vec![("TILES", tiles), ("ROWS", rows), ("SLICES", slices)],
        Kernel::LinearTile(.., Tile { side, down, across }) | Kernel::LinearInt8(.., Tile { side, down, across }) => {
            vec![("SIDE", side), ("M", down), ("N", across), ("HALF_N", across / 2)]
        }
        _ => vec![],
    };
    let written = constants.iter().map(|(name, value)| format!("const {name}: u32 = {value}u;\n")).collect::<String>();
    let columns = if tuning.unrolled { Some(("VECTORS", 8)) } else { None };
    // Slices are many, and no array has one for each.
    let lengths: Vec<_> = constants.into_iter().filter(|(name, _)| *name != "SLICES").chain(columns).collect();
    written + &unroll(&parts.join("\n"), &lengths)
}

/// Invocations in a workgroup of the kernels that compute an element each.
pub(super) const ELEMENTS: u32 = 64;

/// The values of the module's `override`s.
pub(super) fn constants(kernel: Kernel, tuning: Tuning, head_dim: usize) -> Vec<(&'static str, f64)> {
    let mut all = Vec::new();
    match kernel {
        Kernel::RmsNorm => all.push(("WG", f64::from(tuning.lanes))),
        // Attention has a lane for each position of a block.
        Kernel::Attend(_) => all.extend([("WG", f64::from(ELEMENTS)), ("HALF_HEAD", (head_dim / 2) as f64)]),
        Kernel::Heads(_)
        | Kernel::Quantise
        | Kernel::AttendMerge
        | Kernel::Add
        | Kernel::TakeRows
        | Kernel::Narrow(_)
        | Kernel::Widen(_) => all.push(("WG", f64::from(ELEMENTS))),
        Kernel::Linear(..) | Kernel::LinearTile(..) | Kernel::LinearInt8(..) => {}
    }
    if let Some(kv) = kernel.kv() {
        all.push(("KV_F16", f64::from(u8::from(kv == KvType::F16))));
    }
    all
}

/// The pipelines of one device, each compiled once.
pub(super) struct Pipelines<'a> {
    device: &'a wgpu::Device,
    tuning: Tuning,
    head_dim: usize,
    layouts: HashMap<&'static [Access], wgpu::BindGroupLayout>,
    made: HashMap<Kernel, wgpu::ComputePipeline>,
}

impl<'a> Pipelines<'a> {
    pub(super) fn new(device: &'a wgpu::Device, tuning: Tuning, head_dim: usize) -> Self {
        Self { device, tuning, head_dim, layouts: HashMap::new(), made: HashMap::new() }
    }

    /// The bind group layout of a kernel, which all that bind alike share.
    pub(super) fn layout(&mut self, kernel: Kernel) -> &wgpu::BindGroupLayout {
        self.layouts.entry(kernel.bindings()).or_insert_with(|| {
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

    /// Binds what a kernel reads and writes: its shape, at byte `at` of `shapes`, the counts, and its storage buffers.
    pub(super) fn bind<'b>(
        &mut self,
        kernel: Kernel,
        shapes: &'b wgpu::Buffer,
        at: u64,
        counts: &'b wgpu::Buffer,
        buffers: impl IntoIterator<Item = &'b wgpu::Buffer>,
    ) -> wgpu::BindGroup {
        let shape = wgpu::BufferBinding { buffer: shapes, offset: at, size: NonZero::new(size_of::<Shape>() as u64) };
        let buffers = std::iter::once(counts).chain(buffers).map(wgpu::Buffer::as_entire_binding);
        let resources = std::iter::once(wgpu::BindingResource::Buffer(shape)).chain(buffers);
        let entries: Vec<_> = resources.enumerate().map(|(i, resource)| wgpu::BindGroupEntry { binding: i as u32, resource }).collect();
        let device = self.device;
        device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: self.layout(kernel), entries: &entries })
    }

    pub(super) fn get(&mut self, kernel: Kernel) -> wgpu::ComputePipeline {
        if let Some(pipeline) = self.made.get(&kernel) {
            return pipeline.clone();
        }
        let label = format!("{kernel:?}");
        let source = source(kernel, self.tuning);
        let descriptor = wgpu::ShaderModuleDescriptor { label: Some(&label), source: wgpu::ShaderSource::Wgsl(source.into()) };
        // Every loop ends: its bound is a constant, a number of the shape or a position, far from where 32 bits end, and nothing else is
        // written to its variable. Guards against endless ones would count in two words, and end those of more than 65,535 steps on some drivers.
        let checks = wgpu::ShaderRuntimeChecks { force_loop_bounding: false, ..wgpu::ShaderRuntimeChecks::checked() };
        // SAFETY: no loop is endless, and all other checks are made.
        let module = unsafe { self.device.create_shader_module_trusted(descriptor, checks) };
        let constants = constants(kernel, self.tuning, self.head_dim);
        let device = self.device;
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(self.layout(kernel))],
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
        self.made.insert(kernel, pipeline.clone());
        pipeline
    }
}
