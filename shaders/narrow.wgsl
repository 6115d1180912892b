// Rows that leave the device in 2 bytes an element: an invocation a vector of 4.
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;        // [rows, width4]
@group(0) @binding(3) var<storage, read_write> y: array<vec2<u32>>;  // [rows, width4]

@compute @workgroup_size(WG)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let index = folded(group, groups) * WG + lane;
    if (index < row_count() * shape.width4) {
        y[index] = narrow4(x[index]);
    }
}
