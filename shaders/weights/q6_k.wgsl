// q6_k weights: a vector of 4-bit values a row and two words of two further bits, 32 above what they stand for; then a byte of scale for either
// half of the columns, 128 too large, times an f16 that 8 blocks share.
const STRIDE: u32 = 26u; // vectors in a block
const SHARED: u32 = 2u;  // vectors that 8 blocks share
const BIAS: f32 = 0.0;   // what `block4` adds to every weight, before the scale
const ADDS: bool = false;

struct Block {
    quants: vec4<u32>,
    high: vec2<u32>,
    halves: vec2<f32>,
    scale: f32,
}

fn prepare(lane: u32, lanes: u32) {
}

fn block_at(at: u32, row: u32, tile: u32, b: u32) -> Block {
    let high = vec2(word_at(at + 16u, row), word_at(at + 20u, row));
    let halves = vec2(byte_at(at + 24u, row), byte_at(at + 25u, row)) - 128.0;
    return Block(weights[at + row], high, halves, scale_at(shared_at(tile, b), row));
}

fn added(block: Block) -> f32 {
    return 0.0;
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    let high = ((block.high[j / 4u] >> (2u * (j % 4u))) & 0x03030303u) << 4u;
    return (vec4<f32>(unpack4xU8(nibbles(block.quants, j) | high)) - 32.0) * block.halves[j / 4u];
}
