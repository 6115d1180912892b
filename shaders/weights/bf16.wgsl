// bf16 weights: 4 vectors of 8 elements, two in a word, the first in its low half; each is the upper half of an f32.
const STRIDE: u32 = 64u; // vectors in a block

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    let words = weights[block.at + 16u * (j / 2u)];
    let half = select(words.xy, words.zw, j % 2u == 1u);
    return bitcast<vec4<f32>>(vec4(half.x << 16u, half.x & 0xffff0000u, half.y << 16u, half.y & 0xffff0000u));
}
