// y = x / sqrt(mean(x^2) + eps) * weight, where `added` may be added to x first: a workgroup a row.
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;  // [width4]
@group(0) @binding(3) var<storage, read_write> x: array<vec4<f32>>; // [rows, width4]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>; // [rows, width4]
@group(0) @binding(5) var<storage, read> added: array<vec4<f32>>;   // [rows, width4]

@compute @workgroup_size(WG)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = folded(group, groups);
    if (row >= row_count()) {
        return;
    }
    let start = row * shape.width4;
    var squares = vec4(0.0);
    for (var i = lane.index; i < shape.width4; i += WG) {
        var v = x[start + i];
        if (shape.accumulate == 1u) {
            v += added[start + i];
            x[start + i] = v;
        }
        squares += v * v;
    }
    squares = group_sum(squares, lane);
    let mean = (squares.x + squares.y + squares.z + squares.w) / f32(shape.width);
    let scale = inverseSqrt(mean + shape.eps);
    for (var i = lane.index; i < shape.width4; i += WG) {
        y[start + i] = x[start + i] * scale * weight[i];
    }
}
