//! Every module that can be linked is sound, without a GPU, and says what Rust believes of it.

use naga::back::{PipelineConstants, hlsl, msl, pipeline_constants::process_overrides, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, ShaderStage, StorageAccess, TypeInner};

use crate::backend::KvType;
use crate::backend::wgpu::shaders::{Access, Kernel, Reduce, Shape, Tuning, Variant, constants, source};
use crate::kernels::matrix::DType;

/// Every module with each of its pipelines.
fn each_variant(mut check: impl FnMut(&str, Variant, Reduce)) {
    for kernel in Kernel::ALL {
        let weights = [DType::F32, DType::F16, DType::Bf16].map(Some);
        for weight in if kernel.has_weight() { &weights[..] } else { &[None] } {
            for reduce in [Reduce::Workgroup, Reduce::Subgroup] {
                for kv in if kernel.has_kv() { &[Some(KvType::F32), Some(KvType::F16)][..] } else { &[None] } {
                    let variant = Variant { kernel, weight: *weight, kv: *kv };
                    check(&format!("{variant:?} {reduce:?}"), variant, reduce);
                }
            }
        }
    }
}

fn parse(name: &str, variant: Variant, reduce: Reduce) -> naga::Module {
    let source = source(variant.kernel, variant.weight, reduce);
    naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)))
}

fn validate(module: &naga::Module, capabilities: Capabilities) -> Result<naga::valid::ModuleInfo, String> {
    Validator::new(ValidationFlags::all(), capabilities).validate(module).map_err(|e| format!("{:?}", e.into_inner()))
}

#[test]
fn every_variant_is_valid_and_translates_for_vulkan_metal_and_dx12() {
    let mut seen = 0;
    each_variant(|name, variant, reduce| {
        let module = parse(name, variant, reduce);
        let needs_subgroups = reduce == Reduce::Subgroup && variant.kernel.reduces();
        // `unpack2x16float` and its like, which every adapter of WebGPU has.
        let least = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        let capabilities = if needs_subgroups { least | Capabilities::SUBGROUP } else { least };
        let info = validate(&module, capabilities).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(validate(&module, least).is_err(), needs_subgroups, "{name}");

        let tuning = Tuning { reduce, lanes: 64, tiled: 8 };
        let constants: PipelineConstants =
            constants(variant, tuning, 128).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let (module, info) =
            process_overrides(&module, &info, Some((ShaderStage::Compute, "main")), &constants).unwrap_or_else(|e| panic!("{name}: {e}"));

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
    // Three kernels with a weight, two with a cache, four with neither, over both ways to reduce.
    assert_eq!(seen, 2 * (3 * 3 + 2 * 2 + 4));
}

#[test]
fn every_module_binds_what_rust_binds() {
    each_variant(|name, variant, reduce| {
        let module = parse(name, variant, reduce);
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
        let storage = variant.kernel.bindings().iter().copied().map(Some);
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
    let expected = fields!(Shape: rows_of width width4 stride out first_out accumulate heads half_head kv_heads first_head
        first_kv_head group window eps scale);
    assert_eq!(found, expected);
    assert_eq!(*span as usize, size_of::<Shape>());
}

#[test]
fn workgroups_stay_within_what_webgpu_promises() {
    each_variant(|name, variant, reduce| {
        let module = parse(name, variant, reduce);
        let info = validate(&module, Capabilities::all()).unwrap();
        let tuning = Tuning { reduce, lanes: 64, tiled: 8 };
        let constants: PipelineConstants =
            constants(variant, tuning, 512).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let (module, _) = process_overrides(&module, &info, Some((ShaderStage::Compute, "main")), &constants).unwrap();
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
