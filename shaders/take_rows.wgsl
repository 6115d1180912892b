// The rows of x whose logits are wanted: an invocation a vector of 4.
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;       // [rows, width4]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>; // [wanted, width4]
@group(0) @binding(4) var<storage, read> wanted: array<u32>;        // [wanted]

@compute @workgroup_size(WG)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let index = folded(group, groups) * WG + lane;
    if (index < row_count() * shape.width4) {
        let row = index / shape.width4;
        y[index] = x[wanted[row] * shape.width4 + index % shape.width4];
    }
}
