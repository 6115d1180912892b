// q5_0 weights: a vector of 4-bit values a row and a word of their fifth bits, 16 above what they stand for; then the scales.
const STRIDE: u32 = 22u; // vectors in a block
const BIAS: f32 = 16.0;   // what `block4` adds to every weight, before the scale

struct Block {
    quants: vec4<u32>,
    high: u32,
    scale: f32,
}

fn prepare(lane: u32, lanes: u32) {
}

fn block_at(at: u32, row: u32, tile: u32, b: u32) -> Block {
    return Block(weights[at + row], word_at(at + 16u, row), scale_at(at + 20u, row));
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xU8(nibbles(block.quants, j) | (((block.high >> j) & 0x01010101u) << 4u)));
}
