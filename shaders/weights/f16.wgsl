// f16 weights: 4 vectors of 8 elements, two in a word, the first in its low half.
const STRIDE: u32 = 64u; // vectors in a block

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    let words = weights[block.at + 16u * (j / 2u)];
    let half = select(words.xy, words.zw, j % 2u == 1u);
    return vec4(unpack2x16float(half.x), unpack2x16float(half.y));
}
