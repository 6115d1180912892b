// q8_0 weights: 2 vectors of 16 bytes q + 128, then the scales.
const STRIDE: u32 = 34u;  // vectors in a block
const BIAS: f32 = 128.0;  // what `block4` adds to every weight, before the scale

struct Block {
    low: vec4<u32>,
    high: vec4<u32>,
    scale: f32,
}

fn prepare(lane: u32, lanes: u32) {
}

fn block_at(at: u32, row: u32, tile: u32, b: u32) -> Block {
    return Block(weights[at + row], weights[at + 16u + row], scale_at(at + 32u, row));
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    let word = select(block.low[j % 4u], block.high[j % 4u], j / 4u == 1u);
    return vec4<f32>(unpack4xU8(word));
}
