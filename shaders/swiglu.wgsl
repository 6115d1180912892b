// y = silu(gate) * up: an invocation a vector of 4.
@group(0) @binding(2) var<storage, read> gate: array<vec4<f32>>;    // [rows, width4]
@group(0) @binding(3) var<storage, read> up: array<vec4<f32>>;      // [rows, width4]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>; // [rows, width4]

@compute @workgroup_size(WG)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let index = folded(group, groups) * WG + lane;
    if (index >= row_count() * shape.width4) {
        return;
    }
    let g = gate[index];
    // Never exp of something positive: it may overflow, and infinities are not to be relied on.
    let e = exp(-abs(g));
    let sigmoid = select(e, vec4(1.0), g >= vec4(0.0)) / (1.0 + e);
    y[index] = g * sigmoid * up[index];
}
