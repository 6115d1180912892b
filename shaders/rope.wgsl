// Rotates element i of every head with element i + head_dim / 2 by the row's position: an invocation a pair.
@group(0) @binding(2) var<storage, read_write> x: array<f32>; // [rows, stride]
@group(0) @binding(3) var<storage, read> angles: array<f32>;  // [rows, 2, half_head], cosines first

@compute @workgroup_size(WG)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let index = folded(group, groups) * WG + lane;
    let half = shape.half_head;
    let pairs = shape.heads * half; // in a row
    let row = index / pairs;
    if (row >= row_count()) {
        return;
    }
    let head = index % pairs / half;
    let i = index % half;
    let cosine = angles[2u * row * half + i];
    let sine = angles[(2u * row + 1u) * half + i];
    let at = row * shape.stride + 2u * head * half + i;
    let a = x[at];
    let b = x[at + half];
    x[at] = a * cosine - b * sine;
    x[at + half] = b * cosine + a * sine;
}
