// Activations in int8, for linear_int8.wgsl: an invocation a block of 32 columns, which becomes the nearest of -127..=127 times a scale,
// max |x| / 127. Rows are padded to whole blocks, so that a block needs not know its row.
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;               // [rows, width4]
@group(0) @binding(3) var<storage, read_write> quantised: array<vec4<u32>>; // [rows, blocks, 3]: 4 values in a word, and the scale

// Below this a block is zero: the inverse of its scale would be infinite.
const LEAST: f32 = 1e-30;

@compute @workgroup_size(WG)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let block = folded(group, groups) * WG + lane;
    if (block >= row_count() * (shape.width4 / 8u)) {
        return;
    }
    // The largest magnitude as bits: a NaN is larger than all numbers, and spoils its block as an infinity does.
    var most = vec4(0u);
    for (var j = 0u; j < 8u; j += 1u) {
        most = max(most, bitcast<vec4<u32>>(x[8u * block + j]) & vec4(0x7fffffffu));
    }
    let largest = bitcast<f32>(max(max(most.x, most.y), max(most.z, most.w)));
    let is_zero = largest < LEAST;
    let inverse = select(127.0 / largest, 0.0, is_zero);
    quantised[3u * block] = vec4(packed(block, 0u, inverse), packed(block, 1u, inverse), packed(block, 2u, inverse), packed(block, 3u, inverse));
    quantised[3u * block + 1u] =
        vec4(packed(block, 4u, inverse), packed(block, 5u, inverse), packed(block, 6u, inverse), packed(block, 7u, inverse));
    quantised[3u * block + 2u] = vec4(bitcast<u32>(select(largest / 127.0, 0.0, is_zero)), 0u, 0u, 0u);
}

fn packed(block: u32, j: u32, inverse: f32) -> u32 {
    return pack4xI8(vec4<i32>(round(x[8u * block + j] * inverse)));
}
