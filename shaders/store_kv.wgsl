// Stores the rows' keys and values in their pages: an invocation a pair of elements.
@group(0) @binding(2) var<storage, read> k: array<vec2<f32>>;           // [rows, stride / 2]
@group(0) @binding(3) var<storage, read> v: array<vec2<f32>>;           // [rows, stride / 2]
@group(0) @binding(4) var<storage, read_write> keys: array<u32>;        // pages of a layer
@group(0) @binding(5) var<storage, read_write> values: array<u32>;
@group(0) @binding(6) var<storage, read> positions: array<vec2<u32>>;   // [rows]: table of the sequence, position
@group(0) @binding(7) var<storage, read> tables: array<u32>;            // pages of all sequences

@compute @workgroup_size(WG)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let index = folded(group, groups) * WG + lane;
    let pairs = shape.kv_heads * shape.half_head; // in a row
    let row = index / pairs;
    if (row >= row_count()) {
        return;
    }
    let pair = index % pairs;
    let source = row * (shape.stride / 2u) + pair;
    let place = positions[row];
    let slot = kv_pair(place.x, place.y, pair / shape.half_head) + pair % shape.half_head;
    if (KV_F16) {
        // What f16 can't hold is indeterminate: the largest it can instead.
        let most = vec2(65504.0);
        keys[slot] = pack2x16float(clamp(k[source], -most, most));
        values[slot] = pack2x16float(clamp(v[source], -most, most));
    } else {
        keys[2u * slot] = bitcast<u32>(k[source].x);
        keys[2u * slot + 1u] = bitcast<u32>(k[source].y);
        values[2u * slot] = bitcast<u32>(v[source].x);
        values[2u * slot + 1u] = bitcast<u32>(v[source].y);
    }
}
