// What weights of f32, f16 and bf16 have in common: vectors of 16 bytes, nothing added and no scale.
const BIAS: f32 = 0.0;

struct Block {
    at: u32,
    scale: f32,
}

fn prepare(lane: u32, lanes: u32) {
}

fn block_at(at: u32, row: u32, tile: u32, b: u32) -> Block {
    return Block(at + row, 1.0);
}
