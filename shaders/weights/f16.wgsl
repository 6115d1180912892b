// f16 weights: 4 vectors of 8 elements, two in a word, the first in its low half.
const STRIDE: u32 = 64u; // vectors in a block
const BIAS: f32 = 0.0;   // what `block4` adds to every weight, before the scale

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
    let words = weights[block.at + 16u * (j / 2u)];
    let half = select(words.xy, words.zw, j % 2u == 1u);
    return vec4(unpack2x16float(half.x), unpack2x16float(half.y));
}
