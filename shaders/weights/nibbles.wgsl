// What 4-bit weights times a scale have in common: a vector of 16 bytes a row, then the scales.
const STRIDE: u32 = 18u; // vectors in a block

struct Block {
    quants: vec4<u32>,
    scale: f32,
}

fn block_at(at: u32, row: u32, tile: u32, b: u32) -> Block {
    return Block(weights[at + row], scale_at(at + 16u, row));
}

// The quants of columns 4j to 4j + 4.
fn nibbles4(block: Block, j: u32) -> vec4<u32> {
    return unpack4xU8(nibbles(block.quants, j));
}
