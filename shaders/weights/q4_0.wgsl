// q4_0 weights: a vector of 16 bytes, whose low halves are q + 8 of the first 16 columns and whose high ones those of the others; then the scales.
const STRIDE: u32 = 18u; // vectors in a block
const BIAS: f32 = 8.0;   // what `block4` adds to every weight, before the scale

struct Block {
    quants: vec4<u32>,
    scale: f32,
}

fn prepare(lane: u32, lanes: u32) {
}

fn block_at(at: u32, row: u32) -> Block {
    return Block(weights[at + row], scale_at(at + 16u, row));
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xU8((block.quants[j % 4u] >> (j / 4u * 4u)) & 0x0f0f0f0fu));
}
