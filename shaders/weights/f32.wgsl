// f32 weights: 8 vectors of 4 elements.
const STRIDE: u32 = 128u; // vectors in a block
const BIAS: f32 = 0.0;    // what `block4` adds to every weight, before the scale

struct Block {
    at: u32,
    scale: f32,
}

fn prepare(lane: u32, lanes: u32) {
}

fn block_at(at: u32, row: u32) -> Block {
    return Block(at + row, 1.0);
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(weights[block.at + 16u * j]);
}
