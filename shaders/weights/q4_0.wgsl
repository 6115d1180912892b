// q4_0 weights: 4-bit values q + 8.
const BIAS: f32 = 8.0;   // what `block4` adds to every weight, before the scale

fn prepare(lane: u32, lanes: u32) {
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    return vec4<f32>(nibbles4(block, j));
}
