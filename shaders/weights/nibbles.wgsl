// What 4-bit weights have in common: a vector of 16 bytes a row, whose low halves are of the first 16 columns and whose high ones of the
// others; then the scales.
const STRIDE: u32 = 18u; // vectors in a block

struct Block {
    quants: vec4<u32>,
    scale: f32,
}

fn block_at(at: u32, row: u32) -> Block {
    return Block(weights[at + row], scale_at(at + 16u, row));
}

// The quants of columns 4j to 4j + 4.
fn nibbles4(block: Block, j: u32) -> vec4<u32> {
    return unpack4xU8((block.quants[j % 4u] >> (j / 4u * 4u)) & 0x0f0f0f0fu);
}
