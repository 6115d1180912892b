// q4_1 weights: a vector of 4-bit values a row, then the scales, then what is added.
const STRIDE: u32 = 20u; // vectors in a block
const SHARED: u32 = 0u;  // vectors that 8 blocks share
const BIAS: f32 = 0.0;   // what `block4` adds to every weight, before the scale
const ADDS: bool = true;

struct Block {
    quants: vec4<u32>,
    scale: f32,
    added: f32,
}

fn prepare(lane: u32, lanes: u32) {
}

fn block_at(at: u32, row: u32, tile: u32, b: u32) -> Block {
    return Block(weights[at + row], scale_at(at + 16u, row), scale_at(at + 18u, row));
}

fn added(block: Block) -> f32 {
    return block.added;
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xU8(nibbles(block.quants, j)));
}
