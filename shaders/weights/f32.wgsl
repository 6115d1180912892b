// f32 weights: 8 vectors of 4 elements.
const STRIDE: u32 = 128u; // vectors in a block

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(weights[block.at + 16u * j]);
}
