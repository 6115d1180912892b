// Projected queries, keys and values that have biases, or whose heads are normed, on their way to what shaders/finish/qkv.wgsl makes of
// them: a workgroup a head of a row.
@group(0) @binding(2) var<storage, read> weights: array<vec2<f32>>;   // a bias for each output; then the norm of a query's head, and of a key's
@group(0) @binding(3) var<storage, read> projected: array<vec2<f32>>; // [rows, 2 width4]

@compute @workgroup_size(WG)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let rotated_heads = shape.heads + shape.kv_heads;
    let heads = rotated_heads + shape.kv_heads;
    let index = folded(group, groups);
    let row = index / heads;
    let head = index % heads;
    if (row >= row_count()) {
        return;
    }
    let half = shape.half_head;
    let bias = head * half;
    let start = row * 2u * shape.width4 + bias;
    // Values are not normed.
    let normed = shape.accumulate == 1u && head < rotated_heads;
    var norm = shape.out / 2u;
    if (head >= shape.heads) {
        norm += half;
    }
    var scale = 1.0;
    if (normed) {
        var squares = vec4(0.0);
        for (var i = lane.index; i < half; i += WG) {
            let v = projected[start + i] + weights[bias + i];
            squares += vec4(v * v, 0.0, 0.0);
        }
        squares = group_sum(squares, lane);
        scale = inverseSqrt((squares.x + squares.y) / f32(2u * half) + shape.eps);
    }
    for (var i = lane.index; i < half; i += WG) {
        var v = projected[start + i] + weights[bias + i];
        if (normed) {
            v *= scale * weights[norm + i];
        }
        finish(row, bias + i, v);
    }
}
