// y = x weight^T for one or a few rows: a workgroup computes four outputs of one row.
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;  // [rows, width4]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;  // [rows, stride]

@compute @workgroup_size(WG)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    // Rows vary fastest, so that neighbours in time read the same weights.
    let index = folded(group, groups);
    let row = index % row_count();
    let first = index / row_count() * 4u;
    if (first >= shape.out) {
        return;
    }
    // Where fewer than four outputs are left, the last is computed again and not stored.
    let outs = min(vec4(first) + vec4(0u, 1u, 2u, 3u), vec4(shape.out - 1u));
    let start = row * shape.width4;
    var sums = vec4(0.0);
    for (var i = lane.index; i < shape.width4; i += WG) {
        let v = x[start + i];
        sums += vec4(
            dot(weight4(outs.x, i), v),
            dot(weight4(outs.y, i), v),
            dot(weight4(outs.z, i), v),
            dot(weight4(outs.w, i), v),
        );
    }
    sums = group_sum(sums, lane);
    let out = first + lane.index;
    if (lane.index < 4u && out < shape.out) {
        let at = row * shape.stride + shape.first_out + out;
        var sum = sums[lane.index];
        if (shape.accumulate == 1u) {
            sum += y[at];
        }
        y[at] = sum;
    }
}
