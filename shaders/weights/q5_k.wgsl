// q5_k weights: as in q4_k.wgsl, with a word of fifth bits a row behind the vectors.
const STRIDE: u32 = 22u; // vectors in a block
const SHARED: u32 = 4u;  // vectors that 8 blocks share
const BIAS: f32 = 0.0;   // what `block4` adds to every weight, before the scale
const ADDS: bool = true;

struct Block {
    quants: vec4<u32>,
    high: u32,
    scale: f32,
    added: f32,
}

fn prepare(lane: u32, lanes: u32) {
}

fn block_at(at: u32, row: u32, tile: u32, b: u32) -> Block {
    let at_shared = shared_at(tile, b);
    let scale = scale_at(at_shared, row) * byte_at(at + 20u, row);
    let added = -(scale_at(at_shared + 2u, row) * byte_at(at + 21u, row));
    return Block(weights[at + row], word_at(at + 16u, row), scale, added);
}

fn added(block: Block) -> f32 {
    return block.added;
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xU8(nibbles(block.quants, j) | (((block.high >> j) & 0x01010101u) << 4u)));
}
