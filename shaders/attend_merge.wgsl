// Puts together what attention found in each span of positions: an invocation an element of a (row, head).
@group(0) @binding(2) var<storage, read> parts: array<f32>;     // [rows, heads, spans, head_dim + 2]: sums, the largest score, the sum of shares
@group(0) @binding(3) var<storage, read_write> y: array<f32>;   // [rows, stride]

@compute @workgroup_size(WG)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let head_dim = 2u * shape.half_head;
    let index = folded(group, groups) * WG + lane;
    let row = index / (shape.heads * head_dim);
    if (row >= row_count()) {
        return;
    }
    let element = index % (shape.heads * head_dim);
    let spans = counts.z;
    let first = index / head_dim * spans * (head_dim + 2u);
    var top = parts[first + head_dim];
    for (var span = 1u; span < spans; span++) {
        top = max(top, parts[first + span * (head_dim + 2u) + head_dim]);
    }
    var sum = 0.0;
    var total = 0.0;
    for (var span = 0u; span < spans; span++) {
        let at = first + span * (head_dim + 2u);
        // As in shaders/attend.wgsl: what is less than exp of this is nothing beside the largest.
        let share = exp(max(parts[at + head_dim] - top, -80.0));
        sum += share * parts[at + index % head_dim];
        total += share * parts[at + head_dim + 1u];
    }
    y[row * shape.stride + shape.lead + element] = sum / total;
}
