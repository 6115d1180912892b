//! Every module that can be linked is sound, without a GPU, and says what Rust believes of it.

use naga::back::{PipelineConstants, hlsl, msl, pipeline_constants::process_overrides, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, ShaderStage, StorageAccess, TypeInner};

use crate::backend::wgpu::shaders::{Access, Finish, Kernel, Shape, constants, source};
use crate::backend::wgpu::tuning::{Few, Linear, Reduce, Tile, Tuning};
use crate::backend::wgpu::weights::Format;
use crate::backend::{KvType, Wire};

const TILE: Tile = Tile { side: 8, down: 4, across: 4 };

/// Tunings that differ in what modules are linked from.
fn tunings() -> [Tuning; 2] {
    let few = Few { tiles: 2, rows: 2, slices: 4 };
    let linear = Linear { one: few, few, many: Some((9, TILE)), int8: None };
    [(Reduce::Workgroup, false), (Reduce::Subgroup, true)].map(|(reduce, computed_levels)| Tuning {
        reduce,
        lanes: 64,
        computed_levels,
        unrolled: computed_levels,
        span: None,
        linear,
    })
}

/// Every kernel, linked with everything that it can be.
fn kernels() -> Vec<Kernel> {
    let mut all = vec![
        Kernel::RmsNorm,
        Kernel::Heads(KvType::F32),
        Kernel::Heads(KvType::F16),
        Kernel::Attend(KvType::F32),
        Kernel::Attend(KvType::F16),
        Kernel::AttendMerge,
        Kernel::Add,
        Kernel::TakeRows,
        Kernel::Quantise,
    ];
    all.extend([Wire::F16, Wire::Bf16].into_iter().flat_map(|wire| [Kernel::Narrow(wire), Kernel::Widen(wire)]));
    for format in Format::all() {
        for finish in [Finish::Store, Finish::SwiGlu, Finish::Qkv(KvType::F32), Finish::Qkv(KvType::F16)] {
            for (tiles, rows, slices) in [(1, 1, 8), (4, 4, 1)] {
                all.push(Kernel::Linear(format, finish, Few { tiles, rows, slices }));
            }
            all.push(Kernel::LinearTile(format, finish, TILE));
            if format.int8_source().is_some() {
                all.push(Kernel::LinearInt8(format, finish, TILE));
            }
        }
    }
    all
}

fn each_variant(mut check: impl FnMut(&str, Kernel, Tuning)) {
    for kernel in kernels() {
        for tuning in tunings() {
            check(&format!("{kernel:?} {:?}", tuning.reduce), kernel, tuning);
        }
    }
}

fn parse(name: &str, kernel: Kernel, tuning: Tuning) -> naga::Module {
    let source = source(kernel, tuning);
    naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)))
}

/// With the values of its overrides.
fn specialised(name: &str, kernel: Kernel, tuning: Tuning, head_dim: usize) -> (naga::Module, naga::valid::ModuleInfo) {
    let module = parse(name, kernel, tuning);
    let info = validate(&module, Capabilities::all()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let constants: PipelineConstants =
        constants(kernel, tuning, head_dim).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let (module, info) =
        process_overrides(&module, &info, Some((ShaderStage::Compute, "main")), &constants).unwrap_or_else(|e| panic!("{name}: {e}"));
    (module.into_owned(), info.into_owned())
}

fn validate(module: &naga::Module, capabilities: Capabilities) -> Result<naga::valid::ModuleInfo, String> {
    Validator::new(ValidationFlags::all(), capabilities).validate(module).map_err(|e| format!("{:?}", e.into_inner()))
}

#[test]
fn every_variant_is_valid_and_translates_for_vulkan_metal_and_dx12() {
    let mut seen = 0;
    each_variant(|name, kernel, tuning| {
        let module = parse(name, kernel, tuning);
        let needs_subgroups = tuning.reduce == Reduce::Subgroup && kernel.reduces();
        // `unpack2x16float` and its like, which every adapter of WebGPU has.
        let least = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        let capabilities = if needs_subgroups { least | Capabilities::SUBGROUP } else { least };
        validate(&module, capabilities).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(validate(&module, least).is_err(), needs_subgroups, "{name}");

        let (module, info) = specialised(name, kernel, tuning, 128);

        // 1.3, for subgroup operations.
        let options = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
        let words = spv::write_vec(&module, &info, &options, None).unwrap_or_else(|e| panic!("{name}: SPIR-V: {e}"));
        assert_eq!(words[0], 0x0723_0203, "{name}: SPIR-V's magic number");

        let options = msl::Options { lang_version: (2, 4), ..msl::Options::default() };
        msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).unwrap_or_else(|e| panic!("{name}: MSL: {e}"));

        let options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_0, ..hlsl::Options::default() };
        let mut text = String::new();
        hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
            .write(&module, &info, None)
            .unwrap_or_else(|e| panic!("{name}: HLSL: {e}"));
        seen += 1;
    });
    assert_eq!(seen, 2 * kernels().len());
}

#[test]
fn every_module_binds_what_rust_binds() {
    each_variant(|name, kernel, tuning| {
        let module = parse(name, kernel, tuning);
        let mut found: Vec<(u32, Option<Access>)> = module
            .global_variables
            .iter()
            .filter_map(|(_, global)| {
                let binding = global.binding?;
                assert_eq!(binding.group, 0, "{name}");
                let access = match global.space {
                    AddressSpace::Uniform => None,
                    AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => Some(Access::Write),
                    AddressSpace::Storage { .. } => Some(Access::Read),
                    space => panic!("{name}: binding {} is in {space:?}", binding.binding),
                };
                Some((binding.binding, access))
            })
            .collect();
        found.sort_by_key(|(binding, _)| *binding);
        let storage = kernel.bindings().iter().copied().map(Some);
        let expected: Vec<_> = (0..).zip([None, None].into_iter().chain(storage)).collect();
        assert_eq!(found, expected, "{name}");
        assert!(storage_buffers(&found) <= 8, "{name}: more storage buffers than WebGPU promises");
    });
}

fn storage_buffers(bindings: &[(u32, Option<Access>)]) -> usize {
    bindings.iter().filter(|(_, access)| access.is_some()).count()
}

/// Names and offsets of a `repr(C)` struct's fields, from its declaration.
macro_rules! fields {
    ($type:ty: $($field:ident)*) => {
        vec![$((stringify!($field).to_owned(), std::mem::offset_of!($type, $field) as u32)),*]
    };
}

#[test]
fn the_shape_is_the_same_struct_in_both_languages() {
    let module = naga::front::wgsl::parse_str(include_str!("../../../../shaders/prelude.wgsl")).unwrap();
    let (_, shape) = module.types.iter().find(|(_, t)| t.name.as_deref() == Some("Shape")).unwrap();
    let TypeInner::Struct { members, span } = &shape.inner else { panic!("Shape is {:?}", shape.inner) };
    let found: Vec<_> = members.iter().map(|m| (m.name.clone().unwrap(), m.offset)).collect();
    let expected = fields!(Shape: rows_of width width4 stride blocks out first_out accumulate heads half_head kv_heads first_head
        first_kv_head group window lead eps scale phase unused);
    assert_eq!(found, expected);
    assert_eq!(*span as usize, size_of::<Shape>());
}

#[test]
fn workgroups_stay_within_what_webgpu_promises() {
    each_variant(|name, kernel, tuning| {
        let (module, _) = specialised(name, kernel, tuning, 512);
        let invocations: u32 = module.entry_points[0].workgroup_size.iter().product();
        assert!(invocations <= 256, "{name}: {invocations} invocations");
        let bytes: u32 = module
            .global_variables
            .iter()
            .filter(|(_, global)| global.space == AddressSpace::WorkGroup)
            .map(|(_, global)| module.types[global.ty].inner.size(module.to_ctx()))
            .sum();
        assert!(bytes <= 16 << 10, "{name}: {bytes} bytes of workgroup memory");
    });
}

/// Writes every kernel as the Vulkan backend would hand it to a driver, for `benches/compilers`, which says what comes of it.
#[test]
#[ignore = "writes files to the directory that TORCHLESS_KERNELS names"]
fn kernels_are_written_for_compilers() {
    let directory = std::path::PathBuf::from(std::env::var_os("TORCHLESS_KERNELS").expect("TORCHLESS_KERNELS names a directory"));
    std::fs::create_dir_all(&directory).unwrap();
    let (hardware, head_dim) = (Tuning::HARDWARE, 128);
    let Linear { one, few, many, .. } = hardware.linear;
    let mut kernels = vec![
        Kernel::RmsNorm,
        Kernel::Heads(KvType::F16),
        Kernel::Attend(KvType::F16),
        Kernel::Attend(KvType::F32),
        Kernel::AttendMerge,
        Kernel::Add,
        Kernel::TakeRows,
        Kernel::Quantise,
        Kernel::Narrow(Wire::F16),
        Kernel::Narrow(Wire::Bf16),
        Kernel::Widen(Wire::F16),
        Kernel::Widen(Wire::Bf16),
    ];
    for format in Format::all() {
        let finish = [Finish::Store, Finish::SwiGlu, Finish::Qkv(KvType::F16)];
        kernels.extend(finish.map(|finish| Kernel::Linear(format, finish, one)));
        kernels.push(Kernel::Linear(format, Finish::Store, few));
        if let Some((_, tile)) = many {
            kernels.push(Kernel::LinearTile(format, Finish::Store, tile));
            if format.int8_source().is_some() {
                kernels.push(Kernel::LinearInt8(format, Finish::Store, tile));
            }
        }
    }
    let mut listed = Vec::new();
    for (i, kernel) in kernels.into_iter().enumerate() {
        let name = match kernel {
            Kernel::Linear(format, finish, Few { tiles, rows, slices }) => {
                format!("linear {} {finish:?} {tiles}x{rows}x{slices}", format.name())
            }
            Kernel::LinearTile(format, finish, Tile { side, down, across }) => {
                format!("linear_tile {} {finish:?} {side}x{down}x{across}", format.name())
            }
            Kernel::LinearInt8(format, finish, Tile { side, down, across }) => {
                format!("linear_int8 {} {finish:?} {side}x{down}x{across}", format.name())
            }
            other => format!("{other:?}"),
        };
        let (module, info) = specialised(&name, kernel, hardware, head_dim);
        let options = spv::Options {
            lang_version: (1, 3),
            force_loop_bounding: false,
            zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
            ..spv::Options::default()
        };
        let words = spv::write_vec(&module, &info, &options, None).unwrap_or_else(|e| panic!("{name}: SPIR-V: {e}"));
        let file = format!("{i}.spv");
        std::fs::write(directory.join(&file), bytemuck::cast_slice(&words)).unwrap();
        let weights = if let Kernel::Linear(_, _, Few { tiles, .. }) = kernel { Some(32 * tiles) } else { None };
        let kinds = ["uniform"; 2].into_iter().chain(kernel.bindings().iter().map(|_| "storage"));
        let bindings: Vec<_> = (0..).zip(kinds).map(|(i, kind)| serde_json::json!({"set": 0, "binding": i, "kind": kind})).collect();
        listed.push(serde_json::json!({
            "name": name, "file": file, "entry": "main", "weights_per_iteration": weights, "bindings": bindings, "robust": true,
        }));
    }
    std::fs::write(directory.join("kernels.json"), serde_json::to_string_pretty(&listed).unwrap()).unwrap();
}
